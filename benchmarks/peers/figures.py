"""From the times at which tokens came to figures, and from the figures of many rounds to ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = dict[str, float]

LEAST_TOKENS = 4
"""Tokens of each stream in the stretch that a decode rate is taken from, on average; of fewer, none is given."""

HIGHER, LOWER = "higher is better", "lower is better"
MEASURES = {
    "decode_tokens_per_s": HIGHER,
    "end_to_end_tokens_per_s": HIGHER,
    "first_token_p50_s": LOWER,
    "first_token_p99_s": LOWER,
    "prefill_tokens_per_s": HIGHER,
}


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that so many percent of `values` don't exceed (nearest rank): one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def of_times(times: Sequence[Sequence[float]]) -> Figures:
    """Figures of streams whose tokens came at these seconds after all had been asked for.

    The decode rate is that of the stretch in which every stream generates, from the last first token to the first
    last one; it is left out where that holds too few tokens.
    """
    firsts, lasts = [each[0] for each in times], [each[-1] for each in times]
    figures = {
        "end_to_end_tokens_per_s": sum(map(len, times)) / max(lasts),
        "first_token_p50_s": percentile(firsts, 50),
        "first_token_p99_s": percentile(firsts, 99),
    }
    begun, ended = max(firsts), min(lasts)
    counted = sum(begun < at <= ended for each in times for at in each)
    if counted >= LEAST_TOKENS * len(times):
        figures["decode_tokens_per_s"] = counted / (ended - begun)
    return figures


@dataclass(frozen=True)
class Ratio:
    """Of several rounds, the median of ours over theirs (of times: theirs over ours), the least and the greatest."""

    median: float
    least: float
    greatest: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.greatest:.2f})"


def ratio(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], measure: str) -> Ratio | None:
    """How many times better we are, by pairs of the same round; None where no round has both."""
    pairs = [(mine[measure], other[measure]) for mine, other in zip(ours, theirs, strict=True)
             if measure in mine and measure in other]  # fmt: skip
    if not pairs:
        return None
    ratios = [mine / other if MEASURES[measure] == HIGHER else other / mine for mine, other in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def median(rounds: Sequence[Mapping[str, float]], measure: str) -> float | None:
    """The median of a figure over the rounds that have it."""
    values = [each[measure] for each in rounds if measure in each]
    return statistics.median(values) if values else None
