"""Where checkpoints are looked for and what they are called; nothing here reads one, or imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from topkapi.model.config import ModelConfig
from topkapi.model.errors import SettingsError
from topkapi.model.hub.cache import hub_name_of
from topkapi.model.hub.resolve import local_path
from topkapi.model.storage.location import check_location, is_adapter
from topkapi.model.user_files import expanded
from topkapi.service.settings import Settings


def split_location(location: str) -> tuple[str | None, Path]:
    """`NAME=PATH` into its parts; a path that exists is taken as it is, even with an equals sign in it."""
    name, equals, rest = location.partition("=")
    if equals and name and not Path(location).exists() and "/" not in name:
        return name, expanded(rest)
    return None, expanded(location)


def name_of(path: Path) -> str:
    """What a checkpoint is called: its directory or file, or for one inside a training run, run and checkpoint."""
    path = Path(os.path.abspath(path))
    if path.suffix == ".gguf":
        return path.stem
    if hub := hub_name_of(path):
        return hub.repository.partition("/")[2]
    if path.name in ("best", "last"):
        return f"{path.parent.name}-{path.name}"
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        return f"{path.parents[1].name}-{path.name}"
    return path.name


def at_hand(location: str) -> str:
    """`PATH` or `NAME=PATH` where a model of the hub may stand for the path: with where it lies, downloaded if need be.

    Raises `CheckpointError` for one that cannot be had.
    """
    name, _ = split_location(location)
    found = local_path(location if name is None else location.partition("=")[2])
    if name is None:
        return os.fspath(found)
    return f"{name}={found}"


def all_at_hand(locations: Sequence[str], settings: Settings) -> tuple[list[str], Settings]:
    """`at_hand` for all locations and for the draft checkpoint of the settings."""
    if settings.draft is not None:
        settings = settings.model_copy(update={"draft": local_path(settings.draft)})
    return [at_hand(location) for location in locations], settings


@dataclass(frozen=True)
class AdapterLocation:
    """An adapter of the settings: what requests call it, the checkpoint beside which it is to stand (None: the one that
    it names), and where it lies."""

    name: str
    base: str | None
    path: Path


def adapter_locations(settings: Settings) -> list[AdapterLocation]:
    """The adapters of the settings, those of directories by their own names.

    Raises `SettingsError` for a place where none lies, and for two of one name.
    """
    found = []
    for given in settings.adapters:
        called, path = split_location(given)
        name, _, base = (called or "").partition("@")
        inside = [path] if is_adapter(path) else sorted(_adapters_in(path)) if called is None else []
        if not inside:
            hint = "name a directory that holds adapter_config.json, as NAME=DIR, or one with such directories in it"
            raise SettingsError(f"there is no adapter at {path}", field="adapters", hint=hint)
        found += [AdapterLocation(name or name_of(each), base or None, each) for each in inside]
    for location in found:
        if [each.name for each in found].count(location.name) > 1:
            hint = "give one another name: NAME=DIR"
            raise SettingsError(f"two adapters would be named {location.name!r}", field="adapters", hint=hint)
    return found


def followed(path: Path) -> bool:
    """Whether what lies there may be another checkpoint later: a training run's `best` or `last`, or another link."""
    return path.is_symlink()


def check_followed(locations: Sequence[str], settings: Settings) -> None:
    """Raise `SettingsError` where there is nothing to follow."""
    paths = [split_location(location)[1] for location in locations]
    if not any(map(followed, [*paths, *(each.path for each in adapter_locations(settings))])):
        raise SettingsError(
            "none of what is served can be followed",
            field="follow",
            hint="name the best or last of a training run, as it lies in the run's directory",
        )


def _adapters_in(place: Path) -> list[Path]:
    try:
        return [path for path in place.iterdir() if not path.name.startswith(".") and is_adapter(path)]
    except OSError:
        return []


def name_of_location(location: str) -> str:
    """What the checkpoint at `PATH` or `NAME=PATH` is called."""
    name, path = split_location(location)
    return name or name_of(path)


def default_checkpoints(settings: Settings) -> list[str]:
    """The checkpoints served when none is named: chat ones first, then by name.

    Looked for in `TOPKAPI_CHECKPOINTS`, else in `checkpoints/` of the working directory, else in that of the
    checkout. Raises `SettingsError` where there is none.
    """
    if settings.checkpoints is not None:
        places = [expanded(settings.checkpoints)]
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
    try:
        if (place / "config.json").is_file():
            return [place]
        if not place.is_dir():
            return []
        # Sorted first, so that of two names for one checkpoint (a run's best and last) always the same is kept.
        entries = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    except OSError as error:
        hint = "let this user read it, or name checkpoints: topkapi serve PATH"
        raise SettingsError(f"{place} cannot be read: {error.strerror}", field="checkpoints", hint=hint) from None
    found = {os.path.realpath(path): path for path in reversed(entries)}
    checkpoints = [path for path in found.values() if path.suffix == ".gguf" or _has_config(path)]
    return sorted(checkpoints, key=lambda path: ("chat" not in path.name, path.name))


def _has_config(path: Path) -> bool:
    try:
        return (path / "config.json").is_file() or is_adapter(path)
    except OSError:
        # A directory beside the checkpoints that nobody may look into is none of them.
        return False


def check_locations(locations: Sequence[str], settings: Settings) -> list[ModelConfig | None]:
    """The configuration of each checkpoint in `locations` (`PATH` or `NAME=PATH`), None where it takes reading.

    Raises `CheckpointError` for a path where none lies, the draft checkpoint's included, and `SettingsError` for two
    of one name.
    """
    if settings.draft is not None:
        check_location(expanded(settings.draft))
    names: set[str] = set()
    found = []
    for location in locations:
        found.append(check_location(split_location(location)[1]))
        name = name_of_location(location)
        if name in names:
            raise SettingsError(
                f"two checkpoints would be named {name!r}", field="checkpoint", hint="give one another name: NAME=PATH"
            )
        names.add(name)
    return found
