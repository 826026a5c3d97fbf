"""What of the hub is here: whole checkpoints in the cache, found without a connection, listed and deleted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from topkapi.model.errors import CheckpointError
from topkapi.model.hub.download import repository_directory
from topkapi.model.hub.files import choose, indexed, quantisation
from topkapi.model.hub.names import HubName
from topkapi.model.hub.remote import cache_directory
from topkapi.model.reading import read_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLACE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


@dataclass(frozen=True)
class Cached:
    """A checkpoint in the cache; `certain` where the hub could name no other for the same words."""

    path: Path
    certain: bool


@dataclass(frozen=True)
class Entry:
    """A repository in the cache, or one checkpoint of it. `path` is None where it is not whole."""

    name: HubName
    path: Path | None
    size: int


def cached(name: HubName, *, pickles: bool = False) -> Cached | None:
    """The checkpoint of that name in the cache, if it is there whole; with `pickles`, one to be imported, too."""
    snapshot = _snapshot(name)
    if snapshot is None:
        return None
    try:
        choice = choose(name, _files(snapshot), pickles=pickles)
        weights = indexed(read_json(snapshot / choice.index), name) if choice.index else choice.weights
    except CheckpointError:
        return None
    if choice.gguf is not None:
        # Of a repository's files another one may be the usual, and weights of another kind come first.
        return Cached(snapshot / choice.gguf, name.variant is not None)
    if not all((snapshot / file).is_file() for file in weights):
        return None
    return Cached(snapshot, True)


def note_revision(name: HubName, commit: str) -> None:
    """Remember which commit a branch or tag is at, once all of it is here."""
    revision = name.revision or "main"
    if _COMMIT.fullmatch(revision):
        return
    note = repository_directory(name.repository) / "refs" / revision
    note.parent.mkdir(parents=True, exist_ok=True)
    draft = note.with_name(f".{note.name}.{os.getpid()}")
    draft.write_text(commit)
    draft.replace(note)


def hub_name_of(path: Path) -> HubName | None:
    """The name of what lies at a path of the cache: of a snapshot, or of a file in it; None for any other path."""
    parts = path.absolute().parts
    for index in range(len(parts) - 1, 1, -1):
        found = _PLACE.fullmatch(parts[index - 2])
        if parts[index - 1] == "snapshots" and found:
            file = "/".join(parts[index + 1 :])
            return HubName(f"{found['owner']}/{found['name']}", parts[index], file or None)
    return None


def entries() -> Iterator[Entry]:
    """All models of the cache that hold something that is loaded, by name."""
    for place in sorted(cache_directory().glob("models--*--*")):
        found = _PLACE.fullmatch(place.name)
        if found is None or not place.is_dir():
            continue
        repository = f"{found['owner']}/{found['name']}"
        refs = place / "refs"
        revisions = {
            note.read_text().strip(): str(note.relative_to(refs))
            for note in sorted(refs.rglob("*"), reverse=True)
            if note.is_file()
        }
        whole = False
        for snapshot in sorted((place / "snapshots").glob("*")):
            revision = revisions.get(snapshot.name, snapshot.name)
            name = HubName(repository, None if revision == "main" else revision)
            for entry in _checkpoints(name, snapshot):
                whole = True
                yield entry
        if not whole:
            yield Entry(HubName(repository), None, _size_on_disk(place))


def _checkpoints(name: HubName, snapshot: Path) -> Iterator[Entry]:
    files = _files(snapshot)
    ggufs = [file for file in files if file.endswith(".gguf")]
    if found := _directory(name, snapshot):
        others = sum((snapshot / file).stat().st_size for file in files if file not in ggufs)
        yield Entry(name, found, others)
    kinds = [quantisation(file) for file in ggufs]
    for file, kind in zip(ggufs, kinds, strict=True):
        variant = kind if kind and kinds.count(kind) == 1 else file
        yield Entry(HubName(name.repository, name.revision, variant), snapshot / file, (snapshot / file).stat().st_size)


def _directory(name: HubName, snapshot: Path) -> Path | None:
    try:
        choice = choose(name, [file for file in _files(snapshot) if not file.endswith(".gguf")])
        weights = indexed(read_json(snapshot / choice.index), name) if choice.index else choice.weights
    except CheckpointError:
        return None
    return snapshot if all((snapshot / file).is_file() for file in weights) else None


def remove(name: HubName) -> int:
    """Delete a repository from the cache, or one revision or one GGUF file of it. The bytes that this gave back.

    Raises `CheckpointError` for what is not there.
    """
    place = repository_directory(name.repository)
    if not place.is_dir():
        raise CheckpointError(f"{name} is not in the cache ({cache_directory()})", hint="topkapi list shows what is")
    before = _size_on_disk(place)
    if name.revision is None and name.variant is None:
        _delete(place)
        return before
    snapshot = _snapshot(name)
    if snapshot is None:
        raise CheckpointError(f"{name} is not in the cache", hint="topkapi list shows what is")
    if name.variant is None:
        shutil.rmtree(snapshot)
    else:
        (snapshot / str(choose(name, _files(snapshot)).gguf)).unlink()
    _sweep(place)
    return before - _size_on_disk(place)


def _sweep(place: Path) -> None:
    """Delete what no snapshot leads to any more; all of the repository where nothing is left that could be loaded."""
    kept = {os.path.realpath(file) for file in (place / "snapshots").rglob("*") if file.is_file()}
    if not any(file.suffix in (".gguf", ".safetensors", ".bin") for file in (place / "snapshots").rglob("*")):
        _delete(place)
        return
    for blob in (place / "blobs").glob("*"):
        if os.path.realpath(blob) not in kept:
            blob.unlink()
    for note in [note for note in (place / "refs").rglob("*") if note.is_file()]:
        if not (place / "snapshots" / note.read_text().strip()).is_dir():
            note.unlink()


def _delete(place: Path) -> None:
    """The repository and its locks; under another name first, so that nobody finds a part of it."""
    doomed = place.with_name(f".{place.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    place.rename(doomed)
    shutil.rmtree(doomed)
    shutil.rmtree(place.parent / ".locks" / place.name, ignore_errors=True)


def _snapshot(name: HubName) -> Path | None:
    place = repository_directory(name.repository)
    revision = name.revision or "main"
    note = place / "refs" / revision
    if not _COMMIT.fullmatch(revision):
        if not note.is_file():
            return None
        revision = note.read_text().strip()
    snapshot = place / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def _files(snapshot: Path) -> list[str]:
    """The files of a snapshot that are whole; a link whose blob is gone is none."""
    return sorted(file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file())


def _size_on_disk(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())
