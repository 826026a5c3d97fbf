"""Several sources in one run, each seen as often as its weight says, in an order that the seed alone decides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from topkapi.training.data.windows import permutation


def quotas(total: int, weights: Sequence[float]) -> list[int]:
    """`total` items shared out by `weights`; what is left over goes to the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def mixed_order(seed: int, epoch: int, sizes: Sequence[int], weights: Sequence[float]) -> NDArray[np.int64]:
    """The items of an epoch in their order: as many as there are, of each source its share.

    Items are numbered over all sources. A source is gone through in an order of its own, which every epoch continues
    where the one before stopped: no item comes again before all of its source have come.
    """
    chosen, offset = [], 0
    for number, (size, quota) in enumerate(zip(sizes, quotas(sum(sizes), weights), strict=True), start=1):
        rounds, places = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), size)
        own = np.empty(quota, dtype=np.int64)
        for each in np.unique(rounds).tolist():
            # A run's own epochs never come near these.
            own[rounds == each] = permutation(seed, (number << 40) + each, size)[places[rounds == each]]
        chosen.append(offset + own)
        offset += size
    return np.concatenate(chosen)[permutation(seed, epoch, offset)]


def describe_mixture(
    names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], epochs: float
) -> Iterator[str]:
    """A line per source: its share of what is trained, and how often the run goes through it."""
    total = sum(sizes)
    for name, size, quota in zip(names, sizes, quotas(total, weights), strict=True):
        yield f"{quota / total:.1%} from {name}, {epochs * quota / size:.2f} times over"
