"""What stands before the application while its checkpoints are being loaded, which can take minutes."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from topkapi.model.errors import CheckpointError
from topkapi.service.models import Models
from topkapi.service.version import VERSION

LONGEST_WAIT = 60
"""Seconds that a client is told to wait at most while checkpoints are being loaded."""


class Gate:
    """Until it is opened everything is answered with 503. Then everything goes to the application."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._app: ASGIApp | None = None
        self._living: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._since = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or begin and end the application's life with the server's."""
        if scope["type"] == "lifespan":
            await self._live_and_die(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._not_yet(scope["path"])(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1013})

    async def open(self, make: Callable[[], FastAPI]) -> None:
        """Run `make` on a thread of its own and let requests through to what it gives. Raises what it raises."""
        app = await _on_thread(make)
        alive: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def live() -> None:
            # Entered and left in one task, as what libraries start there asks for.
            async with app.router.lifespan_context(app):
                alive.set_result(None)
                await self._closing.wait()

        self._living = asyncio.create_task(live())
        await asyncio.wait({alive, self._living}, return_when=asyncio.FIRST_COMPLETED)
        if self._living.done():
            self._living.result()
        self._app = app

    async def _live_and_die(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._closing.set()
        if self._living is not None:
            await self._living
        await send({"type": "lifespan.shutdown.complete"})

    def _not_yet(self, path: str) -> JSONResponse:
        about = {"version": VERSION, "models": self._models.names, "loading": self._models.loading}
        path = path.removeprefix(self._models.settings.root_path or "")
        # Nobody knows how long it will take; as long again as it has taken so far is the best guess there is.
        wait = {"Retry-After": str(max(1, min(LONGEST_WAIT, math.ceil(time.monotonic() - self._since))))}
        if path in ("/health", "/ready"):
            return JSONResponse({"status": "loading", **about}, 503, wait)
        error = {"type": "loading", "message": "the checkpoints are being loaded", "hint": "try again in a moment"}
        return JSONResponse({"error": error}, 503, wait)


async def _on_thread(make: Callable[[], FastAPI]) -> FastAPI:
    """`make()` on a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[FastAPI] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if made.cancelled():
            return
        if error is not None:
            made.set_exception(error)
        else:
            made.set_result(result)

    def work() -> None:
        try:
            outcome: tuple[Any, Exception | None] = (make(), None)
        except Exception as error:
            outcome = (None, error)
        except BaseException as error:
            # Such as a panic in a library, or an exit: in the event loop they would take the server with them.
            outcome = (None, CheckpointError(f"loading broke off: {type(error).__name__}: {error}"))
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            # The server was stopped meanwhile, and nobody waits any more.
            return

    threading.Thread(target=work, name="load", daemon=True).start()
    return await made
