"""One replica: the whole application with its checkpoints in a process of its own, for which a front listens.

Nothing here knows what carries a request from the front to it and the answer back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from prometheus_client import generate_latest
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.middleware import SILENCE
from topkapi.service.app import create_api
from topkapi.service.calls import Call, current_call
from topkapi.service.keys import Key
from topkapi.service.models import Models
from topkapi.service.quotas import Share
from topkapi.service.settings import Settings

ARRIVED, DIALECT, CALL, TAKEN = "topkapi.arrived", "topkapi.dialect", "topkapi.call", "topkapi.taken"
"""Messages for the front, beside those for the client: that the request is here, whose clients its answer is for, what
the answer took, and before that, how many of its key's tokens so far."""

KEY, LEFT = "topkapi.key", "topkapi.left"
"""Where a request's scope says on whose behalf it is, and what that key has left of its tokens."""

LAST_SECONDS = 1.0
"""How long a request may take to end when nobody waits for its answer any more."""


@dataclass(frozen=True)
class Passed:
    """A request that the front lets through: its body is whole, and its `key` has been found good.

    `left` is what `Quota.share` tells of that key's tokens, `silence` for how many seconds a stream may be silent.
    """

    method: str
    path: str
    root_path: str
    query_string: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    client: tuple[str, int] | None = None
    key: Key | None = None
    left: tuple[int, float] | None = None
    silence: float | None = None

    @classmethod
    def of(cls, scope: Scope, body: bytes, call: Call, headers: Sequence[tuple[bytes, bytes]]) -> Passed:
        """The request of an ASGI scope, on behalf of whose it is by its `call`."""
        left = None if call.quota is None else call.quota.share()
        return cls(
            scope["method"], scope["path"], scope.get("root_path", ""), scope["query_string"], headers, body,
            scope.get("client"), call.key, left, scope.get(SILENCE),
        )  # fmt: skip

    def scope(self) -> Scope:
        """As an ASGI scope."""
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": self.method, "path": self.path, "raw_path": self.path.encode(), "root_path": self.root_path,
            "query_string": self.query_string, "headers": list(self.headers), "client": self.client,
            "server": ("127.0.0.1", None), "state": {}, KEY: self.key, LEFT: self.left,
            SILENCE: self.silence,
        }  # fmt: skip


def for_replicas(settings: Settings, threads: int | None) -> Settings:
    """The settings of a replica: who may ask it what, signs of life and the studio are the front's business."""
    return settings.model_copy(update={
        "config": None, "host": "127.0.0.1", "keys": None, "api_key": None, "insecure": True, "allowed_hosts": ("*",),
        "access_log": False, "stream_keep_alive": 0.0, "threads": settings.threads or threads, "replicas": 1,
        "max_replicas": None, "studio": False,
    })  # fmt: skip


class Replica:
    """The application over `models`. Used on one event loop."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._app = create_api(models, models.settings)
        self._app.user_middleware.append(Middleware(_Within))
        self._living: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Raise the `EngineStopped` after which only a new process can help, if that has happened."""
        if self._models.lost is not None:
            raise self._models.lost

    def metrics(self) -> str:
        """What is counted here, as Prometheus reads it."""
        return generate_latest(self._models.metrics.registry).decode()

    async def answer(self, request: Passed) -> AsyncGenerator[list[Message], None]:
        """The answer's ASGI messages, those together that came together; first `ARRIVED`, then `DIALECT`, last `CALL`.

        Left before its end, the client counts as gone.
        """
        self._live()
        yield [{"type": ARRIVED}]
        messages: list[Message] = []
        news, gone = asyncio.Event(), asyncio.Event()
        body: list[bytes] = [request.body]

        async def receive() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.append(message)
            news.set()

        running = asyncio.ensure_future(self._app(request.scope(), receive, send))
        running.add_done_callback(lambda _: news.set())
        try:
            while not running.done() or messages:
                await news.wait()
                news.clear()
                if messages:
                    taken = messages.copy()
                    messages.clear()
                    yield taken
            await running
        finally:
            gone.set()
            if not running.done():
                await asyncio.wait({running}, timeout=LAST_SECONDS)
                running.cancel()

    def _live(self) -> None:
        """Begin the application's life, which goes on until the process ends."""
        if self._living is None:
            self._living = asyncio.create_task(_alive(self._app))


async def _alive(app: FastAPI) -> None:
    async with app.router.lifespan_context(app):
        await asyncio.Event().wait()


class _Within:
    """Innermost in a replica's application: on whose behalf a request is, and what it took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = current_call()
        if scope["type"] != "http" or call is None:
            await self._app(scope, receive, send)
            return
        call.key = scope[KEY]
        share = None if call.key is None or scope[LEFT] is None else Share(call.key.name, *scope[LEFT])
        call.quota, taken = share, 0

        async def told(message: Message) -> None:
            nonlocal taken
            if message["type"] == "http.response.start":
                await send({"type": DIALECT, "name": dialect_of(scope).name})
            if share is not None and share.taken != taken:
                taken = share.taken
                await send({"type": TAKEN, "tokens": taken})
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last:
                await send({"type": CALL} | _about(call))
            await send(message)

        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, receive, told)


def _about(call: Any) -> dict[str, Any]:
    return {name: getattr(call, name) for name in TOLD}


TOLD = ("model", "refusal", "prompt_tokens", "generated_tokens", "queue_s", "first_token_s")
"""What the front is told of a request's `Call`."""
