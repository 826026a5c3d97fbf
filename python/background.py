"""The event loop on which the work of the Python API goes on, on a thread of its own.

So a call may be made from any thread, also from one that has a running event loop, as every notebook's has.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Background:
    """The loop, which begins to run when it is first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """It, running."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="topkapi-python", daemon=True).start()
            return self._loop


_background = _Background()


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns or raises. Whatever interrupts the wait, Ctrl-C say, cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, _background.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def arun(work: Coroutine[Any, Any, Result]) -> Result:
    """The same for a caller on an event loop of its own; where it is cancelled, so is `work`."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _background.loop))


def soon(work: Coroutine[Any, Any, object]) -> None:
    """Let `work` be done, and do not wait for it."""
    asyncio.run_coroutine_threadsafe(work, _background.loop)
