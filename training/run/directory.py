"""The run directory: what a training run leaves behind, and all it needs to go on where it was killed.

    config.yaml  metrics.jsonl  samples.jsonl  timings.jsonl  system.jsonl  plots/*.png  report.md
    checkpoints/step-N   what is served          best, last -> checkpoints/step-N
    state/step-N         what only a resumed run needs
    run.json             the run's own id, and the trackers that know it
    .process.json        who trains, while someone does

Every directory is written whole or not at all. The two `.jsonl` files are cut back to the length that the state
recorded, so a resumed run continues them as if it had never been killed. `timings.jsonl` and `system.jsonl`
hold the wall clock and what the machine did, the things that differ.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from safetensors import SafetensorError

from topkapi.model.errors import CheckpointError, SettingsError
from topkapi.model.files import recover_directory, remove_directory, write_directory
from topkapi.training.recipes.recipe import TrainingRecipe, free_fields
from topkapi.training.run.process import Hold, training_process

if TYPE_CHECKING:
    from torch import Tensor

_RECORDS = ("metrics.jsonl", "samples.jsonl")
_CLOCKED = ("timings.jsonl", "system.jsonl")
_ELSEWHERE = "choose another --out, where this user may write"
# What is made before a run begins lies in here.
_PREPARED = ".prepared"


Saved = tuple[dict[str, "Tensor"], dict[str, Any]]
"""Tensors and facts of a state."""


class RunDirectory:
    """One run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # What a new run is told, until it begins, and the directories that were made for it.
        self._recipe: TrainingRecipe | None = None
        self._made: list[Path] = []
        self._begun = False
        self._held: Hold | None = None
        # Called with the name of the file and the record for every line that is appended.
        self.listeners: list[Callable[[str, Mapping[str, Any]], None]] = []
        # How far each file of records went before it was cut back: the last step, and the names in its records.
        self.reached: dict[str, tuple[int, frozenset[str]]] = {}

    def check_free(self, recipe: TrainingRecipe) -> None:
        """Refuse a directory that holds a run, unless told to overwrite it, or anything else."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.glob("[!.]*"))):
            return
        if not (self.path / "config.yaml").is_file():
            raise SettingsError(f"{self.path} is there and is not a run", field="out", hint="choose another --out")
        self.check_idle()
        # A run that ended before its first evaluation, say by a mistake in a flag, has nothing to lose.
        if (self.path / "metrics.jsonl").exists() and not recipe.overwrite:
            raise SettingsError(
                f"{self.path} already holds a run",
                field="out",
                hint="continue it with --resume, replace it with --overwrite, or choose another --out",
            )
        for name in ("checkpoint", "tokenizer"):
            source = getattr(recipe, name, None)
            if source and Path(source).resolve().is_relative_to(self.path.resolve()):
                raise SettingsError(
                    f"the {name} {source} is part of the run that --overwrite would delete",
                    field="overwrite",
                    hint="choose another --out",
                )

    def start(self, recipe: TrainingRecipe) -> None:
        """Make the directory for a new run and hold it; refuses as `check_free` does, and one that another process
        holds.

        A run that is there stays as it is until `begin`, once nothing can be refused any more.
        """
        self.check_free(recipe)
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
            # Another run may have come and gone until it was held.
            self.check_free(recipe)
            shutil.rmtree(self.path / _PREPARED, ignore_errors=True)
        except OSError as error:
            raise SettingsError(f"{self.path} cannot be made: {error.strerror}", field="out", hint=_ELSEWHERE) from None
        self._made, self._recipe = made, recipe

    def hold(self) -> None:
        """Keep every other process from training here until `release`, or until this one ends, however it does.

        Raises `SettingsError` where another one does so already.
        """
        if self._held is None:
            self._held = Hold(self.path)

    def release(self) -> None:
        """Let others train here."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def prepared(self, name: str) -> Path:
        """Where a part of the run is written: apart, as long as the run has not begun."""
        return self.path / name if self._recipe is None else self.path / _PREPARED / name

    def begin(self) -> None:
        """Let the new run take the place of whatever was there; in one that was killed before it saved anything,
        forget what it did. Does nothing the second time."""
        if self._begun:
            return
        self._begun = True
        if self._recipe is None:
            self._note_reached()
            self._forget_records()
            return
        recipe, self._recipe = self._recipe, None
        self._clear()
        # First of all, for a directory without it is no run; what is moved after it can be made again.
        self._write_recipe(recipe)
        self.identity()
        for path in (self.path / _PREPARED).glob("*"):
            path.rename(self.path / path.name)
        shutil.rmtree(self.path / _PREPARED, ignore_errors=True)

    def _write_recipe(self, recipe: TrainingRecipe) -> None:
        self.write("config.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def abandon(self) -> None:
        """Leave nothing of a new run that was refused before it began."""
        if self._recipe is None:
            return
        shutil.rmtree(self.path if self.path in self._made else self.path / _PREPARED, ignore_errors=True)
        for path in self._made[1:]:
            try:
                path.rmdir()
            except OSError:
                # Something else was put there meanwhile.
                return

    def check_idle(self) -> None:
        """Refuse a run that a process is training at this moment."""
        if found := training_process(self.path):
            raise SettingsError(
                f"{self.path} is being trained by {found}", field="out", hint="wait for it, or end it with Ctrl-C first"
            )

    def config(self) -> dict[str, Any]:
        """The recipe of the run that is here."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise SettingsError(f"there is no run in {self.path}", field="resume", hint="leave out --resume")
        config: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        return config

    def check_compatible(self, recipe: TrainingRecipe) -> set[str]:
        """Refuse to resume with a recipe that would have led elsewhere. The settings by which it goes on longer, or
        less long, than the run was to."""
        before = type(recipe).model_validate(self.config())
        length = {"max_steps", "epochs"} if before.is_open_ended() and recipe.is_open_ended() else set()
        for name in type(recipe).model_fields.keys() - free_fields(type(recipe)) - length:
            old, new = getattr(before, name), getattr(recipe, name)
            if old != new:
                raise SettingsError(
                    f"the run in {self.path} was started with {name} = {old!r}, not {new!r}: it cannot be resumed so",
                    field=name,
                    hint=f"leave out --{name.replace('_', '-')}, or start another run with another --out",
                )
        return {name for name in length if getattr(before, name) != getattr(recipe, name)}

    def check_unchanged(self, recipe: TrainingRecipe) -> None:
        """Refuse as `check_compatible` does; a recipe that only goes on longer is the run's from now on."""
        if self.check_compatible(recipe):
            self._write_recipe(recipe)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`, `samples.jsonl` or `timings.jsonl`."""
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _cannot_write(self.path / name, error) from error
        self.tell(name, record)

    def tell(self, name: str, record: Mapping[str, Any]) -> None:
        """Let the listeners know of a line that was added to the file `name`."""
        for listener in self.listeners:
            listener(name, record)

    def identity(self) -> str:
        """The random id of the run, which no other has, whatever it is called and wherever it lies."""
        return str(self._known()["id"])

    def trackers(self) -> list[str]:
        """The trackers that know the run."""
        return list(self._known()["trackers"])

    def note_tracker(self, name: str) -> None:
        """Remember that the tracker `name` knows the run."""
        if name not in self.trackers():
            self.write("run.json", json.dumps({"id": self.identity(), "trackers": [*self.trackers(), name]}) + "\n")

    def _known(self) -> dict[str, Any]:
        """What `run.json` says; a run that has none gets an id."""
        path = self.path / "run.json"
        if not path.is_file():
            self.write(path.name, json.dumps({"id": uuid.uuid4().hex, "trackers": []}) + "\n")
        facts: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return facts

    def records(self, name: str) -> list[dict[str, Any]]:
        """The lines of a `.jsonl` file."""
        path = self.path / name
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] if path.is_file() else []

    def point(self, name: str, step: int) -> None:
        """Let `best` or `last` point at the checkpoint of `step`, atomically."""
        link = self.path / name
        temporary = self.path / f".{name}.new"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("checkpoints") / f"step-{step}")
        temporary.replace(link)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.path / "checkpoints" / f"step-{step}"

    def lengths(self) -> dict[str, int]:
        """How long the record files are at this moment."""
        return {name: path.stat().st_size if (path := self.path / name).exists() else 0 for name in _RECORDS}

    def save_state(
        self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], lengths: Mapping[str, int]
    ) -> None:
        """Write all that a resumed run needs, with the `lengths` that the record files had at that step."""
        from safetensors.torch import save_file

        for name in _RECORDS:
            if (self.path / name).exists():
                _flush(self.path / name)
        with write_directory(self._state(step)) as partial:
            try:
                save_file(dict(tensors), partial / "tensors.safetensors")
            except SafetensorError as error:
                raise OSError(None, str(error)) from error
            content = {**facts, "lengths": dict(lengths)}
            (partial / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def load_state(self, step: int | None = None) -> Saved | None:
        """The state of `step` (None: the latest), with the record files cut back to it; None where there is none."""
        from safetensors.torch import load_file

        self._recover()
        steps = [one for one in self.steps("state") if step is None or one == step]
        if not steps:
            return None
        directory = self._state(steps[-1])
        try:
            facts = json.loads((directory / "state.json").read_text("utf-8"))
            tensors = load_file(directory / "tensors.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{directory} cannot be read: {error}", hint="start another run") from None
        self._note_reached()
        self._cut_back(facts.pop("lengths"))
        return tensors, facts

    def _recover(self) -> None:
        """Finish or undo what a killed process was about to do."""
        for leftover in [*self.path.glob("checkpoints/.*.previous"), *self.path.glob("state/.*.previous")]:
            recover_directory(leftover.with_name(leftover.name.removeprefix(".").removesuffix(".previous")))
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in [*self.path.glob("checkpoints/.*"), *self.path.glob("state/.*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _cut_back(self, lengths: Mapping[str, int]) -> None:
        for name, length in lengths.items():
            path = self.path / name
            if (path.stat().st_size if path.exists() else 0) < length:
                raise CheckpointError(f"{path} is shorter than the saved state says", hint="start another run")
            if path.exists():
                os.truncate(path, length)

    def _note_reached(self) -> None:
        for name in (*_RECORDS, "timings.jsonl") if not self.reached else ():
            self.reached[name] = _reached(self.path / name)

    def _forget_records(self) -> None:
        for name in (*_RECORDS, *_CLOCKED):
            (self.path / name).unlink(missing_ok=True)

    def prune(self, kept: Iterable[int], last: int, keep: int, states: Iterable[int | None]) -> None:
        """Delete all checkpoints but `kept` and the `keep` latest ones up to `last`, and all states but `states`."""
        latest = [step for step in self.steps("checkpoints") if step <= last][-keep:]
        for step in set(self.steps("checkpoints")) - {*kept, *latest}:
            remove_directory(self.checkpoint(step))
        for step in set(self.steps("state")) - set(states):
            remove_directory(self._state(step))

    def steps(self, folder: Literal["checkpoints", "state"]) -> list[int]:
        """The steps of what lies in `folder`."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.path / folder).glob("step-*"))

    def _state(self, step: int) -> Path:
        return self.path / "state" / f"step-{step}"

    def _clear(self) -> None:
        for name in ("checkpoints", "state", "plots", "tokenizer", "reference", "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (*_RECORDS, *_CLOCKED, "run.json", ".own-card", "report.md", "report.html", "best", "last"):
            (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, content: str) -> None:
        """Write a small file whole or not at all."""
        temporary = self.path / f".{name}.new"
        try:
            temporary.write_text(content, encoding="utf-8")
            _flush(temporary)
            temporary.replace(self.path / name)
        except OSError as error:
            raise _cannot_write(self.path / name, error) from error


class FollowedRun(RunDirectory):
    """A run's files as a process sees them that only reads, while the first of several writes them."""

    def start(self, recipe: TrainingRecipe) -> None:
        """Know that the run has not begun."""
        self._recipe = recipe

    def begin(self) -> None:
        """Know that it has."""
        self._recipe = None

    def abandon(self) -> None:
        """The first process does it, as all that follows."""

    def check_idle(self) -> None: ...

    def hold(self) -> None: ...

    def append(self, name: str, record: Mapping[str, Any]) -> None: ...

    def point(self, name: str, step: int) -> None: ...

    def prune(self, kept: Iterable[int], last: int, keep: int, states: Iterable[int | None]) -> None: ...

    def _write_recipe(self, recipe: TrainingRecipe) -> None: ...

    def _recover(self) -> None: ...

    def _cut_back(self, lengths: Mapping[str, int]) -> None: ...


def _reached(path: Path) -> tuple[int, frozenset[str]]:
    """The last step in a file of records, whose last line may be cut off, and the names in the records of that step."""
    last, names = -1, set[str]()
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, LookupError, TypeError):
            continue
        last, names = max(last, step), names if step <= last else set()
        names |= set(record) if step == last else set()
    return last, frozenset(names)


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"could not write {path}: {error.strerror or error}",
        hint="free disk space, then continue with --resume",
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
