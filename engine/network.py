"""The network as the engine sees it: tokens into slots, logits out. Tests put a fake in its place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from topkapi.model.cache import NetworkOutput, SlotCache, Work, outputs
from topkapi.model.decoding.scan import Scanner
from topkapi.model.invariance import calibrate
from topkapi.model.transformer import Decoder


class Network(Protocol):
    """What the engine needs of a network with `slots` cache slots of `capacity` tokens."""

    slots: int
    capacity: int
    deterministic: bool
    scanner: Scanner | None
    """What looks through its logits faster than numpy does, if something can."""

    def run(self, works: Sequence[Work]) -> list[NetworkOutput]:
        """Read every work's tokens; what each asked for."""
        ...

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Give slot `target` the tokens from `start` to before `end` of slot `source`."""
        ...

    def reset(self) -> None:
        """Forget what is in every slot, whatever state it was left in."""
        ...


class DecoderNetwork:
    """A `Decoder` over a `SlotCache`. `deterministic` is whether rows were found independent of their neighbours.

    A slot has `capacity` tokens (None: a context). There are fewer than `slots` slots, and at worst one that holds
    less, where all of them full would take more than half of the memory.
    """

    def __init__(self, model: Decoder, slots: int, capacity: int | None = None) -> None:
        self.model = model
        token_bytes = SlotCache.token_bytes(model)
        affordable = max(1, memory_bytes(model.device) // 2 // token_bytes)
        self.capacity = min(capacity or model.config.context_length, affordable)
        self.slots = min(slots, affordable // self.capacity)
        self.deterministic = calibrate(model)
        self.scanner: Scanner | None = None if model.core is None else model.core.scanner
        self._cache = SlotCache(model, self.slots, self.capacity)

    def run(self, works: Sequence[Work]) -> list[NetworkOutput]:
        return outputs(self.model, self._cache, works)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        self._cache.copy(source, target, start, end)

    def reset(self) -> None:
        # The old one goes first: there may be no room for two.
        del self._cache
        self._cache = SlotCache(self.model, self.slots, self.capacity)


CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much a container may take, by version 2 and 1 of its control groups."""


def memory_bytes(device: torch.device) -> int:
    """Memory of the machine, or what of it this container may take, or of the accelerator, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in CGROUP_LIMITS:
        try:
            found.append(int(Path(place).read_text()))
        except (OSError, ValueError):
            # There is none, or it is "max".
            continue
    return min(found)
