"""What stands before replicas: the application's rules for who may ask what, and each request passed on to one of them.

It has the application's middleware, routes and studio, and no checkpoints: what routes take is for replicas to answer.
A replica that is lost takes its own requests with it; their clients are told so, and to send them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.service.api.http.answering import written
from topkapi.service.api.http.authority import OPEN, changes_what_is_loaded
from topkapi.service.api.http.dialect import Dialect, dialect_of
from topkapi.service.api.http.errors import INTERNAL, Refused, error_response
from topkapi.service.calls import Call, current_call
from topkapi.service.models import Models
from topkapi.service.quotas import UnderWay
from topkapi.service.replicas.replica import ARRIVED, CALL, DIALECT, TAKEN, TOLD, Passed
from topkapi.service.replicas.summing import together
from topkapi.service.ui.late import place_studio

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
"""After which whoever lost a replica may try again: another one answers at once."""

START_SECONDS = 10
"""After which a client may try again where no replica runs: about what one takes to start."""

PROBE_SECONDS = 2.0
"""How long a probe waits for a replica."""

GATHER_SECONDS = 5.0
"""How long metrics are waited for."""


class ReplicaLost(TopkapiError):
    """The replica that computed the answer is gone, or there is none."""

    status = 503
    kind = "replica_lost"
    retry_after = RETRY_SECONDS


class Replicas(Protocol):
    """The replicas, however they are reached."""

    def ask(self, request: Passed, replica: str | None) -> AsyncGenerator[list[Message], None]:
        """What `Replica.answer` gives, of the one called `replica` if it is there, else of one that has little to do.

        Raises `ReplicaLost`. Closing it ends the request.
        """
        ...

    async def metrics(self, seconds: float) -> dict[str, str]:
        """What each replica counts, by its name; those that don't answer in time are left out."""
        ...


def stand_before(replicas: Replicas, app: FastAPI, models: Models) -> None:
    """Have `app` pass on to `replicas` what comes through its middleware; `models`, empty, says whether it drains."""
    app.user_middleware.append(Middleware(Front, models=models, replicas=replicas))
    if models.settings.studio:
        place_studio(app, models, models.settings)


class Front:
    """Innermost of what stands around the routes: passes requests on in their place."""

    def __init__(self, app: ASGIApp, models: Models, replicas: Replicas) -> None:
        self._app, self._models, self._replicas = app, models, replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")).rstrip("/") or "/"
        if scope["type"] != "http" or (path in OPEN and self._models.draining) or not _taken(scope, path):
            # What no route of the API takes is described, shown or refused here: pages ask one process alone, and
            # whether the routes need a key, replicas don't know.
            await self._app(scope, receive, send)
            return
        call = current_call() or Call()
        try:
            if path == "/metrics":
                await self._metrics(scope, receive, send)
            elif changes_what_is_loaded(scope["method"], path):
                raise Refused(
                    409, "conflict", "replicas serve the checkpoints and adapters that they were started with",
                    hint="start the server anew with others; deployed on Ray Serve, deploy it again",
                )  # fmt: skip
            else:
                answering = _Answering(scope, receive, send, call, self._replicas)
                await answering.answer(path, self._seconds(path, call))
        except ReplicaLost as error:
            if path in OPEN:
                # Probes are told of this process, in their own shape.
                await self._app(scope, receive, send)
            else:
                await error_response(error, dialect_of(scope))(scope, receive, send)
        except TopkapiError as error:
            await error_response(error, dialect_of(scope))(scope, receive, send)

    def _seconds(self, path: str, call: Call) -> float:
        """How long a request may wait for a replica to take it."""
        if path in OPEN:
            return PROBE_SECONDS
        longest = self._models.settings.max_queue_seconds or 3600.0
        return longest if call.deadline is None else max(0.0, min(longest, call.deadline - time.monotonic()))

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts = await self._replicas.metrics(GATHER_SECONDS)
        content = together(self._models.metrics.registry, texts)
        await Response(content, media_type=CONTENT_TYPE_LATEST)(scope, receive, send)


class _Answering:
    """One request, from its body to the last message of its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, call: Call, replicas: Replicas) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._call, self._replicas = call, replicas
        self._dialect: Dialect = dialect_of(scope)
        self._started = self._stream = self._over = False
        self._taken = 0

    async def answer(self, path: str, seconds: float) -> None:
        """Pass the request on. Raises `TopkapiError` where nothing has been answered yet."""
        body = await _whole(self._receive)
        if body is None:
            return
        under_way = UnderWay()
        if self._call.quota is not None and self._scope["method"] == "POST":
            self._call.quota.enter(under_way)
        request = Passed.of(self._scope, body, self._call, self._headers())
        passing = asyncio.ensure_future(self._pass_on(request, _holder(path, self._scope), seconds))
        leaving = asyncio.ensure_future(_left(self._receive))
        try:
            await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            # Whoever has been told everything has not left before the end, though the connection counts as left then.
            if passing.done() or self._over:
                await passing
            else:
                self._call.refusal = "client_gone"
        finally:
            under_way.over = True
            passing.cancel()
            leaving.cancel()
            await asyncio.gather(passing, leaving, return_exceptions=True)

    def _headers(self) -> Sequence[tuple[bytes, bytes]]:
        """The request's, under the name that it has here, and below its span."""
        given = {"x-request-id": self._call.identifier} | (self._call.trace or {})
        ours = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
        replaced = {name for name, _ in ours}
        return [*((name, value) for name, value in self._scope["headers"] if name not in replaced), *ours]

    async def _pass_on(self, request: Passed, holder: str | None, seconds: float) -> None:
        try:
            async with contextlib.aclosing(self._replicas.ask(request, holder)) as batches:
                try:
                    async with asyncio.timeout(seconds):
                        batch = await anext(batches)
                except TimeoutError:
                    error = ReplicaLost("no replica takes requests at the moment", hint="try again in a moment")
                    error.retry_after = START_SECONDS
                    raise error from None
                assert batch[0]["type"] == ARRIVED
                async for batch in batches:
                    for message in batch:
                        await self._forward(message)
        except TopkapiError as error:
            await self._break_off(error)
        except Exception:
            logger.exception("a request could not be passed on")
            await self._break_off(INTERNAL)

    async def _forward(self, message: Message) -> None:
        if message["type"] == DIALECT:
            self._dialect = self._scope["app"].state.dialects.named(message["name"]) or self._dialect
        elif message["type"] == TAKEN:
            if self._call.quota is not None:
                self._call.quota.use("tokens", message["tokens"] - self._taken)
            self._taken = message["tokens"]
        elif message["type"] == CALL:
            for name in TOLD:
                setattr(self._call, name, message[name])
        else:
            if message["type"] == "http.response.start":
                self._started = True
                self._stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            self._over = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def _break_off(self, error: TopkapiError) -> None:
        """Tell of an error in whatever way is left. Raises it where nothing has been said yet."""
        if not self._started:
            raise error
        if self._over or not self._stream:
            # An answer whose length was announced ends with its connection.
            return
        self._call.refusal = error.kind
        last = written(self._dialect.failure(error), mark=self._dialect.data_mark)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


def _taken(scope: Scope, path: str) -> bool:
    """Whether a route of the API takes a request."""
    routes = scope["app"].state.api_routes
    return any(route.path_regex.match(path) and scope["method"] in route.methods for route in routes)


async def _whole(receive: Receive) -> bytes | None:
    """The request's body; None where its client left before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _holder(path: str, scope: Scope) -> str | None:
    """The name of the replica that keeps the stream which a request goes on with, if it does."""
    name = path.removeprefix("/streams/") if path.startswith("/streams/") else ""
    if not name:
        given = dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1")
        name = given.rpartition(":")[0]
    return holder_of(name)


def holder_of(stream: str) -> str | None:
    """The name of the replica that keeps a stream, which stands at the end of the stream's own."""
    kind, *rest = stream.split("-")
    return rest[1] if len(rest) == 2 and kind else None
