"""From the times at which tokens came to figures, and from the figures of many rounds to ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from topkapi.service.commands.bench_times import Times, decode_rate, end_to_end_rate, percentile

Figures = dict[str, float]

HIGHER, LOWER = "higher is better", "lower is better"
MEASURES = {
    "decode_tokens_per_s": HIGHER,
    "end_to_end_tokens_per_s": HIGHER,
    "first_token_p50_s": LOWER,
    "first_token_p99_s": LOWER,
    "prefill_tokens_per_s": HIGHER,
}


def of_times(times: Times) -> Figures:
    """Figures of streams by when their tokens came; the decode rate is left out where too few tell it."""
    firsts = [each[0] for each in times]
    figures = {
        "end_to_end_tokens_per_s": end_to_end_rate(times),
        "first_token_p50_s": percentile(firsts, 50),
        "first_token_p99_s": percentile(firsts, 99),
    }
    if (rate := decode_rate(times)) is not None:
        figures["decode_tokens_per_s"] = rate
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
