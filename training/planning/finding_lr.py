"""`topkapi find-lr`: which learning rate a run can take, from a few real steps at rising ones (Smith 2017).

The rate rises by the same factor from step to step until the smoothed loss stands far above the best. Where the loss
fell fastest per factor is a good peak for a run; where it was lowest is already too much.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkapi.model.errors import SettingsError
from topkapi.training.recipes.arguments import (
    EPILOG,
    RUNS,
    add_recipe_flags,
    read_arguments,
    read_yaml,
    resolve_recipe,
    run_of,
)
from topkapi.training.start import at_hand, prepared

if TYPE_CHECKING:
    from topkapi.training.trainer import Training

# The losses are smoothed as much as a tenth of the steps can be.
_SMOOTHING = 0.1
# The trial ends where the smoothed loss stands so far above the lowest: this part of what it had fallen, or of itself.
_ABOVE, _ABOVE_PART = 0.5, 0.05


@dataclass(frozen=True)
class Point:
    """A step of the trial."""

    learning_rate: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class Found:
    """Learning rates: where the smoothed loss fell fastest, where it was lowest, and where it rose (None: nowhere)."""

    points: list[Point]
    steepest: float
    lowest: float
    rises: float | None


class _Enough(Exception):
    """The trial has seen enough."""


def add_find_lr(subparsers: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = subparsers.add_parser(
        "find-lr",
        help="find the learning rate that a run can take",
        description="Take a few real steps at learning rates that rise, and say where the loss fell fastest and where "
        "it rose. Takes the recipe and the flags that the run will be given; nothing of the trial is kept.",
        epilog=EPILOG,
    )
    command.add_argument("recipe", nargs="?", help="recipe file (.yaml) or the name of an included one")
    command.add_argument("--lowest", type=float, default=1e-6, metavar="X", help="the first learning rate [1e-6]")
    command.add_argument("--highest", type=float, default=1.0, metavar="X", help="the last one [1]")
    command.add_argument("--steps", type=int, default=100, metavar="N", help="steps between them, at most [100]")
    command.add_argument("--plot", type=Path, metavar="PNG", help="where to draw the losses")
    command.add_argument("--json", action="store_true", help="print as JSON")
    command.add_argument(
        "--run", choices=tuple(RUNS), help="the command that the run is for (default: told by the settings)"
    )
    add_recipe_flags(command, *(kind for kind, _ in RUNS.values()))
    command.set_defaults(handler=_find, resume=None)


def _find(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.lowest < arguments.highest:
        raise SettingsError("--lowest must be above 0 and below --highest", field="lowest")
    if arguments.steps < 10:
        raise SettingsError("--steps must be at least 10", field="steps", hint="100 make a smooth curve")
    fields = {} if arguments.recipe is None else read_yaml(resolve_recipe(arguments.recipe))
    run, _ = run_of(arguments, fields)
    arguments.training_kind, arguments.training_command = RUNS[run][0], "find-lr"
    recipe, _, _ = read_arguments(arguments)
    for name in ("learning_rate", "schedule", "max_steps", "warmup"):
        if name in vars(arguments):
            raise SettingsError(f"--{name.replace('_', '-')} is what is tried here", field=name, hint="leave it out")
    changes: dict[str, Any] = {
        "learning_rate": arguments.highest,
        "muon_learning_rate": None,
        "sample_every": "never",
        "on_divergence": "stop",
        **dict.fromkeys(("track", "push", "save_every", "save_minutes")),
    }
    recipe = at_hand(recipe).model_copy(update=changes)
    from topkapi.training.planning.measuring import Silent
    from topkapi.training.run.console import Console
    from topkapi.training.run.directory import RunDirectory
    from topkapi.training.run.precision import settled
    from topkapi.training.run.preflight import check_inputs

    check_inputs(recipe)
    console = Silent() if arguments.json else Console()
    recipe = settled(recipe, console)
    with tempfile.TemporaryDirectory(prefix="topkapi-find-lr-") as folder:
        directory = RunDirectory(Path(folder) / "run")
        directory.start(recipe)
        found = find(prepared(recipe, False, directory, console), arguments.lowest, arguments.highest, arguments.steps)
    if arguments.plot is not None:
        from topkapi.training.run.plots import draw_rates, save

        save(
            draw_rates([(each.learning_rate, each.loss, each.smoothed) for each in found.points], found.steepest),
            arguments.plot,
        )
    if arguments.json:
        points = [vars(each) for each in found.points]
        print(json.dumps({**vars(found), "points": points}, indent=2))
        return 0
    print(f"the loss fell fastest at {found.steepest:.1e} and was lowest at {found.lowest:.1e}", end="")
    print(", and never rose" if found.rises is None else f"; from {found.rises:.1e} on it rose")
    print(f"a good peak: --learning-rate {found.steepest:.1e}")
    return 0


def find(training: Training, lowest: float, highest: float, steps: int) -> Found:
    """Try `training` out, whose recipe's learning rate is `highest` and which is spoilt for any other use.

    Raises `SettingsError` where the loss never falls.
    """
    from topkapi.training.monitoring.divergence import Diverged
    from topkapi.training.optimisation.optimisers import Rising
    from topkapi.training.planning.measuring import Silent

    points: list[Point] = []
    decay = 1 - 1 / (_SMOOTHING * steps)
    level = weight = 0.0

    def listen(file: str, record: Mapping[str, Any]) -> None:
        nonlocal level, weight
        if "learning_rate" not in record:
            return
        level, weight = decay * level + record["loss"], decay * weight + 1
        points.append(Point(record["learning_rate"], record["loss"], level / weight))
        best = min(each.smoothed for each in points)
        bound = max(_ABOVE * (points[0].smoothed - best), _ABOVE_PART * best)
        if len(points) > _SMOOTHING * steps and points[-1].smoothed > best + bound:
            raise _Enough

    training.directory.listeners.append(listen)
    small = [next(iter(training.loader.batch(0).split(1)))]
    trial = replace(
        training,
        schedule=Rising("constant", steps, low=lowest / highest),
        console=Silent(),
        train_batches=small,
        validation_batches=small,
        evaluate_every=steps + 1,
    )
    try:
        trial.run()
    except (_Enough, Diverged):
        pass
    return judged(points)


def judged(points: list[Point]) -> Found:
    """What the steps of a trial say. Raises `SettingsError` where the loss never falls."""
    if len(points) < 3 or min(each.smoothed for each in points) >= points[0].smoothed:
        raise SettingsError(
            "the loss fell at none of these learning rates", field="lowest", hint="give lower ones, or more --steps"
        )
    lowest = min(range(len(points)), key=lambda at: points[at].smoothed)
    # Slopes over a few steps, by the logarithm of the rate; what comes after the lowest is no fall.
    reach = max(1, len(points) // 20)
    slopes = {
        at: (points[min(at + reach, lowest)].smoothed - points[max(0, at - reach)].smoothed)
        / math.log(points[min(at + reach, lowest)].learning_rate / points[max(0, at - reach)].learning_rate)
        for at in range(1, lowest)
    }
    steepest = min(slopes, key=lambda at: slopes[at]) if slopes else lowest
    after = points[lowest:]
    rises = next((each.learning_rate for each in after if each.smoothed > after[0].smoothed * (1 + _ABOVE_PART)), None)
    return Found(points, points[steepest].learning_rate, points[lowest].learning_rate, rises)
