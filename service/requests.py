"""The requests on their way through the application, so that the server can end what would outlast it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.errors import NATIVE, error_response

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
