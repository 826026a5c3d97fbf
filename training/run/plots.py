"""The curves of runs, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from topkapi.training.run.state import TrainerState

Records = Sequence[Mapping[str, Any]]


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


def draw_losses(records: Records, state: TrainerState) -> Any:
    """Training and validation loss against steps, with tokens seen on a second axis, and where the loss spiked."""
    evaluations = [record for record in records if "train_loss" in record]
    updates = [record for record in records if "loss" in record and "event" not in record]
    figure = _figure()
    axes = figure.add_subplot()
    if updates:
        steps, losses = _curve(updates, "loss")
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step's batch")
    if evaluations:
        axes.plot(*_curve(evaluations, "train_loss"), color="tab:blue", label="training")
    if state.held_out and evaluations:
        axes.plot(*_curve(evaluations, "validation_loss"), color="tab:orange", label="validation")
    if state.best_step is not None:
        axes.axvline(state.best_step, color="grey", linestyle=":", label=f"best (step {state.best_step})")
    spikes = [record["step"] for record in records if "event" in record]
    for number, step in enumerate(spikes):
        axes.axvline(step, color="tab:red", linewidth=0.8, label=None if number else "loss spike")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend()
    if state.step:
        per_step = state.tokens / state.step
        tokens_of, steps_of = partial(np.multiply, per_step), partial(np.multiply, 1 / per_step)
        top = axes.secondary_xaxis("top", functions=(tokens_of, steps_of))
        top.set_xlabel("tokens seen")
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


def draw_comparison(runs: Mapping[str, Records]) -> Any:
    """Validation losses of several runs, solid, and their training losses, dotted."""
    figure = _figure()
    axes = figure.add_subplot()
    for number, (name, records) in enumerate(runs.items()):
        evaluations = [record for record in records if "validation_loss" in record]
        color = f"C{number % 10}"
        axes.plot(*_curve(evaluations, "validation_loss"), color=color, label=name)
        axes.plot(*_curve(evaluations, "train_loss"), color=color, linestyle=":")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss: validation solid, training dotted")
    axes.grid(alpha=0.2)
    axes.legend()
    return figure


def _curve(records: Records, name: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[name] for record in records]
