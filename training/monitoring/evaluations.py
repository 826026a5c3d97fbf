"""What an evaluation during training measures, and how it is recorded and told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topkapi.model.transformer import Decoder
from topkapi.training.data.windows import Batch
from topkapi.training.optimisation import distributed
from topkapi.training.optimisation.loss import Objective
from topkapi.training.optimisation.throughput import Pace
from topkapi.training.run.console import Console, duration
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.state import Standing


def measure(
    objective: Objective, model: Decoder, batches: list[Batch], micro_batch_size: int | None
) -> dict[str, float]:
    """What `objective` measures on `batches`, each process doing its share."""
    return distributed.averaged(lambda own: objective.evaluate(model, own, micro_batch_size), batches)


def tell(
    standing: Standing,
    measured: Mapping[str, float],
    epoch: float,
    *,
    best: bool,
    directory: RunDirectory,
    console: Console,
    pace: Pace | None,
) -> None:
    """Record and print the evaluation that `standing` has taken in; `measured` was found on the validation data,
    or on training data where there are none."""
    train, validation = standing.train_loss, standing.validation_loss
    directory.append(
        "metrics.jsonl",
        {
            "step": standing.step,
            "epoch": epoch,
            "tokens": standing.tokens,
            "train_loss": train,
            **{f"{'validation' if standing.held_out else 'train'}_{name}": value for name, value in measured.items()},
        },
    )
    rate = "" if pace is None else f"  {pace.tokens_per_s:,.0f} tokens/s  {duration(pace.elapsed)}"
    mark = "  *" if best else ""
    others = "".join(f"  {name} {value:.3f}" for name, value in measured.items() if name != "loss")
    held_out = f"  validation {validation:.3f}" if standing.held_out else ""
    console.message(f"step {standing.step}  epoch {epoch:.2f}  train {train:.3f}{held_out}{others}{mark}{rate}")
    if pace is None:
        return
    facts: dict[str, Any] = {"step": standing.step, "seconds": round(pace.elapsed, 3)}
    facts["tokens_per_s"] = round(pace.tokens_per_s, 1)
    if pace.utilisation is not None:
        facts["model_flops_utilisation"] = round(pace.utilisation, 4)
    directory.append("timings.jsonl", facts)
