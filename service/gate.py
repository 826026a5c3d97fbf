"""What stands before the application while its checkpoints are being loaded, which can take minutes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.errors import error_response
from topkapi.service.models import Models
from topkapi.service.threads import on_thread
from topkapi.service.version import VERSION

LONGEST_WAIT = 60
"""Seconds that a client is told to wait at most while checkpoints are being loaded."""


class Loading(TopkapiError):
    """The checkpoints are still being loaded."""

    status = 503
    kind = "loading"


class Gate:
    """Until it is opened, `app` answers everything with 503, in the shape and under the rules of each of its routes."""

    def __init__(self, models: Models, app: FastAPI) -> None:
        self._models = models
        self.app = app
        # Innermost: by which names and from which pages it may be called is asked from the first moment.
        app.user_middleware.append(Middleware(_NotYet, gate=self))
        self._living: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._since = time.monotonic()
        self.opened = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or begin and end the application's life with the server's."""
        if scope["type"] == "lifespan":
            await self._live_and_die(receive, send)
        else:
            await self.app(scope, receive, send)

    async def open(self, make_ready: Callable[[], None]) -> None:
        """Run `make_ready` on a thread of its own, then let requests through. Raises what it raises."""
        await on_thread(make_ready, "load")
        alive: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def live() -> None:
            # Entered and left in one task, as what libraries start there asks for.
            async with self.app.router.lifespan_context(self.app):
                alive.set_result(None)
                await self._closing.wait()

        self._living = asyncio.create_task(live())
        await asyncio.wait({alive, self._living}, return_when=asyncio.FIRST_COMPLETED)
        if self._living.done():
            self._living.result()
        self.opened = True

    async def _live_and_die(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._closing.set()
        if self._living is not None:
            await self._living
        await send({"type": "lifespan.shutdown.complete"})

    def not_yet(self, scope: Scope) -> JSONResponse:
        """The answer to a request while checkpoints are being loaded."""
        # Nobody knows how long it will take; as long again as it has taken so far is the best guess there is.
        wait = max(1, min(LONGEST_WAIT, math.ceil(time.monotonic() - self._since)))
        if scope["path"].removeprefix(scope.get("root_path", "")) in ("/health", "/ready"):
            about = {"version": VERSION, "models": self._models.names, "loading": self._models.loading}
            return JSONResponse({"status": "loading", **about}, 503, {"Retry-After": str(wait)})
        error = Loading("the checkpoints are being loaded", hint="try again in a moment")
        error.retry_after = wait
        return error_response(error, dialect_of(scope))


class _NotYet:
    """Keeps requests from `app` until the gate is opened."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._gate.opened:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._gate.not_yet(scope)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1013})
