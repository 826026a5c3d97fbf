"""What compiled code can tell of the network's rows of logits without writing any of them out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]
Found = tuple[Floats, Ids]
"""Tokens of each row, ascending: logits and ids `[B, K]`, behind the last one -inf and V."""


CUTS = {"top_k": 0, "top_p": 1, "min_p": 2}
"""The stages after the temperature that compiled code goes through by itself, and the numbers it knows them by."""

MOST_LIKELY, NO_CUT = 3, -1
"""In place of a row's first cut: that nothing is drawn, and that no more follow."""


@dataclass(frozen=True)
class Drawing:
    """How compiled code draws a token of each of B rows: what logits are divided by, `divisors [B]`, then the `cuts [B,
    3]` with their `values`, then the noise of `places [B, 3]`: seed, sequence and position. It is loud for hashes
    (`noise.loud_tokens`) of at least `threshold`."""

    divisors: Floats
    cuts: NDArray[np.int32]
    values: Doubles
    places: Ids
    threshold: int


@dataclass(frozen=True)
class Ahead:
    """How far to go on: for `most` steps, of which none begins that would be done after so many `seconds`, nor any once
    `interrupted [1]` is set, or a row has drawn a token that ends it: `ends` are rows and such tokens."""

    most: int
    seconds: float
    interrupted: NDArray[np.int32]
    ends: Sequence[tuple[int, int]]


class Scan(Protocol):
    """B rows of logits where they lie, each divided by a number: 1 unless it was told otherwise."""

    @property
    def best(self) -> Floats:
        """The largest of each row, `[B]`; NaN where there is one."""
        ...

    @property
    def first(self) -> NDArray[np.int32]:
        """The first token that has it, `[B]`."""
        ...

    @property
    def size(self) -> int:
        """V."""
        ...

    def __len__(self) -> int:
        """How many rows."""
        ...

    def some(self, indexes: list[int]) -> Self:
        """Some of the rows."""
        ...

    def again(self, logits: Tensor) -> Self:
        """A scan of other logits, `[B, V]` float32 on the CPU."""
        ...

    def divide(self, divisors: Floats) -> Self | None:
        """The rows divided by `divisors [B]`; None where they are divided already."""
        ...

    def written(self) -> Floats:
        """All logits, `[B, V]`, which are the caller's to change."""
        ...

    def totals(self) -> tuple[Doubles, Doubles]:
        """The sums of exp(logit - best) over each row, `[B]`, and of that times (best - logit)."""
        ...

    def get(self, rows: Ids, token_ids: Ids) -> Floats:
        """The logits of these tokens of these rows, `[n]` each."""
        ...

    def at_least(self, floors: Floats) -> Found:
        """The tokens of at least `floors [B]`."""
        ...

    def outstanding(self, floors: Floats, keys: Ids, threshold: int) -> Found:
        """The tokens of at least `floors [B]`, and those whose hash (`noise.loud_tokens`) is at least `threshold`."""
        ...

    def largest(self, k: Ids) -> Found:
        """The `k [B]` largest of each row, and those equal to the last of them."""
        ...

    def drawn(self, drawing: Drawing) -> list[int]:
        """A token of each row, undivided so far; -1 where the largest logit is infinite or none."""
        ...

    def above(self, values: Floats) -> list[int]:
        """How many logits of each row are more than `values [B]`, before they are divided."""
        ...


Scanner = Callable[[Sequence[Tensor]], Scan]
"""Scans rows of logits, float32 `[V]` on the CPU each."""
