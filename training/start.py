"""A run from its recipe: made ready, trained, reported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from topkapi.model.hub.names import meant
from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, KtoRecipe, PretrainRecipe, TrainingRecipe

if TYPE_CHECKING:
    from topkapi.training.run.console import Console
    from topkapi.training.run.directory import RunDirectory
    from topkapi.training.trainer import Training


def train(recipe: TrainingRecipe, directory: Path, resume: bool) -> None:
    """Train what `read_arguments` found, from what can be refused at once to the report. Raises `TopkapiError`."""
    recipe = at_hand(recipe)
    # Threads that wait for each other by spinning take the cores from whatever else runs on the machine, and then from
    # one another: with the cores shared, steps took three times as long. Must be set before torch starts its threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from topkapi.training.run.preflight import alone, check_run

    if alone():
        check_run(recipe, directory, resume)
    from topkapi.training.optimisation.distributed import joined

    with joined(recipe):
        _train_together(recipe, directory, resume)


def at_hand(recipe: TrainingRecipe) -> TrainingRecipe:
    """The recipe with the path of its checkpoint where it names a model of the hub, which is downloaded if need be.

    The run notes where it lies: what it starts from stays the same when the hub has a newer one.
    """
    checkpoint = getattr(recipe, "checkpoint", None)
    if checkpoint is None or meant(checkpoint) is None:
        return recipe
    from topkapi.model.hub.resolve import local_path

    return recipe.model_copy(update={"checkpoint": os.fspath(local_path(checkpoint))})


def _train_together(recipe: TrainingRecipe, directory: Path, resume: bool) -> None:
    """Train, with the other processes where there are some, of which only the first writes."""
    from topkapi.training.assembly import train
    from topkapi.training.optimisation.distributed import in_turn, rank, size
    from topkapi.training.run.console import Console
    from topkapi.training.run.directory import FollowedRun, RunDirectory
    from topkapi.training.run.hub import Pusher, check_push, push
    from topkapi.training.run.precision import settled
    from topkapi.training.run.preflight import alone
    from topkapi.training.run.report import finish

    if recipe.push is not None and not alone():
        check_push(recipe.push)
    console = Console()
    run = FollowedRun(directory) if rank() else RunDirectory(directory)
    goes_on = resume and (directory / "config.yaml").is_file()
    recipe = recipe if goes_on else settled(recipe, console)
    with in_turn():
        if goes_on:
            run.check_idle()
            run.hold()
            run.check_unchanged(recipe)
        else:
            run.start(recipe)
    if recipe.parallel is not None and size() == 1:
        console.message(f"one process has nothing to share by {recipe.parallel}: torchrun starts several")
    try:
        training = prepared(recipe, resume, run, console)
        pusher = Pusher(run, recipe.push, recipe.push_every, console) if recipe.push and recipe.push_every else None
        if pusher is not None and not rank():
            training.saver.also, training.saver.saved = recipe.push_every, pusher
        try:
            state = train(training)
        finally:
            if pusher is not None:
                pusher.finish()
        if not rank():
            finish(run, state, console)
            if recipe.push:
                push(directory, recipe.push, console)
    finally:
        run.abandon()
        run.release()


def prepared(recipe: TrainingRecipe, resume: bool, run: RunDirectory, console: Console) -> Training:
    """The run that the recipe describes, ready to train."""
    if isinstance(recipe, PretrainRecipe):
        from topkapi.training.pretrain import pretrain

        return pretrain(recipe, run, resume=resume, console=console)
    if isinstance(recipe, DpoRecipe):
        from topkapi.training.tuning.dpo import dpo

        return dpo(recipe, run, resume=resume, console=console)
    if isinstance(recipe, KtoRecipe):
        from topkapi.training.tuning.kto import kto

        return kto(recipe, run, resume=resume, console=console)
    from topkapi.training.tuning.finetune import finetune

    assert isinstance(recipe, FinetuneRecipe), "there are no other recipes"
    return finetune(recipe, run, resume=resume, console=console)
