"""The step down that the training loss takes where an epoch ends: what is seen again is partly known by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]

# The losses of so many steps on each side of a boundary are looked at: half an epoch, within these bounds.
_LEAST, _MOST = 10, 50
# A step down is so many standard errors away from none, and so large a part of the loss.
_ERRORS, _PART_OF_LOSS = 3.5, 0.01


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
    """Where the loss of the batches steps down at the end of an epoch, beyond what its trend explains.

    A line with a step in it is fitted to the losses around each boundary. A curve that flattens looks like a step up to
    it, so that what is found is rather too small.
    """
    losses = {record["step"]: record["loss"] for record in records if "learning_rate" in record}
    per_epoch = steps_per_epoch(records)
    width = 0 if per_epoch is None else min(_MOST, int(per_epoch / 2))
    found = []
    for number, step in enumerate(boundaries(records) if width >= _LEAST else [], start=1):
        at = np.array([each for each in range(step - width + 1, step + width + 1) if each in losses])
        after = at > step
        if after.sum() < _LEAST or (~after).sum() < _LEAST:
            continue
        values = np.array([losses[each] for each in at.tolist()])
        terms = np.stack([np.ones(len(at)), (at - step) / width, after], axis=1)
        coefficients, *_ = np.linalg.lstsq(terms, values, rcond=None)
        variance = float(((values - terms @ coefficients) ** 2).sum()) / (len(at) - terms.shape[1])
        error = math.sqrt(variance * float(np.linalg.inv(terms.T @ terms)[2, 2]))
        below, loss = -float(coefficients[2]), float(values[~after].mean())
        if below > max(_ERRORS * error, _PART_OF_LOSS * loss):
            found.append(StepDown(number, step, loss, below))
    return found
