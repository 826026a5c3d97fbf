"""The curves of runs, drawn by matplotlib, and the step down that the training loss takes where an epoch ends: what is
seen again is partly known by heart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from topkapi.training.run.state import TrainerState

Records = Sequence[Mapping[str, Any]]
# The ends of more epochs would cover the curves.
_MOST_ENDS = 50
# The running mean forgets a loss within a hundred steps or so, as that which spikes are told by.
_DECAY = 0.97


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write `figure` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def smoothed(losses: Sequence[float], decay: float = _DECAY) -> list[float]:
    """The running mean of `losses`, each earlier one counting `decay` times as much as the next."""
    level, weight, found = 0.0, 0.0, []
    for loss in losses:
        level, weight = decay * level + (1 - decay) * loss, decay * weight + (1 - decay)
        found.append(level / weight)
    return found


def draw_losses(records: Records, state: TrainerState) -> Any:
    """Training and validation loss against steps, with epochs and tokens seen on further axes and perplexity beside the
    loss; the loss of each batch and its running mean; where epochs ended, where the loss spiked and where it stepped
    down."""
    evaluations = [record for record in records if "train_loss" in record]
    updates = [record for record in records if "loss" in record and "event" not in record]
    figure = _figure()
    axes = figure.add_subplot()
    if updates:
        steps, losses = _curve(updates, "loss")
        axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.8, label="each step's batch")
        axes.plot(steps, smoothed(losses), color="tab:cyan", linewidth=1.2, label="smoothed")
    if evaluations:
        axes.plot(*_curve(evaluations, "train_loss"), color="tab:blue", label="training")
    if state.held_out and evaluations:
        axes.plot(*_curve(evaluations, "validation_loss"), color="tab:orange", label="validation")
    if state.best_step is not None:
        axes.axvline(state.best_step, color="grey", linestyle=":", label=f"best (step {state.best_step})")
    ends = boundaries(records)
    for number, step in enumerate(ends if len(ends) <= _MOST_ENDS else []):
        axes.axvline(step, color="tab:green", linewidth=0.7, alpha=0.6, label=None if number else "end of an epoch")
    for number, down in enumerate(steps_down(records)):
        label = None if number else "memorising: a step down"
        axes.plot(down.step, down.loss, marker="v", color="tab:purple", linestyle="", label=label)
    spikes = [record["step"] for record in records if "event" in record]
    for number, step in enumerate(spikes):
        axes.axvline(step, color="tab:red", linewidth=0.8, label=None if number else "loss spike")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend()
    _add_perplexity(axes)
    if state.step:
        _add_scale(axes, state.tokens / state.step, "tokens seen", 1.0)
        if per_epoch := steps_per_epoch(records):
            _add_scale(axes, 1 / per_epoch, "epochs", 1.14)
    return figure


def _add_scale(axes: Any, per_step: float, name: str, height: float) -> None:
    """Another scale for the steps, above the axes."""
    functions = partial(np.multiply, per_step), partial(np.multiply, 1 / per_step)
    axes.secondary_xaxis(height, functions=functions).set_xlabel(name)


def _add_perplexity(axes: Any) -> None:
    """Perplexities, e to the loss, at the right."""
    low, high = axes.get_ylim()
    ticks = [digit * 10**power for power in range(6) for digit in (1, 2, 5) if low <= np.log(digit * 10**power) <= high]
    right = axes.secondary_yaxis("right")
    right.set_yticks(np.log(ticks) if ticks else [], [f"{tick:,}" for tick in ticks])
    right.set_ylabel("perplexity")


def draw_machine(system: Records, timings: Records) -> Any:
    """How busy processor and GPUs were, over time; and by steps the tokens a second and the part of the machine's peak
    that they are."""
    figure = _figure()
    upper, lower = figure.subplots(2)
    start = system[0]["time"] if system else 0.0
    minutes = [(record["time"] - start) / 60 for record in system]
    if system:
        upper.plot(minutes, [record["cpu_percent"] for record in system], label="all processors")
    for number in range(min((len(record.get("gpus", [])) for record in system), default=0)):
        uses = [record["gpus"][number]["use_percent"] for record in system]
        upper.plot(minutes, [np.nan if use is None else use for use in uses], label=f"GPU {number}")
    upper.set(xlabel="minutes", ylabel="use (%)", ylim=(0, 105))
    if system:
        upper.legend()
    lower.plot(*_curve(timings, "tokens_per_s"), color="tab:blue")
    lower.set(xlabel="steps", ylabel="tokens a second", ylim=(0, None))
    known = [record for record in timings if "model_flops_utilisation" in record]
    if known:
        steps, shares = _curve(known, "model_flops_utilisation")
        right = lower.twinx()
        right.plot(steps, [100 * share for share in shares], color="tab:orange")
        right.set(ylabel="MFU (%)", ylim=(0, 105))
    for axes in (upper, lower):
        axes.grid(alpha=0.2)
    return figure


def draw_rates(points: Sequence[tuple[float, float, float]], chosen: float) -> Any:
    """Losses, and smoothed ones, against learning rates, with the `chosen` one."""
    figure = _figure()
    axes = figure.add_subplot()
    rates, losses, levels = zip(*points, strict=True)
    axes.plot(rates, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step's batch")
    axes.plot(rates, levels, color="tab:blue", label="smoothed")
    axes.axvline(chosen, color="grey", linestyle=":", label=f"fell fastest ({chosen:.1e})")
    low, first = min(levels), levels[0]
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="loss",
        ylim=(low - 0.1 * (first - low), first + 0.5 * (first - low)),
    )
    axes.grid(alpha=0.2)
    axes.legend()
    return figure


def draw_schedule(records: Records) -> Any:
    """Learning rate and gradient norm against steps."""
    updates = [record for record in records if "learning_rate" in record]
    figure = _figure()
    upper, lower = figure.subplots(2, sharex=True)
    for axes, name in ((upper, "learning_rate"), (lower, "gradient_norm")):
        axes.plot(*_curve(updates, name), linewidth=0.9)
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(alpha=0.2)
    lower.set_xlabel("steps")
    return figure


def draw_comparison(runs: Mapping[str, Records], by: str = "steps") -> Any:
    """Validation losses of several runs, solid, and their training losses, dotted, `by` steps, epochs or tokens."""
    field = {"steps": "step", "epochs": "epoch", "tokens": "tokens"}[by]
    figure = _figure()
    axes = figure.add_subplot()
    for number, (name, records) in enumerate(runs.items()):
        evaluations = [record for record in records if "validation_loss" in record]
        color = f"C{number % 10}"
        axes.plot(*_curve(evaluations, "validation_loss", field), color=color, label=name)
        axes.plot(*_curve(evaluations, "train_loss", field), color=color, linestyle=":")
    axes.set_xlabel("tokens seen" if by == "tokens" else by)
    axes.set_ylabel("loss: validation solid, training dotted")
    axes.grid(alpha=0.2)
    axes.legend()
    return figure


def _curve(records: Records, name: str, by: str = "step") -> tuple[list[float], list[float]]:
    return [record[by] for record in records], [record[name] for record in records]


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
