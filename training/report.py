"""What a finished run leaves to look at: curves as PNG and a short report with the command that serves it."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.console import Console
from training.run import RunDirectory
from training.standing import Standing


def finish(run: RunDirectory, standing: Standing, console: Console) -> None:
    """Write `plots/loss.png` and `report.md` and tell how the run went."""
    plot_losses(run.records("metrics.jsonl"), run.path / "plots" / "loss.png", standing)
    serve = f"topkapi serve {shlex.quote(str(run.path / 'best'))}"
    ending, verdict = standing.finished or "all steps done", standing.verdict()
    lines = [
        f"# {run.path.name}",
        "",
        f"{standing.step:,} steps, {standing.tokens:,} tokens: {ending}. {verdict[:1].upper()}{verdict[1:]}.",
        "",
        "![losses](plots/loss.png)",
        "",
        "| step | training | validation |",
        "|---:|---:|---:|",
        *(
            f"| {record['step']} | {record['train_loss']:.3f} | {record['validation_loss']:.3f} |"
            for record in run.records("metrics.jsonl")
            if "validation_loss" in record
        ),
        "",
        "## Samples",
        "",
        *_samples(run.records("samples.jsonl")),
        "## Serve it",
        "",
        "```",
        serve,
        "```",
        "",
    ]
    run.write("report.md", "\n".join(lines))
    console.message(f"{ending}: {verdict}")
    console.message(f"report: {run.path / 'report.md'}")
    console.message(f"serve it with: {serve}")


def _samples(records: list[dict[str, Any]]) -> list[str]:
    last = [record for record in records if record["step"] == records[-1]["step"]]
    lines = []
    for record in last:
        quoted = (record["prompt"] + " **|** " + record["text"]).replace("\n", "\n> ")
        lines += [f"> {quoted}", ""]
    return lines


def plot_losses(records: list[dict[str, Any]], path: Path, standing: Standing) -> None:
    """Training and validation loss against steps, with tokens seen on a second axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluations = [record for record in records if "validation_loss" in record]
    updates = [record for record in records if "loss" in record]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if updates:
        axes.plot(
            [record["step"] for record in updates],
            [record["loss"] for record in updates],
            color="tab:blue",
            alpha=0.25,
            linewidth=0.8,
            label="each step's batch",
        )
    if evaluations:
        steps = [record["step"] for record in evaluations]
        axes.plot(steps, [record["train_loss"] for record in evaluations], color="tab:blue", label="training")
        axes.plot(steps, [record["validation_loss"] for record in evaluations], color="tab:orange", label="validation")
    if standing.best_step is not None:
        axes.axvline(standing.best_step, color="grey", linestyle=":", label=f"best (step {standing.best_step})")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend()
    if standing.step:
        per_step = standing.tokens / standing.step
        tokens_of, steps_of = partial(np.multiply, per_step), partial(np.multiply, 1 / per_step)
        top = axes.secondary_xaxis("top", functions=(tokens_of, steps_of))
        top.set_xlabel("tokens seen")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
