"""The texts that commands are given, and what they say while something is loaded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from topkapi.model.errors import DataError
from topkapi.model.user_files import LONGEST_TEXT, read_file, read_stream

_SHORTER = "give a UTF-8 text of that length, or its parts one by one"


@dataclass(frozen=True)
class Text:
    """A text that was given, less the line end after it, which `ended` says was there.

    `echo` and editors put one at the end of what somebody wrote; a network takes it for the end of a line, which is not
    the same text.
    """

    content: str
    ended: bool


def standard_input(what: str) -> Text:
    """All of standard input; a terminal is told that `what` is read. Raises `DataError` for what is no text."""
    if sys.stdin.isatty():
        print(f"Reading {what} from standard input; end it with Ctrl-D.", file=sys.stderr)
    return _decode(read_stream(sys.stdin.buffer, "standard input", LONGEST_TEXT, hint=_SHORTER), "standard input")


def read_text(path: Path) -> Text:
    """A file as a text. Raises `DataError` for what is none."""
    return _decode(read_file(path, LONGEST_TEXT, hint=_SHORTER), str(path))


def _decode(raw: bytes, name: str) -> Text:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}", hint="convert it first"
        ) from None
    content = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
    if not content:
        raise DataError(f"{name} is empty", hint="there must be something to read")
    return Text(content, content != text)


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Says on a terminal's standard error that `name` is being loaded, for as long as the block lasts."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"loading {name} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
