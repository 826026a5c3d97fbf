"""Figures with what chance makes of them: bootstrap intervals, and paired differences between checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
_DEVIATIONS = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_NUMBERS_AT_ONCE = 1 << 18
EXACT_ITEMS = 12


@dataclass(frozen=True)
class Measure:
    """The ratio of two sums over items (`totals [N]` by `counts [N]`), or e to its power (`exponential`).

    A mean has counts of 1; an item that does not take part has a total and a count of 0. `comparable` holds whatever
    must be equal for two checkpoints' figures to mean the same, for example a digest of the vocabulary. Where it is
    a `share`, or in the unit `%`, every item has at most its count.
    """

    name: str
    totals: Numbers
    counts: Numbers
    higher_is_better: bool = True
    exponential: bool = False
    comparable: str = ""
    unit: str = ""
    share: bool = False

    @property
    def value(self) -> float:
        """The figure over all items; NaN where none takes part."""
        return float(self._of(self.totals.sum(), self.counts.sum()))

    @property
    def items(self) -> int:
        """How many items take part."""
        return int((self.counts > 0).sum())

    def resampled(self, seed: int = 0, resamples: int = RESAMPLES) -> Numbers:
        """The figure over `resamples` samples of items, drawn with replacement (Efron 1979): `[resamples]`.

        The draws depend on the number of items alone, so two measures over the same items are resampled alike.
        """
        random = np.random.default_rng(seed)
        size = len(self.totals)
        totals, counts = np.empty(resamples), np.empty(resamples)
        together = max(1, _NUMBERS_AT_ONCE // max(1, size))
        for at in range(0, resamples, together):
            part = slice(at, min(at + together, resamples))
            chosen = random.integers(0, size, (part.stop - at, size))
            totals[part], counts[part] = self.totals[chosen].sum(1), self.counts[chosen].sum(1)
        return np.asarray(self._of(totals, counts), dtype=np.float64)

    def _of(self, totals: Any, counts: Any) -> Any:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio = np.divide(totals, counts)
            return np.exp(ratio) if self.exponential else ratio


def mean(name: str, values: Sequence[float | bool | None], **options: Any) -> Measure:
    """The mean of `values`; None is an item that does not take part."""
    totals = np.array([0.0 if value is None else float(value) for value in values])
    counts = np.array([0.0 if value is None else 1.0 for value in values])
    return Measure(name, totals, counts, **options)


@dataclass(frozen=True)
class Interval:
    """A figure between the bounds of its 95 % bootstrap interval (percentiles); `shares` is the number of items where
    it is a share of them. `chance` is, for a difference on few items, the exact probability of one as large."""

    value: float
    low: float
    high: float
    samples: Numbers = field(repr=False, compare=False)
    shares: int = 0
    chance: float | None = None

    @property
    def differs(self) -> bool:
        """Whether a difference is one for certain: the interval leaves zero out, and so does the exact test."""
        return (self.low > 0 or self.high < 0) and (self.chance is None or self.chance <= 1 - CONFIDENCE)


def exact_chance(first: Measure, second: Measure) -> float | None:
    """How often figures would differ as much or more if each item's two results were exchanged by chance (Fisher 1935):
    all exchanges are tried. None where more than `EXACT_ITEMS` items differ, for which a bootstrap says enough; of five
    it never says less than 6 %.
    """
    differ = (first.totals != second.totals) | (first.counts != second.counts)
    number = int(differ.sum())
    if number > EXACT_ITEMS:
        return None
    exchanged = (np.arange(1 << number)[:, None] >> np.arange(number) & 1).astype(np.bool_)

    def figures(own: Measure, other: Measure) -> Numbers:
        sums = [
            mine[~differ].sum() + np.where(exchanged, theirs[differ], mine[differ]).sum(1)
            for mine, theirs in ((own.totals, other.totals), (own.counts, other.counts))
        ]
        return np.asarray(own._of(*sums), dtype=np.float64)

    differences = np.abs(figures(second, first) - figures(first, second))
    # The first is the one that was found; the same sum in another order may differ by rounding.
    return float((differences >= differences[0] * (1 - 1e-9)).mean())


def interval(measure: Measure) -> Interval:
    """The figure with its interval; the bounds of a single item's are NaN.

    Where all items are wrong, or all right, every resample is as they are, though others need not be: the bounds of
    such a share are Wilson's (1927).
    """
    # One item says nothing of others.
    samples = measure.resampled() if measure.items > 1 else np.full(RESAMPLES, np.nan)
    shares = measure.items if measure.share or measure.unit == "%" else 0
    low, high = _bounds(samples)
    if shares and low == high == 0:
        high = _unseen(shares)
    elif shares and low == high == 1:
        low = 1 - _unseen(shares)
    return Interval(measure.value, low, high, samples, shares)


def _unseen(items: int) -> float:
    """What the share of a thing may be that none of so many items had: Wilson's upper bound of 0."""
    squared = _DEVIATIONS**2
    return squared / (items + squared)


def difference(first: Interval, second: Interval) -> Interval:
    """`second - first`, paired: both were measured on the same items and are resampled alike.

    Where shares differ by the same on every item, others may differ otherwise, as many as Wilson's bound leaves.
    """
    samples = second.samples - first.samples
    low, high = _bounds(samples)
    shares = min(first.shares, second.shares)
    if shares and low == high and low in (-1, 0, 1):
        # An item that is right in the one and wrong in the other is one apart, or two from where all differ.
        apart = _unseen(shares) * (2 if low else 1)
        low, high = max(-1.0, low - apart), min(1.0, high + apart)
    return Interval(second.value - first.value, low, high, samples, shares)


def _bounds(samples: Numbers) -> tuple[float, float]:
    kept = samples[~np.isnan(samples)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
