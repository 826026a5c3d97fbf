"""Long work on a thread that is given up between two of its pieces once nobody waits for it any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from topkapi.model.errors import Cancelled

_given_up: ContextVar[Callable[[], bool] | None] = ContextVar("given_up", default=None)


@contextmanager
def given_up_when(given_up: Callable[[], bool]) -> Iterator[None]:
    """Let `between_pieces` end the work of this block, on this thread, once `given_up()` is true."""
    token = _given_up.set(given_up)
    try:
        yield
    finally:
        _given_up.reset(token)


def between_pieces() -> None:
    """A place where the work may end, and where other threads get the interpreter. Raises `Cancelled`."""
    given_up = _given_up.get()
    if given_up is not None and given_up():
        raise Cancelled("nobody waits for this any more")
