"""What an evaluation during training measures, and how it is recorded and told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topkapi.model.transformer import Decoder
from topkapi.training.data.windows import Batch
from topkapi.training.optimisation import distributed
from topkapi.training.optimisation.loss import Objective
from topkapi.training.optimisation.throughput import Throughput
from topkapi.training.run.console import Console, duration
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.state import TrainerState


def measure(
    objective: Objective, model: Decoder, batches: list[Batch], micro_batch_size: int | None
) -> dict[str, float]:
    """What `objective` measures on `batches`, each process doing its share."""
    return distributed.averaged(lambda own: objective.evaluate(model, own, micro_batch_size), batches)


def tell(
    state: TrainerState,
    measured: Mapping[str, float],
    epoch: float,
    *,
    best: bool,
    directory: RunDirectory,
    console: Console,
    throughput: Throughput | None,
) -> None:
    """Record and print the evaluation that `state` has taken in; `measured` was found on the validation data,
    or on training data where there are none."""
    train, validation = state.train_loss, state.validation_loss
    directory.append(
        "metrics.jsonl",
        {
            "step": state.step,
            "epoch": epoch,
            "tokens": state.tokens,
            "train_loss": train,
            **{f"{'validation' if state.held_out else 'train'}_{name}": value for name, value in measured.items()},
        },
    )
    rate = "" if throughput is None else f"  {throughput.tokens_per_s:,.0f} tokens/s  {duration(throughput.elapsed)}"
    mark = "  *" if best else ""
    others = "".join(f"  {name} {value:.3f}" for name, value in measured.items() if name != "loss")
    held_out = f"  validation {validation:.3f}" if state.held_out else ""
    console.message(f"step {state.step}  epoch {epoch:.2f}  train {train:.3f}{held_out}{others}{mark}{rate}")
    if throughput is None:
        return
    facts: dict[str, Any] = {"step": state.step, "seconds": round(throughput.elapsed, 3)}
    facts["tokens_per_s"] = round(throughput.tokens_per_s, 1)
    if throughput.utilisation is not None:
        facts["model_flops_utilisation"] = round(throughput.utilisation, 4)
    directory.append("timings.jsonl", facts)
