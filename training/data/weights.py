"""What is said of data as `NAME=VALUE`: how often a source of a run is seen (`a.txt=3`, or for all that a pattern
fits), and what a field is called here (`Question=prompt`)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from topkapi.model.errors import DataError
from topkapi.model.user_files import expanded

_WEIGHT = re.compile(r"(.+)=([^=/]*)")


def split_weight(source: str) -> tuple[str, float | None]:
    """`a.txt=3` is `a.txt` with the weight 3; a file that is called so has none.

    Raises `DataError` for a weight that is no number above 0.
    """
    match = _WEIGHT.fullmatch(source)
    if match is None or expanded(source).exists():
        return source, None
    try:
        weight = float(match[2])
    except ValueError:
        if not expanded(match[1]).exists():
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


def name_and_meaning(entry: str) -> tuple[str, str]:
    """`Question=prompt` in its parts. Raises `ValueError` for what is no field and its meaning."""
    name, _, here = entry.rpartition("=")
    if not name or not here:
        raise ValueError(f"{entry!r} is not a field of the data and its name here, as in Question=prompt")
    return name, here
