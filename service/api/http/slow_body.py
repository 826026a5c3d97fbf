"""Bodies that dribble in, so that a connection and what is kept for it would be held for as long as somebody likes."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.service.api.http.errors import RequestTimeout

LEAST_BYTES_PER_S = 1024
"""A body may take the settings' seconds and as long as it takes at this rate."""


class SlowBody:
    """Lets reading a body fail with `RequestTimeout` where it comes in too slowly. What the server itself takes to read
    it, and everything after its end, does not count."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        waited, received, whole = 0.0, 0, False

        async def in_time() -> Message:
            nonlocal waited, received, whole
            if whole:
                return await receive()
            began = loop.time()
            try:
                message = await asyncio.wait_for(receive(), self._seconds + received / LEAST_BYTES_PER_S - waited)
            except TimeoutError:
                raise RequestTimeout(received, waited + loop.time() - began) from None
            waited += loop.time() - began
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, in_time, send)
