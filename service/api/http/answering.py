"""Whole answers as JSON, written on a thread and in pieces: a large one keeps neither event loop nor others waiting.

Python's writer holds the interpreter until it is done, on whatever thread: a second for the log-probabilities of some
long answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi.responses import Response

from topkapi.service.api.http.apart import on_thread

PIECE = 4096
"""Values that are written at once, in about a millisecond."""


async def answered(made: Callable[[], Any]) -> Response:
    """The answer whose content `made()` gives, both made and written on a thread."""
    return await on_thread(lambda: as_json(made()))


def as_json(content: Any) -> Response:
    """The answer with this content; lists in it may also be iterators."""
    return Response(b"".join(part.encode() for part in pieces(content)), media_type="application/json")


async def event_data(data: Mapping[str, Any]) -> str:
    """The JSON of an event of a stream: in place where it is small, as nearly all are, and on a thread if not."""
    if weight(data) < PIECE:
        return json.dumps(data, ensure_ascii=False, allow_nan=False)
    return await on_thread(lambda: "".join(pieces(data)))


def pieces(value: Any) -> Iterator[str]:
    """The JSON of a value, in pieces of no more than PIECE values."""
    if isinstance(value, Mapping) and weight(value) >= PIECE:
        for number, (name, each) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_dumps(str(name))}:"
            yield from pieces(each)
        yield "}"
    elif isinstance(value, Iterator) or (isinstance(value, list | tuple) and weight(value) >= PIECE):
        yield "["
        begun = False
        for several, entries in _grouped(value):
            if begun:
                yield ","
            begun = True
            if several:
                yield _dumps(entries)[1:-1]
            else:
                yield from pieces(entries)
        yield "]"
    else:
        yield _dumps(value)


def _grouped(entries: Any) -> Iterator[tuple[bool, Any]]:
    """(True, small entries in a row), and (False, each large one by itself)."""
    group: list[Any] = []
    held = 0
    for entry in entries:
        size = weight(entry)
        if group and held + size > PIECE:
            yield True, group
            group, held = [], 0
        if size >= PIECE:
            yield False, entry
        else:
            group.append(entry)
            held += size
    if group:
        yield True, group


def weight(value: Any, most: int = PIECE) -> int:
    """How many values there are in one, counted up to `most`; what an iterator will give is not known."""
    if isinstance(value, Mapping):
        value = value.values()
    elif isinstance(value, Iterator):
        return most
    elif not isinstance(value, list | tuple):
        return 1
    count = len(value)
    if count < most:
        for each in value:
            if isinstance(each, Mapping | list | tuple | Iterator):
                count += weight(each, most - count)
                if count >= most:
                    break
    return count + 1


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
