"""What every run is made of, whatever it trains: a `Training`, put together and run here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.model.linear import set_compute_dtype
from topkapi.model.storage.checkpoint import save_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.training.data.shards import tokenizer_digest
from topkapi.training.data.windows import Loader
from topkapi.training.monitoring.samples import Prompt
from topkapi.training.optimisation import distributed, throughput
from topkapi.training.optimisation.device import prepare_torch
from topkapi.training.optimisation.lora import AdapterPlan
from topkapi.training.optimisation.loss import NextToken, Objective
from topkapi.training.optimisation.optimisers import Optimizers, Schedule, warmup_steps
from topkapi.training.recipes.recipe import TrainingRecipe, deciding_fields
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory, Saved
from topkapi.training.run.preflight import check_inputs
from topkapi.training.run.process import present
from topkapi.training.run.state import TrainerState
from topkapi.training.run.system import recorded
from topkapi.training.run.trackers import tracked
from topkapi.training.trainer import Training

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_run(recipe: TrainingRecipe, directory: RunDirectory, resume: bool) -> tuple[Saved | None, torch.device]:
    """The saved state to go on from, if there is one, and the device to compute on.

    Raises what is wrong with the recipe's inputs.
    """
    check_inputs(recipe)
    with distributed.in_turn():
        saved = directory.load_state() if resume else None
    return saved, prepare_torch(recipe, saved[1]["threads"] if saved else None)


def place(model: Decoder, recipe: TrainingRecipe, device: torch.device) -> None:
    """Bring the whole network to `device`, its products in the recipe's precision."""
    assert recipe.precision != "auto", "what the machine decides is settled before a run is made"
    model.to(device)
    set_compute_dtype(model, torch.bfloat16 if recipe.precision == "bf16" else None)


def assemble(
    recipe: TrainingRecipe,
    command: str,
    model: Decoder,
    *,
    directory: RunDirectory,
    console: Console,
    saved: Saved | None,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    generation: Mapping[str, Any],
    loader: Loader,
    validation: Loader | None,
    prompts: Sequence[Prompt],
    facts: Mapping[str, Any],
    objective: Objective | None = None,
    adapters: AdapterPlan | None = None,
) -> Training:
    """The run of `topkapi {command}` that trains the placed `model`, from the state `saved` where there is one.

    `generation` are the decoding defaults that the checkpoints inherit, `facts` what their `topkapi.json` says beside
    what every run says there. Raises `DataError` where the saved run had other data.
    """
    distributed.distribute(model, recipe.parallel)
    total = recipe.max_steps or max(1, math.ceil(recipe.epochs * loader.steps_per_epoch))
    inherited = recipe.generation_config(generation, model.config.end_token_ids)
    common: Any = {"tokenizer": tokenizer, "chat": chat, "generation": inherited}
    common["dtype"] = _DTYPES[recipe.checkpoint_dtype]
    write = adapters.save if adapters else save_checkpoint

    def save(path: Path, network: Decoder, details: Mapping[str, Any]) -> None:
        write(path, model=network, details=details, **common)

    training = Training(
        recipe=recipe,
        command=command,
        model=model,
        tokenizer=tokenizer,
        optimizers=Optimizers(
            model,
            name=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            muon_learning_rate=recipe.muon_learning_rate or recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(recipe.beta1, recipe.beta2),
            decay=recipe.decay,
        ),
        schedule=Schedule(
            recipe.schedule,
            total,
            warmup_steps(recipe.warmup, total),
            recipe.final_learning_rate,
            recipe.decay_fraction,
        ),
        loader=loader,
        train_batches=loader.first(recipe.evaluation_batches or 8),
        validation_batches=validation.first(recipe.evaluation_batches) if validation else [],
        held_out=validation.stream if validation else np.empty(0, np.uint32),
        prompts=prompts,
        directory=directory,
        console=console,
        save=save,
        facts={
            "made_by": f"topkapi {command}",
            "recipe": deciding_fields(recipe),
            "data": facts["data"],
            "tokenizer_sha256": tokenizer_digest(tokenizer),
            **facts,
        },
        evaluate_every=recipe.evaluate_every or max(1, total // 20),
        objective=objective or NextToken(),
    )
    if saved is not None:
        _resume(training, *saved)
    return training


def train(training: Training) -> TrainerState:
    """Run `training`, recording what the machine does and handing its numbers to a tracker, if one is wished.

    Raises as `Training.run` does, and `SettingsError` for a tracker that is not installed.
    """
    recipe, run = training.recipe, training.directory
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    peak = throughput.peak_flops(training.model.device, dtype)
    peak = None if peak is None else distributed.size() * peak
    if distributed.rank():
        return training.run(peak)
    if training.state.step == 0:
        # Whatever is recorded is the new run's, and a directory with records is a run's.
        run.begin()
    tell = partial(run.tell, "system.jsonl")
    system = recorded(run.path / "system.jsonl", training.console.message, tell=tell)
    tracker = nullcontext() if recipe.track is None else tracked(recipe, run, training.state.step)
    with present(run.path), tracker, system:
        return training.run(peak)


def _resume(training: Training, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Take over a saved state, once it is certain that the run would go on with the same data."""
    for name in ("data", "tokenizer_sha256", "parent"):
        if facts["run"].get(name) != training.facts.get(name):
            raise DataError(
                f"the {name.removesuffix('_sha256')} changed since the run in {training.directory.path} was started",
                field=name.removesuffix("_sha256"),
                hint="bring the earlier files back, or start another run with another --out",
            )
    training.load_state(tensors, facts)
    training.console.message(f"resumed at step {training.state.step} of {training.schedule.total_steps}")
