"""Texts that somebody gives by a file's name or through a pipe: read to a stated limit, never without end."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO

from topkapi.model.errors import DataError, TopkapiError

LONGEST_TEXT = 1 << 28
"""Bytes of a text to score or to continue, of a line of JSON lines, and of a list of questions."""

LONGEST_DOCUMENT = 1 << 31
"""Bytes of a file that is read whole to train on."""

LONGEST_SETTINGS = 1 << 20
"""Bytes of a recipe, a list of tasks or a chat template."""

_PIECE = 1 << 20


def expanded(path: str | Path) -> Path:
    """The path with a home directory for its `~`; of a user that there is not, as it is."""
    return Path(os.path.expanduser(path))


def read_file(
    path: Path, most: int, *, field: str | None = None, hint: str | None = None, kind: type[TopkapiError] = DataError
) -> bytes:
    """The content of a file of at most `most` bytes; of a device or a pipe as well, which need never end.

    Raises `kind` for one that has more, with `hint`, and for one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            return read_stream(file, str(path), most, field=field, hint=hint, kind=kind)
    except OSError as error:
        raise kind(
            f"{path} cannot be read: {error.strerror}", field=field, hint="check that this user may read it"
        ) from None


def read_stream(
    file: IO[bytes],
    name: str,
    most: int,
    *,
    field: str | None = None,
    hint: str | None = None,
    kind: type[TopkapiError] = DataError,
) -> bytes:
    """What is left of a stream called `name`, at most `most` bytes. Raises `kind` for one that goes on."""
    # Of a file as it lies there nothing is read that would be too much; a pipe's size is 0.
    raw = getattr(file, "raw", None)
    if isinstance(raw, io.FileIO) and os.fstat(raw.fileno()).st_size > most:
        raise too_long(name, most, field=field, hint=hint, kind=kind)
    content = bytearray()
    while piece := file.read(_PIECE):
        content += piece
        if len(content) > most:
            raise too_long(name, most, field=field, hint=hint, kind=kind)
    return bytes(content)


def too_long(
    name: str, most: int, *, field: str | None = None, hint: str | None = None, kind: type[TopkapiError] = DataError
) -> TopkapiError:
    """The error for what is called `name` and has more than `most` bytes."""
    limit = f"{most >> 30} GiB" if most >= 1 << 30 else f"{most >> 20} MiB"
    return kind(f"{name} has more than {limit}, and no more of it is read", field=field, hint=hint)


def what_it_is(path: Path) -> str | None:
    """What is at a path where a file was wanted, in words: a folder, or something that need never end; None for a file
    and for nothing."""
    if path.is_dir():
        return "is a folder, not a file"
    if path.exists() and not path.is_file():
        return "is a device, a pipe or a socket, not a file"
    return None
