"""The files of a checkpoint, which may come from anybody: where they may lie, how large they may be, what they hold.

A load that a request asked for is confined to one directory: every path that it touches lies in it, links followed.
What such a load reads is trusted less, too: see `model.text.trial`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from topkapi.model.errors import CheckpointError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
_LARGEST_VOCABULARY = 1 << 26
_LARGEST = 1 << 23
"""Bytes of any other text file of a checkpoint; a large model's index of tensors has a quarter of a million."""

_TEXTS = (".json", ".txt", ".jinja")
_READ = (*_TEXTS, ".safetensors", ".gguf")

_WITHIN: ContextVar[Path | None] = ContextVar("within", default=None)


@contextmanager
def confined(directory: Path | None) -> Iterator[None]:
    """Within the block `check_place` refuses what lies outside `directory`; None, the default, refuses nothing."""
    token = _WITHIN.set(None if directory is None else Path(os.path.realpath(directory)))
    try:
        yield
    finally:
        _WITHIN.reset(token)


def is_confined() -> bool:
    """Whether a request asked for what is being read, rather than whoever started the program."""
    return _WITHIN.get() is not None


def may_be_read(path: Path) -> bool:
    """Whether the path lies where this load may read, links followed."""
    within = _WITHIN.get()
    return within is None or Path(os.path.realpath(path)).is_relative_to(within)


def check_place(path: Path) -> Path:
    """The path, if it lies where this load may read. Raises `CheckpointError` otherwise, whether it exists or not."""
    if not may_be_read(path):
        raise CheckpointError(
            f"{path} leads out of the directory that checkpoints may be loaded from",
            hint="copy what it leads to into that directory, or load it from the command line",
        )
    return path


def member(directory: Path, name: object, said_by: str) -> Path:
    """The file of a checkpoint that another of its files names. Raises `CheckpointError` for more than a plain name."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise CheckpointError(
            f"{directory / said_by} names the file {str(name)[:200]!r}, not the plain name of a file beside it",
            field=said_by,
            hint="copy or download the checkpoint again",
        )
    return check_place(directory / name)


def check_directory(directory: Path) -> None:
    """Refuse a directory with files that a load would read and that are links out of place, no files, or too large."""
    check_place(directory)
    for path in sorted(directory.iterdir()):
        if path.suffix not in _READ:
            continue
        check_place(path)
        try:
            found = path.stat()
        except OSError:
            continue  # a link that leads nowhere: whoever needs the file says that it is missing
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise CheckpointError(f"{path} is no ordinary file", hint="copy or download the checkpoint again")
        if path.suffix in _TEXTS:
            _check_size(path, found.st_size)


def _check_size(path: Path, size: int) -> None:
    largest = _LARGEST_VOCABULARY if path.name in _VOCABULARIES else _LARGEST
    if size > largest:
        raise CheckpointError(
            f"{path} has {size:,} bytes, and one of more than {largest:,} is not read",
            hint="no model has one so large: copy or download the checkpoint again",
        )


def read_text(path: Path) -> str:
    """The content of a text file of a checkpoint. Raises `CheckpointError` for one that is too large or not UTF-8."""
    _check_size(path, check_place(path).stat().st_size)
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}", hint="copy or download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; nothing where there is no such file.

    Raises `CheckpointError` for a file that is too large, not JSON or no object.
    """
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})", hint="copy or download it again") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply", hint="copy or download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object", hint="copy or download it again")
    return content


def check_memory(path: Path, needed: int) -> None:
    """Refuse a load that a request asked for where it would take more memory than there is.

    Whoever starts the program may know better: memory is freed, swapped, or shared.
    """
    if not is_confined():
        return
    free = _free_memory()
    if needed > free:
        raise CheckpointError(
            f"{path} needs {needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} are free",
            hint="unload another checkpoint first, or start the server with --dtype int8",
        )


def _free_memory() -> int:
    """Bytes that can be had without swapping; all of the machine's where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
