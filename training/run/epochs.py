"""The step down that the training loss takes where an epoch ends: what is seen again is partly known by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]

# The losses of so many steps on each side of a boundary are compared: a part of an epoch, within these bounds.
_PART, _LEAST, _MOST = 0.2, 5, 50
# A step down is so many standard errors below where the trend of the epoch before would have led, and so large a part
# of the loss.
_ERRORS, _PART_OF_LOSS = 4.0, 0.01


@dataclass(frozen=True)
class StepDown:
    """The loss of the batches after the end of `epoch`, at `step`, lies `size` below where it was going; `loss` is the
    mean of those before."""

    epoch: int
    step: int
    loss: float
    size: float

    def sentence(self) -> str:
        """What it means, in one sentence."""
        return (
            f"memorising: at the end of epoch {self.epoch} (step {self.step}) the training loss stepped down by "
            f"{self.size:.3f}, from {self.loss:.3f}: what comes again is partly known by heart"
        )


def steps_per_epoch(records: Records) -> float | None:
    """How many steps an epoch has, by the evaluations of a run; None before the first one."""
    found = [record["step"] / record["epoch"] for record in records if record.get("epoch")]
    return found[-1] if found else None


def boundaries(records: Records) -> list[int]:
    """The steps after which an epoch ended and another began."""
    per_epoch = steps_per_epoch(records)
    last = max((record["step"] for record in records if "event" not in record), default=0)
    if per_epoch is None or per_epoch < 1:
        return []
    return [round(epoch * per_epoch) for epoch in range(1, math.ceil(last / per_epoch))]


def steps_down(records: Records) -> list[StepDown]:
    """Where the loss of the batches steps down at the end of an epoch, beyond what its trend explains."""
    losses = {record["step"]: record["loss"] for record in records if "learning_rate" in record}
    per_epoch = steps_per_epoch(records)
    if per_epoch is None:
        return []
    width = min(_MOST, max(_LEAST, int(_PART * per_epoch)))
    found = []
    for number, step in enumerate(boundaries(records), start=1):
        earlier = [at for at in range(step - min(3 * width, int(per_epoch)) + 1, step + 1) if at in losses]
        later = [at for at in range(step + 1, step + width + 1) if at in losses]
        if len(earlier) < 2 * _LEAST or len(later) < _LEAST:
            continue
        before = np.array([losses[at] for at in earlier])
        slope, level = np.polyfit(earlier, before, 1)
        # A curve that flattens ends above its straight line, so what is found is rather too small.
        expected = slope * np.array(later) + level
        below = float((expected - np.array([losses[at] for at in later])).mean())
        spread = float(np.std(before - (slope * np.array(earlier) + level), ddof=2))
        centre, spans = float(np.mean(earlier)), float(((np.array(earlier) - np.mean(earlier)) ** 2).sum())
        error = spread * math.sqrt(1 / len(later) + 1 / len(earlier) + (float(np.mean(later)) - centre) ** 2 / spans)
        loss = float(before[-len(later) :].mean())
        if below > max(_ERRORS * error, _PART_OF_LOSS * loss):
            found.append(StepDown(number, step, loss, below))
    return found
