"""What the training commands are told: a recipe, flags over it, a run to go on with; read, and checked field by field.

Settings that do not go together, or that would do nothing, are refused by name before anything is begun.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from topkapi.model.errors import SettingsError
from topkapi.model.flags import add_flags, declared, flag_of
from topkapi.model.nearest import nearest
from topkapi.model.user_files import LONGEST_SETTINGS, read_file, what_it_is
from topkapi.model.wrong_values import told
from topkapi.model.yaml_reading import parse_yaml
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


RECIPES = Path(__file__).parent
R = TypeVar("R", bound=TrainingRecipe)


def resolve_recipe(name: str) -> Path:
    """A YAML file, or the name of one that comes with Topkapi."""
    path = Path(name)
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        raise SettingsError(
            f"{name} is not a recipe, which is a .yaml file",
            field="recipe",
            hint=f"if it is what to train on, give it as data: --data {name}",
        )
    if path.is_file():
        return path
    if other := what_it_is(path):
        raise SettingsError(f"the recipe {name} {other}", field="recipe", hint="name a .yaml file")
    included = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if included.is_file():
        return included
    names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    near = nearest(name, names)
    hint = f"did you mean {near}?" if near else f"give a .yaml file or one of: {', '.join(names)}"
    if name in ("pretrain", "finetune", "dpo", "kto"):
        hint = f"that is a kind of run: --run {name}"
    raise SettingsError(f"there is no recipe {name}", field="recipe", hint=hint)


_LINES = "for example: learning_rate: 0.001 in one line, batch_size: 16 in the next"


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a recipe file."""
    try:
        content = parse_yaml(read_file(path, LONGEST_SETTINGS, field="recipe", kind=SettingsError).decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise SettingsError(f"the recipe {path} cannot be read: {reason}", field="recipe", hint=_LINES) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"the recipe {path} must be a list of 'field: value' lines", field="recipe", hint=_LINES)
    return content


def build_recipe(kind: type[R], fields: dict[str, Any], source: str, flags: Iterable[str] = ()) -> R:
    """Check `fields`; `SettingsError` names the first one at fault and says what it may be.

    Those in `flags` were given on the command line, the others come from `source`.
    """
    try:
        recipe = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise unknown_field(source, name, kind) from None
        called = flag_of(name) if name in flags else f"{source}: '{name}'"
        raise SettingsError(
            told(called, first, kind.model_fields[name] if len(first["loc"]) == 1 else None),
            field=name,
            hint=kind.model_fields[name].description,
        ) from None
    check_together(recipe, set(flags))
    return recipe


def unknown_field(source: str, name: str, kind: type[TrainingRecipe]) -> SettingsError:
    """The error for what `source` says and no field of the recipe is, with the nearest one that is."""
    near = nearest(name, kind.model_fields)
    return SettingsError(
        f"{source}: unknown field {name!r}",
        field=name,
        hint=f"did you mean {near!r}?" if near else f"fields: {', '.join(sorted(kind.model_fields))}",
    )


def check_together(recipe: Any, flags: Collection[str]) -> None:
    """Raise `SettingsError` for settings of `recipe` that contradict one another.

    Of those that merely do nothing, the ones in `flags` are refused, which were given on the command line: a recipe
    file may hold them for another day.
    """

    def refuse(message: str, field: str, hint: str) -> None:
        raise SettingsError(message, field=field, hint=hint)

    if recipe.optimizer == "schedule-free":
        if recipe.schedule != "constant":
            refuse(
                "the schedule-free optimizer averages weights instead of lowering its learning rate: --schedule "
                f"{recipe.schedule} does not go with it",
                "schedule",
                "add --schedule constant; --warmup still counts",
            )
        if recipe.beta1 == 0:
            refuse(
                "the schedule-free optimizer takes gradients between its average and its latest weights: --beta1 0 "
                "leaves no average",
                "beta1",
                "give a --beta1 above 0",
            )
    preferring = recipe.best_metric in ("validation_accuracy", "validation_margin") and not hasattr(recipe, "beta")
    unsampled = recipe.best_metric == "copied_from_training" and recipe.sample_every == "never"
    if preferring or unsampled:
        hint = (
            "only dpo and kto measure it"
            if preferring
            else "without samples it is not measured: leave out --sample-every"
        )
        refuse(f"this run does not measure {recipe.best_metric}", "best_metric", hint)
    if getattr(recipe, "split", None) == "random" and (recipe.train_examples is not None or recipe.test_examples):
        name = "train_examples" if recipe.train_examples is not None else "test_examples"
        refuse(
            f"{name} counts examples in the order of the file, and --split random mixes them",
            name,
            "add --split file_order",
        )
    for name, other, wanted in (
        ("muon_learning_rate", "optimizer", "muon"),
        ("decay_fraction", "schedule", "wsd"),
    ):
        if name in flags and getattr(recipe, name) is not None and getattr(recipe, other) != wanted:
            refuse(f"{name} does nothing without --{other} {wanted}", name, f"leave it out, or add --{other} {wanted}")
    for name in ("track_project", "track_name"):
        if name in flags and getattr(recipe, name) is not None and recipe.track is None:
            refuse(f"{name} does nothing without --track", name, "leave it out, or add --track trackio, say")
    if "push_every" in flags and recipe.push_every is not None and recipe.push is None:
        refuse("push_every does nothing without --push", "push_every", "leave it out, or add --push OWNER/NAME")
    if "final_learning_rate" in flags and recipe.schedule == "constant":
        refuse("final_learning_rate does nothing with --schedule constant", "final_learning_rate", "leave it out")
    micro = recipe.micro_batch_size
    if "micro_batch_size" in flags and micro is not None and micro > recipe.batch_size:
        refuse(
            f"a micro_batch_size of {micro} is more than the batch_size of {recipe.batch_size}",
            "micro_batch_size",
            "it is the part of a batch that is computed at once: give less, or leave it out",
        )
