"""Where else a run's numbers go: trackio, Weights & Biases, TensorBoard. Each is a few lines over its library.

All are told the same: every number of the records with its step, what the machine does, the samples of a step as a
table, and at the end a table of the evaluations. A run is known by the random id in its directory, whatever it is
called, and one that is resumed goes on where its tracker is: steps that are taken again are not told again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from topkapi.model.errors import SettingsError
from topkapi.training.recipes.recipe import TrainingRecipe
from topkapi.training.run.directory import RunDirectory

Rows = Sequence[Mapping[str, Any]]
_ID_SHOWN = 6


@dataclass(frozen=True)
class Told:
    """What a tracker is told at the start: where the run belongs, and its settings.

    `first` is the first step that it was not told yet; one that can take back what it knows forgets the later ones.
    """

    project: str
    name: str
    identity: str
    config: Mapping[str, Any]
    run: RunDirectory
    first: int


class Tracker(Protocol):
    """A run as a tracker's library has it."""

    takes_back: bool
    """Whether it forgets the steps from `Told.first` on, which are then told again."""

    def forget(self, first: int) -> bool:
        """Take back what was told of the steps from `first` on; whether it can."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""

    def table(self, name: str, rows: Rows, step: int) -> None:
        """Rows of the same fields."""

    def system(self, numbers: Mapping[str, float], step: int) -> None:
        """What the machine does while the run is at `step`."""

    def finish(self) -> None:
        """Nothing more will come."""


@contextmanager
def tracked(recipe: TrainingRecipe, run: RunDirectory, first: int = 0) -> Iterator[None]:
    """Within the block, hand every number that is recorded in `run`, which goes on after step `first`, to the tracker
    that the recipe names.

    The run is called as its directory and stands in the project of the folder around it, unless the recipe says
    otherwise. Raises `SettingsError` where the library is missing.
    """
    name = recipe.track
    assert name is not None, "asked for where there is one"
    directory = run.path.resolve()
    again = name in run.trackers()
    told = Told(
        project=recipe.track_project or directory.parent.name or "topkapi",
        name=recipe.track_name or directory.name,
        identity=run.identity(),
        config=recipe.model_dump(mode="json"),
        run=run,
        first=first + 1 if again else 0,
    )
    try:
        tracker = _TRACKERS[name](told)
    except ImportError:
        raise SettingsError(f"{name} is not installed", field="track", hint=f"pip install {name}") from None
    except Exception as error:  # whatever its library raises: a name that it refuses, a server that isn't there
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(
            f"{name} takes no run: {reason}",
            field="track",
            hint="see --track-project and --track-name, or leave out --track",
        ) from None
    run.note_tracker(name)
    listener = _Listener(tracker, run.reached if again and not tracker.takes_back else {})
    run.listeners.append(listener)
    try:
        yield
    finally:
        run.listeners.remove(listener)
        listener.end([record for record in run.records("metrics.jsonl") if "train_loss" in record])
        tracker.finish()


class _Listener:
    """Hands on the records of a run that a tracker does not know yet: after `reached`, for each file the last step
    that it was told and the names of its numbers."""

    def __init__(self, tracker: Tracker, reached: Mapping[str, tuple[int, frozenset[str]]]) -> None:
        self._tracker, self._reached = tracker, dict(reached)
        self._step = max((0, *(step for step, _ in reached.values())))
        self._updated = -1
        self._samples: list[Mapping[str, Any]] = []
        # What the machine does is told by a thread of its own.
        self._lock = threading.Lock()

    def __call__(self, file: str, record: Mapping[str, Any]) -> None:
        with self._lock:
            if file == "system.jsonl":
                numbers = _numbers("system", {name: value for name, value in record.items() if name != "time"})
                self._tracker.system(numbers, self._step)
                return
            if self._is_known(file, record):
                return
            if "learning_rate" in record:
                if record["step"] <= self._updated and not self._forget(record["step"]):
                    return
                self._updated = record["step"]
            if file == "samples.jsonl":
                self._samples.append(record)
                return
            step = record["step"]
            if step != self._step:
                self._flush()
            self._step = max(self._step, step)
            numbers = _numbers("", {name: value for name, value in record.items() if name != "step"})
            if "event" not in record and numbers:
                self._tracker.log(numbers, step)

    def end(self, evaluations: Rows) -> None:
        """Tell the samples that are left, and of all evaluations together."""
        with self._lock:
            self._flush()
            if evaluations:
                self._tracker.table("evaluations", evaluations, self._step)

    def _is_known(self, file: str, record: Mapping[str, Any]) -> bool:
        step, names = self._reached.get(file, (-1, frozenset()))
        return record["step"] < step or (record["step"] == step and record.keys() <= names)

    def _forget(self, first: int) -> bool:
        """The run has returned to an earlier step, and takes the steps from `first` on another way."""
        if self._tracker.forget(first):
            self._samples, self._step = [], first
            return True
        known = (self._updated + 1, frozenset[str]())
        self._reached = dict.fromkeys(("metrics.jsonl", "samples.jsonl", "timings.jsonl"), known)
        return False

    def _flush(self) -> None:
        rows, self._samples = self._samples, []
        if rows:
            self._tracker.table("samples", rows, rows[0]["step"])


def _numbers(prefix: str, record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a record, those in lists and objects under names like `system/gpus/0/use_percent`."""
    found: dict[str, float] = {}
    for name, value in record.items():
        place = f"{prefix}/{name}" if prefix else name
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[place] = float(value)
        elif isinstance(value, list):
            found |= _numbers(place, {str(number): each for number, each in enumerate(value)})
        elif isinstance(value, Mapping):
            found |= _numbers(place, value)
    return found


def _cells(rows: Rows) -> tuple[list[str], list[list[Any]]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, [[row.get(name) for name in names] for row in rows]


class _OneWay:
    """What trackio and W&B have in common: an interface, and that no step can be taken back."""

    takes_back = False
    _library: Any
    _run: Any

    def forget(self, first: int) -> bool:
        return False

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def table(self, name: str, rows: Rows, step: int) -> None:
        columns, cells = _cells(rows)
        self._run.log({name: self._library.Table(columns=columns, data=cells)}, step=step)


class _Trackio(_OneWay):
    def __init__(self, told: Told) -> None:
        import trackio

        # It finds the run that it is to go on with by its name.
        name = f"{told.name}-{told.identity[:_ID_SHOWN]}"
        self._library = trackio
        self._run = trackio.init(
            project=told.project, name=name, config=dict(told.config), resume="allow", embed=False,
            auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip

    def system(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log_system({name.removeprefix("system/"): value for name, value in numbers.items()})

    def finish(self) -> None:
        self._library.finish()


class _Wandb(_OneWay):
    def __init__(self, told: Told) -> None:
        import wandb

        self._library = wandb
        self._run = wandb.init(
            project=told.project, name=told.name, id=told.identity, config=dict(told.config), dir=told.run.path,
            resume="allow",
        )  # fmt: skip

    def system(self, numbers: Mapping[str, float], step: int) -> None:
        # Beside what it measures itself, so that all trackers have the same.
        self._run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self._run.finish()


class _Tensorboard:
    takes_back = True

    def __init__(self, told: Told) -> None:
        self._directory = str(told.run.path / "tensorboard")
        self._writer = self._opened(told.first)
        lines = [f"    {key}: {value}" for key, value in told.config.items()]
        self._writer.add_text("config", "\n".join(lines), told.first)

    def _opened(self, first: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._directory, purge_step=first or None)

    def forget(self, first: int) -> bool:
        self._writer.close()
        self._writer = self._opened(first)
        return True

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def table(self, name: str, rows: Rows, step: int) -> None:
        columns, cells = _cells(rows)
        lines = [columns, ["---"] * len(columns), *cells]
        self._writer.add_text(name, "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines), step)

    def system(self, numbers: Mapping[str, float], step: int) -> None:
        self.log(numbers, step)

    def finish(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


_TRACKERS: dict[str, Callable[[Told], Tracker]] = {
    "trackio": _Trackio,
    "wandb": _Wandb,
    "tensorboard": _Tensorboard,
}
