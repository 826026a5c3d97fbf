"""Calls on threads that do not keep the process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from topkapi.model.errors import CheckpointError

Result = TypeVar("Result")


async def on_thread(call: Callable[[], Result], name: str) -> Result:
    """What `call()` returns or raises, on a daemon thread of that name; a thread can't be cancelled, but is let go."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def tell(result: Result) -> None:
        if not done.cancelled():
            done.set_result(result)

    def tell_of(problem: Exception) -> None:
        if not done.cancelled():
            done.set_exception(problem)

    def work() -> None:
        try:
            told: Callable[[], object] = partial(loop.call_soon_threadsafe, tell, call())
        except Exception as error:
            told = partial(loop.call_soon_threadsafe, tell_of, error)
        except BaseException as error:
            # Such as a panic in a library, or an exit: in the event loop they would take the server with them.
            problem = CheckpointError(f"loading broke off: {type(error).__name__}: {error}")
            told = partial(loop.call_soon_threadsafe, tell_of, problem)
        # Where the server was stopped meanwhile, nobody waits any more.
        with contextlib.suppress(RuntimeError):
            told()

    threading.Thread(target=work, name=name, daemon=True).start()
    return await done
