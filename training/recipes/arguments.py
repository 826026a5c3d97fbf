"""What the training commands are told: a recipe, flags over it, a run to go on with."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, get_args

from topkapi.model.errors import SettingsError
from topkapi.model.flags import add_flags, declared, flag_of
from topkapi.training.recipes.files import build_recipe, read_yaml, resolve_recipe
from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, KtoRecipe, PretrainRecipe, TrainingRecipe

RUNS: dict[str, tuple[type[TrainingRecipe], str]] = {
    "pretrain": (PretrainRecipe, "train a model from random weights on plain text"),
    "finetune": (FinetuneRecipe, "train a checkpoint on instructions or conversations"),
    "dpo": (DpoRecipe, "train a checkpoint to prefer some answers to others"),
    "kto": (KtoRecipe, "train a checkpoint on answers labelled good or bad"),
}
EPILOG = "Flags override the recipe; give a recipe before flags that take several values."


def add_recipe_flags(parser: argparse.ArgumentParser, *kinds: type[TrainingRecipe]) -> None:
    """One flag per field of the `kinds`, grouped; what is given stays text, which the recipe reads."""
    add_flags(parser, declared({name: field for kind in reversed(kinds) for name, field in kind.model_fields.items()}))


def run_of(arguments: argparse.Namespace, fields: dict[str, Any]) -> tuple[str, str | None]:
    """The command that a plan is for; and which setting alone told so, where the checkpoint would have told another.

    Raises `SettingsError` for settings that no one command takes.
    """
    names = {run: kind.model_fields.keys() for run, (kind, _) in RUNS.items()}
    named = (fields.keys() | vars(arguments).keys()) & ({name for each in names.values() for name in each} - {"recipe"})
    # What pretrain goes on from is a checkpoint too, but that is the rarer wish.
    likely = sorted(RUNS, key="pretrain".__eq__) if "checkpoint" in named else list(RUNS)
    run = arguments.run or min(likely, key=lambda each: len(named - names[each]))
    if wrong := sorted(named - names[run]):
        others = {name for each in names.values() if wrong[0] in each for name in each}
        apart = "" if arguments.run else min(map(flag_of, named - others), default="")
        raise SettingsError(
            f"{flag_of(wrong[0])} does not apply to {run}",
            field=wrong[0],
            hint=f"leave it out, or {apart}: no command takes both" if apart else "leave it out",
        )
    if arguments.run or run == likely[0]:
        return run, None
    told = min(map(flag_of, named - names[likely[0]]))
    return run, f"{told} made this a plan for {run}: leave it out for one for {likely[0]}"


def _given_flags(namespace: argparse.Namespace, kind: type[TrainingRecipe]) -> dict[str, Any]:
    """The recipe fields that were given as flags; `none` clears an optional one."""
    given = {name: value for name, value in vars(namespace).items() if name in kind.model_fields}
    for name, value in given.items():
        if value == "none" and type(None) in get_args(kind.model_fields[name].annotation):
            given[name] = None
    return given


def read_arguments(arguments: argparse.Namespace) -> tuple[TrainingRecipe, Path, bool]:
    """The recipe (flags over YAML over defaults), the run directory, and whether to resume.

    A resumed run that is named by its directory takes its own `config.yaml` for the recipe.
    """
    from topkapi.training.data.weights import split_weight

    kind: type[TrainingRecipe] = arguments.training_kind
    flags = _given_flags(arguments, kind)
    resume = arguments.resume is not None
    fields: dict[str, Any] = {}
    source, stem = "config.yaml", None
    if arguments.recipe is not None:
        path = resolve_recipe(arguments.recipe)
        fields, source, stem = read_yaml(path), path.name, path.stem
        command = _command_of(fields)
        if not fields.keys() <= kind.model_fields.keys() and command is not None:
            raise SettingsError(
                f"{path.name} is a recipe for {command}, not for {arguments.training_command}",
                field="recipe",
                hint=f"train it with: topkapi {command} {arguments.recipe}",
            )
    if resume:
        _check_resume_flags(arguments.resume, flags)
    if arguments.resume:
        flags["out"] = arguments.resume
        if not (Path(arguments.resume) / "config.yaml").is_file():
            raise SettingsError(
                f"there is no training run in {arguments.resume}",
                field="resume",
                hint="name the run's directory, the one with config.yaml in it",
            )
    named = flags.get("out", fields.get("out"))
    if resume and named and (Path(named) / "config.yaml").is_file():
        before = read_yaml(Path(named) / "config.yaml") | {"overwrite": False}
        command = _command_of(before)
        if command not in (None, arguments.training_command):
            raise SettingsError(
                f"{named} is a run of {command}, not of {arguments.training_command}",
                field="resume",
                hint=f"continue it with: topkapi {command} --resume {shlex.quote(str(named))}",
            )
        fields = before if arguments.recipe is None else fields
        if (fields | flags).get("precision") == "auto":
            # Settled when the run began.
            fields, flags = fields | {"precision": before["precision"]}, flags | {"precision": before["precision"]}
    recipe = build_recipe(kind, fields | flags, source, flags)
    if stem is None:
        stem = Path(split_weight(recipe.data[0])[0]).name.split(".")[0] if recipe.data else arguments.training_command
    directory = Path(recipe.out) if recipe.out else Path("runs") / (stem or arguments.training_command)
    return recipe, directory, resume


def _check_resume_flags(run: str, flags: dict[str, Any]) -> None:
    """Refuse what would be ignored: a resumed run stays where it is, and as it is."""
    if run and "out" in flags and Path(flags["out"]) != Path(run):
        raise SettingsError(
            f"--resume {run} goes on in {run}, so --out does not apply",
            field="out",
            hint="leave out --out, or begin another run there without --resume",
        )
    if flags.get("overwrite"):
        raise SettingsError(
            "--resume and --overwrite exclude each other", field="overwrite", hint="leave one of them out"
        )


def _command_of(fields: dict[str, Any]) -> str | None:
    """The command that a complete recipe is one of; None where it has fields that none of them has."""
    return next((name for name, (kind, _) in RUNS.items() if fields.keys() <= kind.model_fields.keys()), None)
