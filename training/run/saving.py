"""When a run saves, what it keeps, and the thread that writes while training goes on."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from topkapi.model.transformer import Decoder
from topkapi.training.run.directory import RunDirectory

Save = Callable[[Path, Decoder, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Snapshot:
    """A moment of a run, whole; nothing in it changes any more.

    `best` are the steps of the best checkpoints, best first. `tensors` and `facts` are what only a resumed run needs
    (None: not to be written), `lengths` those of the record files; `anchor` is another step whose state stays.
    """

    step: int
    model: Decoder
    details: Mapping[str, Any]
    best: list[int]
    tensors: dict[str, Tensor] | None
    facts: Mapping[str, Any]
    lengths: Mapping[str, int]
    anchor: int | None = None


@dataclass
class Saver:
    """Decides when a run saves, and writes its snapshots, one at a time.

    It saves every `every` updates and every `also` ones (None: never) and when `minutes` have passed since the last
    save (None: never). The `keep` latest checkpoints stay beside the best. With `asynchronous` a thread writes; what
    goes wrong there is raised by the next call here. `save(path, model, details)` writes a checkpoint, of whose step
    `saved` is told.
    """

    directory: RunDirectory
    save: Save
    every: int | None
    minutes: float | None
    keep: int
    asynchronous: bool
    also: int | None = None
    saved: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self, step: int) -> bool:
        """Whether to save at `step` for resuming."""
        if any(every is not None and step % every == 0 for every in (self.every, self.also)):
            return True
        return self.minutes is not None and time.monotonic() - self._last >= 60 * self.minutes

    def copied(self, model: Decoder, tensors: Mapping[str, Tensor]) -> tuple[Decoder, dict[str, Tensor]]:
        """What a snapshot is made of: with a thread that writes, copies that training does not touch."""
        if not self.asynchronous:
            return model, dict(tensors)
        # A frozen parameter never changes, so the copy may share it.
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        twin = copy.deepcopy(model, dict(frozen))
        own = {name: parameter.detach() for name, parameter in twin.named_parameters()}
        return twin, {
            name: own[name.removeprefix("model:")] if name.startswith("model:") else tensor.clone()
            for name, tensor in tensors.items()
        }

    def write(self, snapshot: Snapshot) -> None:
        """Write `snapshot`, here or in the thread, once the one before it is written.

        Raises `CheckpointError` when that one, or here this one, cannot be written.
        """
        self.wait()
        if snapshot.tensors is not None:
            self._last = time.monotonic()
        if not self.asynchronous:
            self._write(snapshot)
            return
        self._thread = threading.Thread(target=self._try, args=(snapshot,), name="save")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread, if it has come to its end."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when everything is written; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        directory, step = self.directory, snapshot.step
        self.save(directory.checkpoint(step), snapshot.model, snapshot.details)
        if step in snapshot.best:
            directory.point("best", snapshot.best[0])
        if self.saved is not None:
            self.saved(step)
        if snapshot.tensors is None:
            return
        directory.point("last", step)
        tensors = {name: tensor.cpu() for name, tensor in snapshot.tensors.items()}
        directory.save_state(step, tensors, snapshot.facts, snapshot.lengths)
        directory.prune({*snapshot.best, step}, step, self.keep, {step, snapshot.anchor})
