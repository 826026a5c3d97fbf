"""Notices a loss that spikes or is no number, and names what it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topkapi.model.errors import TopkapiError
from topkapi.training.data.windows import Batch
from topkapi.training.run.state import TrainerState

# The running level forgets a loss within a hundred steps or so.
DECAY = 0.97
# Before so many steps the level says little, and the loss falls fast.
FIRST_STEPS = 20
# A spike is so many mean deviations above the level, and this part of the level: over 3,800 steps of nine pretraining
# and fine-tuning runs, batches of 2 to 64, no sound step was 4.8 deviations above it, and every visible spike over 6.8.
DEVIATIONS, PART_OF_LEVEL = 6.0, 0.25
# Training that works never stands so far above where it began, whatever the warm-up does at first.
RISEN, RISEN_PART = 0.25, 0.25
# A spike seldom comes alone; those within so many steps of one that was named are not named again.
QUIET_STEPS = 20
# After so many returns to one checkpoint, the batches are not what is wrong.
MOST_RETURNS = 3
_ROWS, _EXCERPT = 3, 60


class Diverged(TopkapiError):
    """The loss is no longer a number, or spikes again and again."""

    kind = "diverged"


@dataclass(frozen=True)
class LossSpike:
    """A step whose loss is no number or far above its running level, `batch` the number of its batch.

    `rows` are the batch's worst, `{"row", "loss", "origin", "text"}`; `loss` and `gradient_norm` None if not finite.
    """

    kind: str
    step: int
    batch: int
    loss: float | None
    gradient_norm: float | None
    level: float | None
    rows: list[dict[str, Any]]

    def headline(self) -> str:
        """What happened, in one line."""
        if self.kind == "spike":
            assert self.loss is not None and self.level is not None, "a spike is above a level"
            return (
                f"step {self.step}: the loss spiked to {self.loss:.3f}, from a running level of {self.level:.3f}, "
                f"on batch {self.batch}"
            )
        loss = "no number" if self.loss is None else f"{self.loss:.3f} with a gradient that is no number"
        return f"step {self.step}: the loss became {loss} on batch {self.batch}"

    def causes(self) -> list[str]:
        """The rows that did it, a line each."""
        return [
            f"  row {row['row']} (loss {'no number' if row['loss'] is None else format(row['loss'], '.3f')}): "
            f"{row['origin']}: {row['text']!r}"
            for row in self.rows
        ]


def find_spike(
    state: TrainerState,
    loss: float,
    norm: float,
    *,
    loss_of: Callable[[Batch], float],
    batch: Batch,
    origins: Callable[[int], Sequence[str]],
    text_of: Callable[[list[int]], str],
) -> LossSpike | None:
    """Judge the loss and gradient norm of the update that comes after `state`; None where all is well.

    `loss_of` is the loss of a part of the batch, without training on it, `origins(number)` names where each row of that
    batch comes from, and `text_of` makes text of token ids.
    """
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite and not _far_above(state, loss):
        return None
    number = state.batch_number()
    parts = list(batch.split(1))
    losses = [loss_of(part) for part in parts]
    # What is no number is worse than any.
    order = sorted(range(len(losses)), key=lambda row: -losses[row] if math.isfinite(losses[row]) else -math.inf)
    names = origins(number)
    rows = []
    for row in order[:_ROWS]:
        text = " ".join(text_of(parts[row].tokens.flatten().tolist()).split())
        excerpt = text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
        rows.append({"row": row, "loss": _number(losses[row]), "origin": names[row], "text": excerpt})
    kind = "spike" if finite else "not a number"
    return LossSpike(kind, state.step + 1, number, _number(loss), _number(norm), state.level, rows)


def diverged(spike: LossSpike, *, returns: bool, anchor: int | None, returned: int, best: Path | None) -> Diverged:
    """The error that ends a run at `spike`: one that `returns` to saves, `returned` times to `anchor`, or one that
    doesn't. `best` is the best checkpoint, if there is one."""
    message, hint = spike.headline(), "lower --learning-rate, lengthen --warmup or set --clip"
    if best is not None:
        hint += f"; {best} is intact"
    if returns:
        there = f", after {returned} returns to step {anchor}"
        message += there if anchor else "; nothing was saved before it that the run could return to"
    elif best is not None:
        hint += "; --on-divergence return would leave that batch out"
    return Diverged(message, hint=hint)


def observe(state: TrainerState, loss: float) -> list[str]:
    """Let the running level follow `loss`; says so, once in a run, when it stands far above the first loss."""
    if state.level is None:
        state.level = loss
    # At first the mean of what there is, so that the untrained loss does not stick.
    decay = min(DECAY, state.observed / (state.observed + 9))
    state.deviation = decay * state.deviation + (1 - decay) * abs(loss - state.level)
    state.level = decay * state.level + (1 - decay) * loss
    state.observed += 1
    first = state.first_train_loss
    if state.risen is not None or first is None or state.observed < FIRST_STEPS:
        return []
    if state.level - first <= max(RISEN, RISEN_PART * abs(first)):
        return []
    state.risen = state.step + 1
    return [
        f"step {state.risen}: diverging: the smoothed loss has risen to {state.level:.3f}, from {first:.3f} "
        "before the first step; lower --learning-rate or lengthen --warmup"
    ]


def _far_above(state: TrainerState, loss: float) -> bool:
    if state.level is None or state.observed < FIRST_STEPS:
        return False
    return loss - state.level > max(DEVIATIONS * state.deviation, PART_OF_LEVEL * state.level)


def _number(value: float) -> float | None:
    """JSON has no name for what is not finite."""
    return value if math.isfinite(value) else None
