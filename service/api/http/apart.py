"""What takes time beside the event loop: on threads, in pieces, and given up as soon as its client has gone."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from fastapi import Request

from topkapi.model.interruption import given_up_when
from topkapi.service.api.http.errors import ClientGone

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

LARGE = 256 * 1024
"""Bytes of a body above which it takes so long to read that it must not take the threads of small ones."""

_small = ThreadPoolExecutor(max_workers=32, thread_name_prefix="request")
_large = ThreadPoolExecutor(max_workers=2, thread_name_prefix="large-request")


async def apart(
    request: Request, work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """`work(*arguments)` on a thread; where the client leaves meanwhile, it ends at its next `between_pieces`.

    Large bodies take turns, two at a time, so that they keep each other waiting and not the small ones. Raises what
    the work raises, and `ClientGone`.
    """
    given_up = threading.Event()

    def run() -> Result:
        with given_up_when(given_up.is_set):
            return work(*arguments, **named)

    threads = _large if len(await request.body()) > LARGE else _small
    working = asyncio.get_running_loop().run_in_executor(threads, contextvars.copy_context().run, run)
    try:
        return await unless_disconnected(request, working)
    finally:
        given_up.set()


async def on_thread(work: Callable[[], Result]) -> Result:
    """`work()` on a thread."""
    return await asyncio.get_running_loop().run_in_executor(_small, contextvars.copy_context().run, work)


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Await `work`, and cancel it as soon as the client has gone. Raises `ClientGone`."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client went away before the answer was ready")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
