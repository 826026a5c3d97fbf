"""How the learning rate changes over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """The factor by which every base learning rate is multiplied at each step.

    `cosine` and `linear` fall from 1 to `final` (Loshchilov & Hutter 2017); `wsd` stays at 1 and falls linearly over
    the last `decay_fraction` of the steps (Hu et al. 2024, MiniCPM); `constant` stays at 1. `warmup` steps rise
    linearly first.
    """

    name: ScheduleName
    total_steps: int
    warmup: int = 0
    final: float = 0.1
    decay_fraction: float = 0.4

    def factor(self, step: int) -> float:
        """The factor for the update that follows `step` finished ones (0-based)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            decay = max(1, round(self.decay_fraction * self.total_steps))
            left = (self.total_steps - step) / decay
            return self.final + (1 - self.final) * min(1.0, left)
        progress = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
        left = 1 - progress if self.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final + (1 - self.final) * left


def warmup_steps(warmup: float, total_steps: int) -> int:
    """`warmup` below 1 is a fraction of the run, otherwise a number of steps."""
    return round(warmup * total_steps) if warmup < 1 else round(warmup)
