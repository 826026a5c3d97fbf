"""The loaded checkpoints, each with an engine of its own, and how they are found."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model.checkpoint import Checkpoint, load_checkpoint
from model.errors import SettingsError, UnknownModel
from model.packing import pack
from service.engine.engine import Engine
from service.metrics import Metrics, ModelMetrics
from service.settings import DtypeName, Settings

DTYPES: dict[DtypeName, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory, the engine that computes it, and its metrics."""

    name: str
    checkpoint: Checkpoint
    engine: Engine
    metrics: ModelMetrics
    created: int
    control_ids: frozenset[int]

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together: the checkpoint's, or fewer where memory is short."""
        return self.engine.config.context_length

    @property
    def dtype(self) -> str:
        """What the matrices are held in."""
        return self.checkpoint.model.held_in

    def token_text(self, token_id: int) -> str:
        """The bytes of one token as text; a part of a character shows as U+FFFD."""
        return self.checkpoint.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def answer_bytes(self, token_id: int) -> bytes:
        """What a generated token adds to the answer's text: nothing for control tokens."""
        return b"" if token_id in self.control_ids else self.checkpoint.tokenizer.token_bytes(token_id)


class Models:
    """The checkpoints a process serves, by name, the default one first."""

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics()
        self.settings = settings
        self._models: dict[str, LoadedModel] = {}

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    @property
    def names(self) -> list[str]:
        """The names of the loaded checkpoints."""
        return list(self._models)

    def load(self, location: str) -> LoadedModel:
        """Load `PATH` or `NAME=PATH` and start its engine.

        Raises `CheckpointError` for what cannot be loaded and `SettingsError` for a name that is taken.
        """
        name, path = split_location(location)
        checkpoint = load_checkpoint(path, dtype=DTYPES[self.settings.dtype])
        name = name or name_of(path)
        if name in self._models:
            raise SettingsError(
                f"two checkpoints are named {name!r}", hint=f"give one of them another name: other={path}"
            )
        return self.add(name, checkpoint, math.floor(path.stat().st_mtime))

    def add(self, name: str, checkpoint: Checkpoint, created: int = 0) -> LoadedModel:
        """Start an engine for a checkpoint that is in memory already. Its matrices become unfit for training."""
        pack(checkpoint.model)
        engine = Engine(checkpoint.model, name=name, max_queue=self.settings.max_queue)
        engine.start()
        metrics = ModelMetrics(self.metrics, name, lambda: engine.running, lambda: engine.waiting)
        control_ids = frozenset(checkpoint.tokenizer.control_tokens.values())
        loaded = LoadedModel(name, checkpoint, engine, metrics, created, control_ids)
        self._models[name] = loaded
        return loaded

    def get(self, name: str | None = None) -> LoadedModel:
        """The checkpoint called `name`, or the first one. Raises `UnknownModel` listing the loaded ones."""
        if name is None and self._models:
            return next(iter(self._models.values()))
        if name is None or name not in self._models:
            loaded = ", ".join(self._models) or "none"
            asked = "no checkpoint is loaded" if name is None else f"no checkpoint named {name!r} is loaded"
            raise UnknownModel(asked, field="model", hint=f"loaded: {loaded}")
        return self._models[name]

    def close(self, timeout: float = 1.0) -> None:
        """Stop every engine; running requests end as cancelled."""
        for loaded in self._models.values():
            loaded.engine.close(timeout)


def split_location(location: str) -> tuple[str | None, Path]:
    """`NAME=PATH` into its parts; a path that exists is taken as it is, even with an equals sign in it."""
    name, equals, rest = location.partition("=")
    if equals and name and not Path(location).exists() and "/" not in name:
        return name, Path(rest).expanduser()
    return None, Path(location).expanduser()


def name_of(path: Path) -> str:
    """What a checkpoint is called: its directory or file, or for one inside a training run, run and checkpoint."""
    path = Path(os.path.abspath(path))
    if path.suffix == ".gguf":
        return path.stem
    if path.name in ("best", "last"):
        return f"{path.parent.name}-{path.name}"
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        return f"{path.parents[1].name}-{path.name}"
    return path.name


def default_checkpoints(settings: Settings) -> list[str]:
    """The checkpoints served when none is named: chat ones first, then by name.

    Looked for in `TOPKAPI_CHECKPOINTS`, else in `checkpoints/` of the working directory, else in that of the
    checkout. Raises `SettingsError` where there is none.
    """
    if settings.checkpoints is not None:
        places = [settings.checkpoints.expanduser()]
    else:
        places = [Path("checkpoints"), Path(__file__).resolve().parents[1] / "checkpoints"]
    for place in places:
        found = _checkpoints_in(place)
        if found:
            return [os.fspath(path) for path in found]
    raise SettingsError(
        f"no checkpoint was named and there is none in {' or '.join(str(place) for place in places)}",
        hint="name one (topkapi serve PATH), or set TOPKAPI_CHECKPOINTS to a directory that holds some",
    )


def _checkpoints_in(place: Path) -> list[Path]:
    if (place / "config.json").is_file():
        return [place]
    if not place.is_dir():
        return []
    # Sorted first, so that of two names for one checkpoint (a run's best and last) always the same is kept.
    entries = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    found = {path.resolve(): path for path in reversed(entries)}
    checkpoints = [path for path in found.values() if (path / "config.json").is_file() or path.suffix == ".gguf"]
    return sorted(checkpoints, key=lambda path: ("chat" not in path.name, path.name))
