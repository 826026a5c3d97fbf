"""The requests on their way through the application: none is let in while its checkpoints are being loaded, which can
take minutes, and what would outlast the server can be ended by it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.errors import NATIVE, error_response
from topkapi.service.models import Models
from topkapi.service.threads import on_thread
from topkapi.service.version import VERSION

ANSWER_SECONDS = 0.2
"""How long the end of an answer may take to be sent: for ever, to a client that does not read."""

DRAIN_RETRY_SECONDS = 5
"""After which a client is told to try again, by when another server or a new process answers."""

WATCHING = {"/health", "/ready", "/v1/health", "/metrics"}
"""What is answered to the last."""


class Stopping(TopkapiError):
    """The server takes nothing new. Nothing was begun, so nothing was cancelled; it is told as if it had been."""

    status = 503
    kind = "cancelled"
    retry_after = DRAIN_RETRY_SECONDS


@dataclass(eq=False)
class _Request:
    task: asyncio.Task[object]
    counts: bool = True
    reading: bool = True
    started: bool = False
    over: bool = False
    ended: bool = False


class Requests:
    """An ASGI application around another one. What it is asked to end, it ends in a proper way: no answer, no trace."""

    def __init__(self, app: ASGIApp, api: FastAPI | None = None, root_path: str | None = None) -> None:
        """What is refused before `app` sees it is refused in the dialect that `api`, under `root_path`, has for it."""
        self._app = app
        self._known = {} if api is None else {"app": api, "root_path": root_path or ""}
        self._running: set[_Request] = set()
        self._root_path = root_path or ""
        self._stopping = self._draining = False

    def __len__(self) -> int:
        return len(self._running)

    @property
    def waited_for(self) -> int:
        """Requests that have begun and come to an end."""
        return sum(request.counts for request in self._running)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer for the application where it was ended."""
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(self._root_path)
        # Whoever lost a stream may go on with it: it is one of those that are to be finished. A page waits for ever.
        stream = scope["method"] != "POST" and path.startswith("/streams/")
        request = _Request(task, counts=stream or scope["method"] == "POST")

        async def heard() -> Message:
            message = await receive()
            request.reading = bool(message.get("more_body", False))
            return message

        async def said(message: Message) -> None:
            await send(message)
            request.started = True
            request.over = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._running.add(request)
        try:
            if self._stopping or (self._draining and path not in WATCHING and not stream):
                request.counts = False
                await self._refuse(scope, receive, said)
            else:
                await self._app(scope, heard, said)
        except asyncio.CancelledError:
            if not request.ended:
                raise
            task.uncancel()
            if not request.started:
                await self._refuse(scope, receive, said)
            elif not request.over:
                # An answer whose length was announced can't be ended early; its connection is closed all the same.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(ANSWER_SECONDS):
                        await said({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._running.discard(request)

    def drain(self) -> None:
        """Begin no more requests, but let those run that have begun."""
        self._draining = True

    def stop(self) -> None:
        """Begin no more requests, and end those that have not come in as a whole."""
        self._stopping = True
        self._end(lambda request: request.reading and not request.started)

    async def wait(self, seconds: float) -> None:
        """Wait until all have been answered, or so many seconds; then end what is left."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._running and loop.time() < until:
            await asyncio.sleep(0.02)
        self._end(lambda request: True)
        # Ended ones answer in a moment, unless their client does not read.
        until = loop.time() + 2 * ANSWER_SECONDS
        while self._running and loop.time() < until:
            await asyncio.sleep(0.02)

    def _end(self, which: Callable[[_Request], bool]) -> None:
        for request in list(self._running):
            if which(request) and not request.ended:
                request.ended = True
                request.task.cancel()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = Stopping("the server is stopping", hint="try again in a moment")
        # The studio's requests are of an application of its own, which has no dialects.
        if "app" not in scope or not hasattr(scope["app"].state, "dialects"):
            scope = {**scope, **self._known}
        dialect = dialect_of(scope) if "app" in scope and hasattr(scope["app"].state, "dialects") else NATIVE
        await error_response(error, dialect, {"Connection": "close"})(scope, receive, send)


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
