"""Training runs as their directories tell of them, by the form that `training/run/directory.py` describes.

Whoever trains may write at any moment: a last line may be there by half, a file may be cut back to where a resumed run
goes on. Nothing is written here. What lies outside the directory of runs is not read, links followed, and sizes are
bounded.
"""

from __future__ import annotations

import json
import math
import os
import platform
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from topkapi.model.errors import TopkapiError
from topkapi.model.user_files import expanded

Kind = Literal["metrics", "timings", "system", "samples"]
KINDS: tuple[Kind, ...] = ("metrics", "timings", "system", "samples")
"""What a run records line by line, each in a file of that name that ends in `.jsonl`."""

MOST_RUNS = 500
"""Runs that are listed: the latest ones."""
MOST_CHECKPOINTS = 1000
PAGE_BYTES = 1 << 20
"""Bytes of a file that one answer reads."""
LARGEST_TEXT = 1 << 21
"""Bytes of a report or of settings; what is longer is not read."""
_FILES = ("config.yaml", "report.md", *(f"{kind}.jsonl" for kind in KINDS))
_TAIL = 1 << 16
_MARK = 64
# As `training/run/process.py` has it: what another host does can't be asked, and clocks are set.
_QUIET_SECONDS, _SAME_START_SECONDS = 120.0, 2.0


class UnknownRun(TopkapiError):
    """There is no such training run, or it has nothing of the kind."""

    status = 404
    kind = "unknown_run"


@dataclass(frozen=True)
class Page:
    """Some lines of a file: `records` as JSON, `next` where to go on, `more` whether there is more already.

    `restarted` says that the file is no longer what was read before, so that this begins anew; `skipped` lines were no
    JSON objects.
    """

    records: list[str]
    next: str
    more: bool
    restarted: bool
    skipped: int


class Runs:
    """The runs directly below `directory`, by their directories' names; it need not be there."""

    def __init__(self, directory: Path, model_directory: Path | None = None) -> None:
        self._directory = expanded(directory)
        self._models = None if model_directory is None else expanded(model_directory)
        # What was told of runs, with what their files were like then: whoever watches asks every few seconds.
        self._told: dict[str, tuple[object, dict[str, Any]]] = {}

    def names(self) -> list[str]:
        """The names of all runs, the one that was written to last first."""
        try:
            entries = [entry.name for entry in os.scandir(self._directory)]
        except OSError:
            # Nobody has trained here yet.
            return []
        found = [name for name in entries if is_name(name) and self._is_run(name)]
        return sorted(found, key=lambda name: (-self._updated(name), name))

    def summary(self, name: str) -> dict[str, Any]:
        """What a `RunSummary` says of a run. Raises `UnknownRun`."""
        self._check(name)
        now = [self._stat(name, each) for each in (*_FILES, os.path.join("best", "topkapi.json"))]
        files = [None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns) for found in now]
        seen, told = self._told.get(name, (None, {}))
        if seen != files:
            told = self._summary(name, self._settings(name))
            if len(self._told) >= MOST_RUNS:
                self._told.clear()
            self._told[name] = files, told
        # A process that is killed writes nothing.
        return told | {"state": self._state(name)}

    def details(self, name: str) -> dict[str, Any]:
        """What `RunDetails` say of a run. Raises `UnknownRun`."""
        self._check(name)
        settings = self._settings(name)
        sizes = {kind: found.st_size if (found := self._stat(name, f"{kind}.jsonl")) else 0 for kind in KINDS}
        return self._summary(name, settings) | {
            "settings": settings,
            "sizes": sizes,
            "report": self._stat(name, "report.md") is not None,
            "checkpoints": self._checkpoints(name),
        }

    def page(self, name: str, kind: Kind, after: str = "0", every: int = 1) -> Page:
        """Lines of a file from where `after`, the `next` of the page before, says; without one, from the beginning.

        Of lines about a single update only those are told whose step is a multiple of `every`. Raises `UnknownRun`.
        """
        self._check(name)
        with self._open(name, f"{kind}.jsonl") as file:
            if file is None:
                return Page([], "0", more=False, restarted=after not in ("0", ""), skipped=0)
            asked = int(after.partition("-")[0])
            start = asked if _mark(file, asked) == after else 0
            file.seek(start)
            chunk = file.read(PAGE_BYTES)
            # A line that is still being written is told once it is whole; one that fills a page is no record.
            length = chunk.rfind(b"\n") + 1 or (len(chunk) if len(chunk) == PAGE_BYTES else 0)
            records, skipped = [], 0
            for line in chunk[:length].split(b"\n"):
                record = _record(line)
                if record is None:
                    skipped += bool(line.strip())
                elif every == 1 or not _is_update(record) or record["step"] % every == 0:
                    records.append(json.dumps(record, allow_nan=False))
            end = start + length
            more = len(chunk) == PAGE_BYTES
            return Page(records, _mark(file, end), more, restarted=start != asked, skipped=skipped)

    def report(self, name: str) -> str:
        """The report of a finished run, Markdown. Raises `UnknownRun` while there is none."""
        self._check(name)
        text = self._text(name, "report.md")
        if text is None:
            hint = "a run writes one when it ends"
            raise UnknownRun(f"the run {name!r} has no report that can be shown", field="name", hint=hint)
        return text

    def _check(self, name: str) -> None:
        if not is_name(name) or not self._is_run(name):
            known = self.names()[:20]
            hint = f"runs: {', '.join(known)}" if known else "start the server with --runs-directory, where runs are"
            raise UnknownRun(f"there is no training run named {name[:200]!r}", field="name", hint=hint)

    def _is_run(self, name: str) -> bool:
        return self._stat(name, "config.yaml") is not None

    def _place(self, *parts: str) -> Path | None:
        """Where something of the directory lies, links followed; None for what lies outside."""
        try:
            root = os.path.realpath(self._directory)
            found = os.path.realpath(os.path.join(root, *parts))
        except (OSError, ValueError):
            return None
        return Path(found) if found.startswith(root.rstrip(os.sep) + os.sep) else None

    def _stat(self, *parts: str) -> os.stat_result | None:
        """What the system says of an ordinary file within the directory; None where there is none."""
        path = self._place(*parts)
        try:
            found = None if path is None else path.stat()
        except (OSError, ValueError):
            return None
        return found if found is not None and stat.S_ISREG(found.st_mode) else None

    @contextmanager
    def _open(self, *parts: str) -> Iterator[BinaryIO | None]:
        """An ordinary file within the directory; None where there is none that can be read."""
        path = self._place(*parts)
        if path is None or self._stat(*parts) is None:
            yield None
            return
        try:
            # Never waits, should a pipe have taken the file's place.
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb")
        except OSError:
            yield None
            return
        with file:
            yield file

    def _text(self, *parts: str) -> str | None:
        with self._open(*parts) as file:
            content = b"" if file is None else file.read(LARGEST_TEXT + 1)
        return None if file is None or len(content) > LARGEST_TEXT else content.decode("utf-8", "replace")

    def _object(self, *parts: str) -> dict[str, Any]:
        return _record((self._text(*parts) or "").encode()) or {}

    def _settings(self, name: str) -> dict[str, Any]:
        content = plain(_yaml(self._text(name, "config.yaml") or ""))
        return content if isinstance(content, dict) else {}

    def _updated(self, name: str) -> float:
        files = (self._stat(name, each) for each in _FILES)
        return max((found.st_mtime for found in files if found is not None), default=0.0)

    def _summary(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        latest = self._tail(name, "metrics")
        evaluated = next((each for each in latest if _number(each.get("epoch"))), {})
        step = next((each["step"] for each in latest if _is_update(each) or "train_loss" in each), 0)
        epoch_steps = evaluated["step"] / evaluated["epoch"] if evaluated.get("step") else None
        total, epochs = settings.get("max_steps"), settings.get("epochs")
        if not isinstance(total, int):
            known = epoch_steps is not None and _number(epochs)
            total = round(epochs * epoch_steps) if known and epochs is not None and epoch_steps is not None else None
        made = self._object(name, "best", "topkapi.json")
        return {
            "name": name,
            "state": self._state(name),
            "step": step,
            "total_steps": total,
            "steps_per_epoch": epoch_steps,
            "tokens": next((each["tokens"] for each in latest if isinstance(each.get("tokens"), int)), 0),
            "train_loss": _number(next((each["train_loss"] for each in latest if "train_loss" in each), None)),
            "validation_loss": _number(
                next((each["validation_loss"] for each in latest if "validation_loss" in each), None)
            ),
            "best_step": made["step"] if isinstance(made.get("step"), int) else None,
            "best_validation_loss": _number(made.get("validation_loss")),
            "tokens_per_s": _number(next((each.get("tokens_per_s") for each in self._tail(name, "timings")), None)),
            "updated": math.floor(self._updated(name)),
        }

    def _tail(self, name: str, kind: Kind) -> list[dict[str, Any]]:
        """The last lines of a file that have a step, the last one first."""
        with self._open(name, f"{kind}.jsonl") as file:
            if file is None:
                return []
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL))
            lines = file.read(_TAIL).split(b"\n")[:-1]
        found = (_record(line) for line in reversed(lines))
        return [record for record in found if record is not None and isinstance(record.get("step"), int)]

    def _state(self, name: str) -> Literal["running", "finished", "stopped"]:
        if self._is_training(name):
            return "running"
        return "stopped" if self._stat(name, "report.md") is None else "finished"

    def _is_training(self, name: str) -> bool:
        """Whether the process that noted in `.process.json` that it trains here still does."""
        note = self._object(name, ".process.json")
        process, started = note.get("pid"), note.get("started")
        if not isinstance(process, int) or process <= 0:
            return False
        if note.get("host") != platform.node():
            return time.time() - self._updated(name) < _QUIET_SECONDS
        try:
            import psutil  # type: ignore[import-untyped]
        except ImportError:
            return os.path.exists(f"/proc/{process}")
        try:
            found = psutil.Process(process)
            if found.status() == psutil.STATUS_ZOMBIE:
                return False
            return not _number(started) or abs(found.create_time() - started) < _SAME_START_SECONDS
        except (psutil.Error, OverflowError):
            return False

    def _checkpoints(self, name: str) -> list[dict[str, Any]]:
        """The checkpoints that the run kept, by step."""
        place = self._place(name, "checkpoints")
        try:
            entries = [] if place is None else [entry.name for entry in os.scandir(place)]
        except OSError:
            entries = []
        numbers = [entry.removeprefix("step-") for entry in entries if entry.startswith("step-")]
        steps = sorted(int(number) for number in numbers if number.isascii() and number.isdecimal())
        pointed = {pointer: self._place(name, pointer) for pointer in ("best", "last")}
        found = []
        for step in steps[-MOST_CHECKPOINTS:]:
            at = self._place(name, "checkpoints", f"step-{step}")
            if at is not None:
                marks: dict[str, Any] = {pointer: path == at for pointer, path in pointed.items()}
                found.append({"step": step, **marks, "path": self._path_for_loading(at)})
        return found

    def _path_for_loading(self, place: Path) -> str | None:
        """What `POST /models` calls a checkpoint; None where it lies outside the directory to load from."""
        if self._models is None:
            return None
        root = Path(os.path.realpath(self._models))
        return place.relative_to(root).as_posix() if place.is_relative_to(root) else None


def is_name(name: str) -> bool:
    """Whether a run can be called so: the name of a directory, and of none above or hidden."""
    return 0 < len(name) <= 255 and name.isprintable() and not name.startswith(".") and not set(name) & {"/", "\\"}


def plain(value: Any) -> Any:
    """A value of a settings file as JSON has it: what JSON has no word for as text, numbers that are none as null."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {plain(str(key)): plain(each) for key, each in value.items()}
    return (
        [plain(each) for each in value] if isinstance(value, list) else str(value).encode("utf-8", "replace").decode()
    )


def _yaml(text: str) -> Any:
    """What a settings file holds, null where that can't be told."""
    import yaml

    from topkapi.model.yaml_reading import parse_yaml

    try:
        return parse_yaml(text, references=False)
    except yaml.YAMLError:
        return None


def _mark(file: BinaryIO, offset: int) -> str:
    """A place in a file and what stands before it, so that it is known again, or known to be no more."""
    if offset == 0:
        return "0"
    file.seek(max(0, offset - _MARK))
    return f"{offset}-{zlib.crc32(file.read(min(offset, _MARK))):08x}"


def _record(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None where there is none. Numbers that JSON has no word for are null."""
    try:
        content = json.loads(line, parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _is_update(record: dict[str, Any]) -> bool:
    return "learning_rate" in record and isinstance(record.get("step"), int)


def _number(value: Any) -> float | None:
    """A number that is one, for comparing and computing; None otherwise."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
