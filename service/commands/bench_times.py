"""From the times at which tokens came to figures: rates, and percentiles where enough was measured to tell them."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Times = Sequence[Sequence[float]]
"""For each stream, when its tokens came, in seconds after all streams were asked for."""

LEAST_TOKENS = 4
"""Tokens of each stream, on average, in the stretch that a decode rate is taken from; of fewer, none is given."""

PERCENTS = (50, 90, 99)

BUSY = 0.5
"""Programs that ran on average while nothing was measured yet, above which the machine counts as busy."""

SPREAD = 0.3
"""How far the greatest of the repeats may be above the least, as a share of the median, before it is told of."""


@dataclass(frozen=True)
class Figure:
    """The median of the repeats, and the least and the greatest of them."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def spread(self) -> float:
        """How far apart the least and the greatest are, as a share of the median."""
        return (self.greatest - self.least) / self.median


def percentile(values: Sequence[float], percent: float) -> float:
    """The least of `values` that so many percent of them don't exceed (nearest rank): one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """`p50`, `p90` and `p99`; None for those that so few values don't tell, where only the greatest would be beyond."""
    return {
        f"p{percent}": percentile(values, percent) if len(values) * (100 - percent) >= 100 else None
        for percent in PERCENTS
    }


def decode_rate(times: Times) -> float | None:
    """Tokens per second of the stretch in which every stream generates, from the last first token to the first last
    one; None where that holds too few."""
    begun, ended = max(each[0] for each in times), min(each[-1] for each in times)
    counted = sum(begun < at <= ended for each in times for at in each)
    return counted / (ended - begun) if counted >= LEAST_TOKENS * len(times) and ended > begun else None


def end_to_end_rate(times: Times) -> float:
    """Tokens per second from the first request to the last token, reading the prompts included."""
    return sum(map(len, times)) / max(each[-1] for each in times)


def gaps(times: Times) -> list[float]:
    """Seconds between each two neighbouring tokens of a stream."""
    return [after - before for each in times for before, after in pairwise(each)]


def load_average() -> float | None:
    """Programs that ran or wanted to in the last minute, on average; None where the system doesn't say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy(load: float | None) -> list[str]:
    """A warning where other programs were at work before anything was measured."""
    if load is None or load <= BUSY:
        return []
    return [f"the machine is busy: {load:.1f} programs ran in the last minute, and the figures are theirs as well"]


def unsteady(figures: dict[str, Figure | None]) -> list[str]:
    """A warning where repeats of the same differ a lot, naming what does most."""
    spreads = {name: figure.spread for name, figure in figures.items() if figure is not None}
    worst = max(spreads, key=lambda name: spreads[name], default=None)
    if worst is None or spreads[worst] <= SPREAD:
        return []
    return [f"repeats of the same differ by {100 * spreads[worst]:.0f} % ({worst}): something else ran beside them"]
