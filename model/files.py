"""Writing a directory whole or not at all, and knowing later that it is unchanged."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topkapi.model.errors import CheckpointError


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def write_directory(final: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; when the block ends well, flush it and rename it into place.

    A reader sees the earlier directory, or none, or the new one whole, never a part. Should the process die between
    the two renames that replace an existing directory, `recover_directory` brings the earlier one back. Raises
    `CheckpointError` when the disk is full or not writable; what was at `final` is then untouched.
    """
    final = Path(final)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    previous = _previous(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        # safetensors makes its file readable by its owner alone; a checkpoint is to be copied, mounted and served.
        readable = partial.stat().st_mode & 0o666
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                path.chmod(readable)
                _flush(path)
        _flush(partial)
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
            final.rename(previous)
        partial.rename(final)
        _flush(final.parent)
    except OSError as error:
        recover_directory(final)
        raise CheckpointError(
            f"could not write {final}: {error.strerror or error}",
            hint="free disk space or choose another directory; what was there before is unchanged",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory so that nobody ever finds a part of it under its name."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def recover_directory(final: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    previous = _previous(final)
    if previous.exists() and not final.exists():
        previous.rename(final)


def _previous(final: Path) -> Path:
    return final.with_name(f".{final.name}.previous")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
