"""Signs of life on streams that wait, so that no proxy between here and the client takes them for dead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

COMMENT = b": still here\n\n"
"""A comment among server-sent events, which clients skip (WHATWG HTML, section 9.2)."""


class KeepAlive:
    """Sends a comment on every stream of events on which nothing came for so many seconds."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on. What is sent in one message is whole events, so a comment may stand between any two."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with contextlib.AsyncExitStack() as stack:
            stream: _Stream | None = None

            async def forward(message: Message) -> None:
                nonlocal stream
                if stream is not None:
                    await stream.send(message)
                    return
                await send(message)
                if message["type"] == "http.response.start" and _is_stream(message):
                    stream = _Stream(send, self._seconds)
                    await stack.enter_async_context(stream.kept_alive())

            await self._app(scope, receive, forward)


class _Stream:
    """One response. Its messages and the comments go out one after the other."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._sending = asyncio.Lock()
        self._over = False

    async def send(self, message: Message) -> None:
        async with self._sending:
            self._over = not message.get("more_body", False)
            await self._send(message)
            self._last = self._loop.time()

    @contextlib.asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Look after it while the block lasts."""
        task = self._loop.create_task(self._look_after())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _look_after(self) -> None:
        while not self._over:
            silent = self._loop.time() - self._last
            if silent < self._seconds:
                await asyncio.sleep(self._seconds - silent)
            else:
                await self.comment()

    async def comment(self) -> None:
        """Send a sign of life unless the response is over."""
        async with self._sending:
            if not self._over:
                await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                self._last = self._loop.time()


def _is_stream(message: Message) -> bool:
    headers = dict(message["headers"])
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))
