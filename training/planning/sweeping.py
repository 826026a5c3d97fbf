"""`topkapi sweep`: runs whose settings optuna chooses within given ranges, ranked by what they reached.

    OUT/trial-N/     each run, as any other
    OUT/sweep.yaml   what is varied, and by what the runs are ranked
    OUT/sweep.md     the ranking

A trial's run is all that is known of it, so a sweep that was stopped goes on where it was: the runs that are there are
told to the search again, and one that did not end is resumed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from topkapi.model.errors import SettingsError, TopkapiError
from topkapi.model.yaml_reading import parse_yaml
from topkapi.training.recipes.arguments import (
    EPILOG,
    RUNS,
    add_recipe_flags,
    build_recipe,
    read_arguments,
    read_yaml,
    resolve_recipe,
    run_of,
)
from topkapi.training.recipes.recipe import TrainingRecipe, free_fields
from topkapi.training.start import train

_FILE, _TABLE = "sweep.yaml", "sweep.md"
_HIGHER_IS_BETTER = ("validation_accuracy", "validation_margin")
# A range over so many times its lower end is searched by its logarithm.
_LOGARITHMIC = 10


@dataclass(frozen=True)
class Range:
    """What a field may be: one of `choices`, or from `low` to `high`."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    @classmethod
    def of(cls, entry: str, kind: type[TrainingRecipe]) -> Range:
        """`learning_rate=1e-4..1e-2` or `batch_size=8,16`. Raises `SettingsError` for what is neither."""
        name, _, values = entry.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if name not in kind.model_fields or not values:
            raise SettingsError(
                f"{entry!r} varies no field of the recipe", field="vary", hint="for example learning_rate=1e-4..1e-2"
            )
        if name in free_fields(kind):
            raise SettingsError(f"{name} does not change what is learned", field="vary", hint="vary another field")
        low, dots, high = values.partition("..")
        if not dots:
            try:
                return cls(name, tuple(_value(each) for each in values.split(",")))
            except yaml.YAMLError:
                hint = "for example batch_size=8,16"
                raise SettingsError(f"a value of {name} in {values!r} is none", field="vary", hint=hint) from None
        first, last = _number(low), _number(high)
        if first is None or last is None or not first < last:
            raise SettingsError(
                f"the range of {name} must be two numbers, the lower first, not {values!r}", field="vary",
                hint="for example learning_rate=1e-4..1e-2",
            )  # fmt: skip
        return cls(name, low=first, high=last, whole="int" in str(kind.model_fields[name].annotation))

    def distribution(self, optuna: Any) -> Any:
        """What optuna chooses from."""
        log = self.low > 0 and self.high >= _LOGARITHMIC * self.low
        if self.choices:
            return optuna.distributions.CategoricalDistribution(list(self.choices))
        if self.whole:
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), log=log)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=log)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _value(text: str) -> Any:
    """A value as a recipe has it; YAML takes `1e-3` for a word."""
    value = parse_yaml(text)
    number = _number(text) if isinstance(value, str) else None
    return value if number is None else number


def add_sweep(subparsers: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = subparsers.add_parser(
        "sweep",
        help="search for better settings of a run",
        description="Train a run for each of several settings, which optuna chooses within the ranges that --vary "
        "names by what the runs before reached, and rank them. The same command again goes on with a sweep.",
        epilog=EPILOG,
    )
    command.add_argument("recipe", nargs="?", help="recipe file (.yaml) or the name of an included one")
    command.add_argument(
        "--vary", nargs="+", required=True, metavar="FIELD=RANGE", help="learning_rate=1e-4..1e-2 batch_size=8,16"
    )
    command.add_argument("--trials", type=int, default=10, metavar="N", help="runs in all [10]")
    command.add_argument(
        "--run", choices=tuple(RUNS), help="the command that the runs are of (default: told by the settings)"
    )
    command.add_argument("--json", action="store_true", help="print the ranking as JSON")
    add_recipe_flags(command, *(kind for kind, _ in RUNS.values()))
    command.set_defaults(handler=_sweep, resume=None)


def _sweep(arguments: argparse.Namespace) -> int:
    if arguments.trials < 1:
        raise SettingsError("--trials must be at least 1", field="trials")
    fields = {} if arguments.recipe is None else read_yaml(resolve_recipe(arguments.recipe))
    run, _ = run_of(arguments, fields)
    kind = RUNS[run][0]
    arguments.training_kind, arguments.training_command = kind, run
    recipe, directory, _ = read_arguments(arguments)
    ranges = [Range.of(entry, kind) for entry in arguments.vary]
    if twice := next((each.name for each in ranges if each.name in vars(arguments)), None):
        raise SettingsError(f"{twice} is varied, and given as well", field=twice, hint="leave one of them out")
    if recipe.push is not None:
        raise SettingsError("a sweep pushes nothing", field="push", hint="push the best run's checkpoint afterwards")
    folder = directory if recipe.out else directory.with_name(f"{directory.name}-sweep")
    optuna = _optuna()
    _begin(folder, recipe, ranges)
    study = optuna.create_study(direction="maximize" if recipe.best_metric in _HIGHER_IS_BETTER else "minimize")
    space = {each.name: each.distribution(optuna) for each in ranges}
    for number in range(arguments.trials):
        place = folder / f"trial-{number}"
        value, settings = _known(place, recipe.best_metric), _settings(place, ranges)
        if value is None:
            if settings is None:
                # What is tried hangs on the seed and the runs before alone, wherever the sweep was stopped.
                study.sampler = optuna.samplers.TPESampler(seed=recipe.seed + number)
                asked = study.ask(space)
                settings = {each.name: asked.params[each.name] for each in ranges}
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
            words = ", ".join(f"{name} {_shown(each)}" for name, each in settings.items())
            print(f"trial {number}: {words}", flush=True)
            value = _tried(recipe, kind, place, settings)
        assert settings is not None, "a run that ended has its settings"
        finite = value is not None and math.isfinite(value)
        state = optuna.trial.TrialState.COMPLETE if finite else optuna.trial.TrialState.FAIL
        known = {"params": dict(settings), "distributions": space, "value": value if finite else None, "state": state}
        study.add_trial(optuna.trial.create_trial(**known))
    ranking = ranked(folder, ranges, recipe.best_metric)
    (folder / _TABLE).write_text(_markdown(ranking, ranges, recipe.best_metric), encoding="utf-8")
    if arguments.json:
        print(json.dumps(ranking, indent=2))
        return 0
    for line in _lines(ranking, ranges, recipe.best_metric):
        print("  ".join(line).rstrip())
    print(f"the ranking: {folder / _TABLE}")
    return 0


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SettingsError("a sweep needs optuna", field="vary", hint="pip install 'topkapi[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _begin(folder: Path, recipe: TrainingRecipe, ranges: Sequence[Range]) -> None:
    """Note what is searched, or refuse a folder that holds another sweep, or something else."""
    facts = {
        "vary": {each.name: list(each.choices) or [each.low, each.high] for each in ranges},
        "recipe": recipe.model_dump(mode="json", exclude={"out", "overwrite"}),
    }
    path = folder / _FILE
    if path.is_file():
        if yaml.safe_load(path.read_text("utf-8")) != json.loads(json.dumps(facts)):
            raise SettingsError(
                f"{folder} holds another sweep", field="out", hint="give the same settings, or choose another --out"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} is there and is no sweep", field="out", hint="choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(facts)), sort_keys=False), encoding="utf-8")


def _tried(
    recipe: TrainingRecipe, kind: type[TrainingRecipe], place: Path, settings: Mapping[str, Any]
) -> float | None:
    """Train a run with these settings; what it reached, None where its loss diverged or they don't go together."""
    fields = recipe.model_dump() | dict(settings) | {"out": str(place), "overwrite": False}
    going_on = (place / "config.yaml").is_file()
    try:
        train(build_recipe(kind, fields, "the sweep"), place, going_on)
    except TopkapiError as error:
        if error.kind != "diverged":
            raise
        place.mkdir(parents=True, exist_ok=True)
        (place / "diverged").write_text(f"{error.message}\n", encoding="utf-8")
        print(f"  {error.message}", flush=True)
    return _known(place, recipe.best_metric)


def _known(place: Path, metric: str) -> float | None:
    """What an ended run reached: its best checkpoint's figure; infinity where it diverged, None for one to train."""
    if (place / "diverged").is_file():
        return -math.inf if metric in _HIGHER_IS_BETTER else math.inf
    if not (place / "report.md").is_file():
        return None
    from topkapi.training.run.directory import RunDirectory

    records = RunDirectory(place).records("metrics.jsonl")
    values = [record[metric] for record in records if record.get(metric) is not None and record["step"]]
    if metric == "smoothed_loss":
        raise SettingsError("a sweep can't rank by smoothed_loss", field="best_metric", hint="choose train_loss")
    return (max if metric in _HIGHER_IS_BETTER else min)(values, default=math.inf)


def _settings(place: Path, ranges: Sequence[Range]) -> dict[str, Any] | None:
    path = place / "config.yaml"
    if not path.is_file():
        return None
    config = yaml.safe_load(path.read_text("utf-8"))
    return {each.name: config[each.name] for each in ranges}


def ranked(folder: Path, ranges: Sequence[Range], metric: str) -> list[dict[str, Any]]:
    """The runs of a sweep that ended, best first, each with its settings and its figure (None: it diverged)."""
    found = []
    for place in folder.glob("trial-*"):
        value, settings = _known(place, metric), _settings(place, ranges)
        if value is not None and settings is not None:
            found.append({"run": str(place), **settings, metric: value if math.isfinite(value) else None})
    sign = -1 if metric in _HIGHER_IS_BETTER else 1
    number = {each["run"]: int(each["run"].rpartition("-")[2]) for each in found}
    return sorted(found, key=lambda each: (each[metric] is None, sign * (each[metric] or 0), number[each["run"]]))


def _lines(ranking: Sequence[Mapping[str, Any]], ranges: Sequence[Range], metric: str) -> list[list[str]]:
    names = [each.name for each in ranges]
    rows = [["run", *names, metric]]
    for each in ranking:
        rows.append(
            [
                each["run"],
                *(_shown(each[name]) for name in names),
                "diverged" if each[metric] is None else f"{each[metric]:.4f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _markdown(ranking: Sequence[Mapping[str, Any]], ranges: Sequence[Range], metric: str) -> str:
    heading, *rows = _lines(ranking, ranges, metric)
    lines = [heading, ["---"] * len(heading), *rows]
    return "# Sweep\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
