"""Which sequence holds which cache slot, and what earlier ones left there that a new one can start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Copying a shorter prefix from another slot saves less than the copy costs.
LEAST_COPIED = 16


class Holder(Protocol):
    """A sequence in a slot: the first `computed` of its `tokens` are in the cache, as its `weights` made them."""

    tokens: list[int]
    computed: int

    @property
    def weights(self) -> int:
        """The same for sequences that may start from one another's cache, and for no others."""
        ...


Content = tuple[int, list[int]]
"""The tokens in a slot, and which weights their keys and values were computed with."""


@dataclass(frozen=True)
class Allocation:
    """A slot, the tokens already in it, and the slot they must first be copied from, if any."""

    slot: int
    cached: int
    copy_from: int | None = None


class SlotPool:
    """Allocates slots. A released one keeps its content until another sequence needs it, the least recent one first."""

    def __init__(self, slots: int) -> None:
        self._holders: list[Holder | None] = [None] * slots
        self._left: list[Content] = [(0, [])] * slots
        self._released_at = [0] * slots
        self._clock = 0

    @property
    def free(self) -> int:
        """Slots nobody holds."""
        return sum(holder is None for holder in self._holders)

    def acquire(self, holder: Holder, reusable: int) -> Allocation | None:
        """A slot for `holder`, with at most `reusable` of its tokens taken from the cache; None when all are held."""
        candidates = [slot for slot, other in enumerate(self._holders) if other is None]
        if not candidates:
            return None
        wanted = holder.tokens[:reusable]
        contents = [self._content(slot) for slot in range(len(self._holders))]
        shared = [common_prefix(held, wanted) if weights == holder.weights else 0 for weights, held in contents]
        best = max(range(len(shared)), key=lambda slot: (shared[slot], self._holders[slot] is None))
        if self._holders[best] is None and shared[best]:
            allocation = Allocation(best, shared[best])
        else:
            slot = min(candidates, key=lambda candidate: self._released_at[candidate])
            allocation = Allocation(slot, shared[best], best) if shared[best] >= LEAST_COPIED else Allocation(slot, 0)
        self._holders[allocation.slot] = holder
        return allocation

    def release(self, slot: int) -> None:
        """Give a slot back; what is in it may serve others."""
        self._left[slot] = self._content(slot)
        self._holders[slot] = None
        self._clock += 1
        self._released_at[slot] = self._clock

    def forget(self) -> None:
        """Trust nothing that was left in free slots (after a failed step)."""
        self._left = [(0, [])] * len(self._left)

    def _content(self, slot: int) -> Content:
        holder = self._holders[slot]
        return self._left[slot] if holder is None else (holder.weights, holder.tokens[: holder.computed])


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])
