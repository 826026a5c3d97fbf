"""Errors as a caller in Python reads them: what to do stands below the message, and names are Python's."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from contextlib import contextmanager

from topkapi.model.errors import TopkapiError

_FLAG = re.compile(r"(?<![\w-])--(?:no-)?([a-z][a-z0-9-]*)")


@contextmanager
def readable(names: Container[str] = ()) -> Iterator[None]:
    """Let a `TopkapiError` that leaves the block show its hint, and say the keywords `names` as they are written here.

    Its `message`, `field` and `hint` stay to be read one by one.
    """
    try:
        yield
    except TopkapiError as error:
        error.message = _in_python(error.message, names)
        error.args = (error.message, *error.args[1:])
        if error.hint is not None:
            error.hint = _in_python(error.hint, names)
            note = f"hint: {error.hint}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


def _in_python(text: str, names: Container[str]) -> str:
    """`text` with the flags of these names as keywords: what the commands call --learning-rate is learning_rate."""

    def keyword(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        if name not in names:
            return found[0]
        return f"`{name}`" if found.start() else name

    return _FLAG.sub(keyword, text)
