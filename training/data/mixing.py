"""Several sources in one run, each seen as often as its weight says, in an order that the seed alone decides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.errors import DataError
from training.data.windows import permutation

_WEIGHT = re.compile(r"(.+)=([^=/]*)")


def split_weight(source: str) -> tuple[str, float | None]:
    """`a.txt=3` is `a.txt` with the weight 3; a file that is called so has none.

    Raises `DataError` for a weight that is no number above 0.
    """
    match = _WEIGHT.fullmatch(source)
    if match is None or Path(source).expanduser().exists():
        return source, None
    try:
        weight = float(match[2])
    except ValueError:
        if not Path(match[1]).expanduser().exists():
            return source, None
        raise DataError(
            f"the weight of {match[1]} must be a number, not {match[2]!r}",
            field="data",
            hint=f"for example {match[1]}=3, or {match[1]} alone for a weight of 1",
        ) from None
    if not 0 < weight < math.inf:
        raise DataError(
            f"the weight of {match[1]} must be above 0, not {match[2]}", field="data", hint="leave the source out"
        )
    return match[1], weight


def sources_and_weights(data: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """The sources without their weights, and these (1 where one has none; None where none has)."""
    pairs = [split_weight(source) for source in data]
    names = [name for name, _ in pairs]
    if all(weight is None for _, weight in pairs):
        return names, None
    if len(pairs) == 1:
        raise DataError(
            f"a weight for {names[0]} alone means nothing", field="data", hint="give another source, or leave it out"
        )
    return names, [1.0 if weight is None else weight for _, weight in pairs]


def pattern_and_weight(entry: str) -> tuple[str, str]:
    """`made*=6` in its parts. Raises `ValueError` for what is no pattern and weight."""
    pattern, _, weight = entry.rpartition("=")
    try:
        if pattern and 0 < float(weight) < math.inf:
            return pattern, weight
    except ValueError:
        pass
    raise ValueError(f"{entry!r} is not a pattern and a weight above 0, as in 'made*=6'")


def weighted(data: Sequence[str], weights: Sequence[str]) -> list[str]:
    """The sources, those without a weight with that of the first of `weights` (`pattern=weight`) that fits the name."""
    known = [pattern_and_weight(entry) for entry in weights]
    found = []
    for source in data:
        name, own = split_weight(source)
        fitting = next((weight for pattern, weight in known if fnmatchcase(Path(name).name, pattern)), None)
        found.append(source if own is not None or fitting is None else f"{name}={fitting}")
    return found


def unused(data: Sequence[str], weights: Sequence[str]) -> list[str]:
    """The patterns of `weights` that fit no source."""
    names = [Path(split_weight(source)[0]).name for source in data]
    patterns = [pattern_and_weight(entry)[0] for entry in weights]
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


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
