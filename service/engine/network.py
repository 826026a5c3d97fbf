"""The network as the engine sees it: tokens into slots, logits out. Tests put a fake in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from model.cache import SlotCache, Work, read, wanted_logits
from model.invariance import calibrate
from model.transformer import Decoder


class Network(Protocol):
    """What the engine needs of a network with `slots` cache slots of `capacity` tokens."""

    slots: int
    capacity: int
    deterministic: bool

    def run(self, works: Sequence[Work]) -> Tensor:
        """Read every work's tokens; logits of the wanted ones, `[sum of wanted, vocab_size]`."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of slot `source`."""
        ...


class DecoderNetwork:
    """A `Decoder` over a `SlotCache`. `deterministic` is whether rows were found independent of their neighbours."""

    def __init__(self, model: Decoder, slots: int) -> None:
        self.model, self.slots = model, slots
        self.capacity = model.config.context_length
        self.deterministic = calibrate(model)
        self._cache = SlotCache(model, slots)

    def run(self, works: Sequence[Work]) -> Tensor:
        return wanted_logits(self.model, read(self.model, self._cache, works))

    def copy(self, source: int, target: int, length: int) -> None:
        self._cache.copy(source, target, length)
