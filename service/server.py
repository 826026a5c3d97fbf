"""`topkapi serve`: a bound socket, connections within bounds, loaded checkpoints, and a clean end.

uvicorn bounds the size of a request's head and the idle time after an answer; what dribbles in, what never begins and
what is never read to its end it would wait for without end. An answer that is read slowly is nobody's attack; one of
which nothing worth mentioning is read for long is, and its connection ends. (A body that dribbles in is told so by
`service.api.http.middleware`, in the dialect of its route.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, ClassVar, Literal, NoReturn, cast

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from topkapi.model.errors import EngineStopped
from topkapi.service.app import add_studio, create_api
from topkapi.service.following import all_followed, follow
from topkapi.service.garbage import set_aside
from topkapi.service.keys import KeyRing, is_loopback
from topkapi.service.loading import load
from topkapi.service.logs import complain, say, set_up
from topkapi.service.models import Models
from topkapi.service.requests import Gate, Requests
from topkapi.service.settings import Settings

logger = logging.getLogger(__name__)

ENGINE_SECONDS = 2.0
"""How long engines may take to end their step after a signal; then what they do is ended for them."""

GRACE_SECONDS = 1.0
"""How long answers may take to be sent after that."""

LAST_SECONDS = 4.5
"""After which the process ends whatever it still waits for."""

ENGINE_FAILED = 70
"""The exit code of a process that ends because its engine broke down or hangs, for a supervisor to start another one.
(EX_SOFTWARE of sysexits.h)"""


def serve(settings: Settings, listener: socket.socket, locations: list[str]) -> int:
    """Serve until SIGINT or SIGTERM, and end the process. While checkpoints load, `/health` and `/ready` say not yet.

    The exit code is 0 after a signal and `ENGINE_FAILED` where only a new process can help. Raises `SettingsError` and
    `CheckpointError` for what can't be served.
    """
    set_up(settings.log_format, access=settings.access_log, texts=settings.log_texts)
    if not KeyRing.of(settings).required and not is_loopback(settings.host):
        logger.warning("there are no keys: whoever can reach %s may use this server", settings.host)
    with listener:
        models = Models(settings)
        app = create_api(models, settings)
        gate = Gate(models, app)
        replicas = None
        if settings.replicated:
            from topkapi.service.replicas.front import stand_before
            from topkapi.service.replicas.ray_serve import RayReplicas

            replicas = RayReplicas()
            stand_before(replicas, app, models)
        config = uvicorn.Config(
            gate,
            # The log is set up for all that is logged, uvicorn's own lines included.
            log_config=None,
            log_level="warning",
            access_log=False,
            forwarded_allow_ips=list(settings.trusted_proxies),
            timeout_graceful_shutdown=1,
        )

        def make_ready() -> None:
            set_aside()
            if replicas is not None:
                replicas.start(settings, locations, listener.getsockname()[1])
                return
            # Where links lead is noted before it is loaded.
            links = all_followed(models, locations) if settings.follow else []
            load(models, locations)
            follow(models, links)
            add_studio(app, models, settings)

        server = Server(config, models, listener, lambda: gate.open(make_ready))
        try:
            server.run(sockets=[listener])
        finally:
            models.close(0)
            if replicas is not None:
                replicas.end()
            if models.tracing is not None:
                models.tracing.close()
        if server.lost is not None:
            complain(f"{server.lost.message}: the process ends, to be started anew")
            leave(ENGINE_FAILED)
        if server.failure is not None and not server.signalled:
            raise server.failure
    # Taking the interpreter down takes seconds, and no end where a thread loads, hangs or reads a long text.
    leave(0)


def leave(code: int) -> NoReturn:
    """End the process now, with everything said that was to be said."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


LINGER_SECONDS = 1.0
"""How long a connection stays open for its refusal to be read: what is closed while more comes in may lose that."""

MOST_HEAD_BYTES = 16 * 1024
"""Of a request's head, of a chunk's and of trailers that have come in by halves, as in uvicorn."""

SMALL_CHUNKS, WORTH_A_CHUNK = 4096, 256
"""Chunks of a body that may be of any size, and the bytes that make up for one more."""

MOST_LINGERING = 128
"""Connections that may linger together; of more, each is closed at once."""

Phase = Literal["idle", "head", "rest"]
"""What a connection is waited for: a request, the rest of its head, or the rest of a body that was answered already."""


class _Gentle:
    """A transport that is closed gently where more of a request is on its way."""

    def __init__(self, transport: asyncio.Transport, connection: BoundedConnection) -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._transport.is_closing() or self._connection.leaving

    def close(self) -> None:
        if self._connection.conn.their_state is not h11.SEND_BODY or not self._connection.linger():
            self._transport.close()


class _Counted(h11.Connection):
    """Takes a body in chunks of a few bytes for malformed once there are many: reading them keeps everybody waiting,
    20 µs for each, and no client that has something to say sends them."""

    _spare = float(SMALL_CHUNKS)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11's. Raises `h11.RemoteProtocolError` for too many chunks, too."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._spare = SMALL_CHUNKS
        elif isinstance(event, h11.Data):
            self._spare += len(event.data) / WORTH_A_CHUNK - event.chunk_start
            if self._spare < 0:
                raise h11.RemoteProtocolError("the body comes in too many chunks")
        return event


class BoundedConnection(H11Protocol):
    """uvicorn's connection, within the bounds of the settings."""

    settings: ClassVar[Settings]
    lingering: ClassVar[set[BoundedConnection]]
    _phase: Phase | None = None
    _timer: asyncio.TimerHandle | None = None
    leaving = False
    """Whether all has been said, and what still comes in is thrown away until the client has read it."""
    _unread: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Counted(h11.SERVER, MOST_HEAD_BYTES)

    def send_400_response(self, msg: str) -> None:
        """Say that what came in is no request; where an answer has begun, or is over, all that is left is to end."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: whoever asks for a web socket is answered without one, and is told so by that."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, unless there are too many connections already."""
        super().connection_made(_Gentle(transport, self))  # type: ignore[arg-type]
        most = self.settings.max_connections
        if len(self.connections) > most:
            hint = "close some, or start the server with more --max-connections"
            self._refuse("503 Service Unavailable", "too_many_connections", f"{most} connections are open", hint)
        else:
            self._wait_for("idle")

    def data_received(self, data: bytes) -> None:
        """Take in what came, and see what is waited for now."""
        if not self.leaving:
            super().data_received(data)
            self._look(begun=True)

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one, which nobody reads any more."""
        super().on_response_complete()
        self._look(begun=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._wait_for(None)
        self._look_at_reading(None)
        self.lingering.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """So much is unread that no more is written: from here on, the client has its time to read it."""
        super().pause_writing()
        self._look_at_reading(self.settings.write_timeout or None)

    def resume_writing(self) -> None:
        """Most of it has been read."""
        super().resume_writing()
        self._look_at_reading(None)

    def _look_at_reading(self, seconds: float | None) -> None:
        if self._unread is not None:
            self._unread.cancel()
        self._unread = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _look(self, *, begun: bool) -> None:
        if self.transport.is_closing():
            self._wait_for(None)
        elif self.conn.their_state is h11.IDLE:
            # Once begun, a head has its time, however many pieces it comes in.
            self._wait_for("head" if begun or self._phase == "head" else "idle")
        elif self.conn.their_state is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete:
            self._wait_for("rest")
        else:
            self._wait_for(None)

    def _wait_for(self, phase: Phase | None) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if phase is not None:
            seconds = self.settings.idle_timeout if phase == "idle" else self.settings.request_timeout
            self._timer = self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        if self.transport.is_closing():
            return
        if self._phase == "head":
            told = f"the request's head did not come in within {self.settings.request_timeout:g} s"
            self._refuse("408 Request Timeout", "request_timeout", told, "send it at once")
        else:
            self.transport.close()

    def _refuse(self, status: str, kind: str, message: str, hint: str) -> None:
        """Answer without having been asked, and close the connection soon."""
        body = json.dumps({"error": {"type": kind, "message": message, "hint": hint}}).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + body)
        if not self.linger():
            self.transport.abort()

    def linger(self) -> bool:
        """Say that no more will come, and leave once the client does, or soon. Whether there is a place for that."""
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        self._wait_for(None)
        if len(self.lingering) >= MOST_LINGERING:
            return False
        self.leaving = True
        self.lingering.add(self)
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        if self.transport.can_write_eof():
            # A client that has left already can't be told.
            with contextlib.suppress(OSError):
                self.transport.write_eof()
        return True


def bounded(settings: Settings) -> type[asyncio.Protocol]:
    """The class of connections within the bounds of `settings`, for `uvicorn.Config.http`."""
    attributes: dict[str, Any] = {"settings": settings, "lingering": set()}
    return type("Connection", (BoundedConnection,), attributes)


class Server(uvicorn.Server):
    """uvicorn's server; on a signal it first ends what the engines are doing, so that streams end properly.

    Once it listens, `opening` is awaited and then said where it is ready; where that fails, the server ends and
    `failure` is why.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        models: Models,
        listener: socket.socket,
        opening: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        app = config.app.app if isinstance(config.app, Gate) else config.app
        api = app if isinstance(app, FastAPI) else None
        self._requests = Requests(cast(ASGIApp, config.app), api, models.settings.root_path)
        config.app = self._requests
        config.http = bounded(models.settings)
        config.ws = "none"
        config.timeout_keep_alive = math.ceil(models.settings.idle_timeout)
        super().__init__(config)
        self.failure: Exception | None = None
        self.lost: EngineStopped | None = None
        """Why only a new process can help, if that is what the server ends for."""
        self.signalled = False
        self._models = models
        self._listener = listener
        self._opening = opening
        self._opened: asyncio.Task[None] | None = None
        self._drained_by: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first SIGTERM has the server finish what runs; another signal ends it as asked for, with exit code 0, and
        another one while it ends, at once."""
        seconds = self._models.settings.drain_seconds
        if sig == signal.SIGTERM and seconds and self._drained_by is None and not self.should_exit:
            # Nothing of asyncio's: a signal may come between any two instructions.
            self._drained_by = time.monotonic() + seconds
            self.signalled = self._models.draining = True
            self._requests.drain()
            return
        self.force_exit = self.should_exit
        self.signalled = self.should_exit = True
        self._end_at_last(0)

    def _end_at_last(self, code: int) -> None:
        last = threading.Timer(LAST_SECONDS, leave, (code,))
        last.daemon = True
        last.start()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: after a signal, or where the engines need a new process."""
        if self._models.lost is not None and not self.should_exit:
            self.lost = self._models.lost
            self.should_exit = True
            if threading.current_thread() is threading.main_thread():
                self._end_at_last(ENGINE_FAILED)
        if self._drained_by is not None and not self.should_exit and self._is_drained(self._drained_by):
            self.should_exit = True
            self._end_at_last(0)
        return await super().on_tick(counter)

    def _is_drained(self, until: float) -> bool:
        """Whether nothing runs any more, or the time for it is over; what is still being loaded is not waited for."""
        loaded = self._opened is not None and self._opened.done()
        return not loaded or time.monotonic() >= until or (not self._requests.waited_for and self._models.idle)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and let `opening` go on meanwhile."""
        await super().startup(sockets)
        if self.started:
            self._opened = asyncio.create_task(self._open())

    async def _open(self) -> None:
        try:
            if self._opening is not None:
                await self._opening()
        except Exception as error:
            self.failure = error
            self.should_exit = True
            return
        if threading.current_thread() is threading.main_thread():
            # Ray, which is started meanwhile, puts handlers before these, which print a trace of the process first.
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.getsignal(each))
        host, port = self._listener.getsockname()[:2]
        shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{port}{self._models.settings.root_path or ''}"
        say(f"Ready at {url} (API documentation: {url}/docs). Ctrl-C stops the server.")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End running requests as cancelled, then the connections."""
        if self._opened is not None:
            self._opened.cancel()
        for server in self.servers:
            server.close()
        self._requests.stop()
        self._models.stop()
        loop = asyncio.get_running_loop()
        until = loop.time() + (0 if self.lost or self.force_exit else ENGINE_SECONDS)
        while not self._models.stopped and loop.time() < until:
            await asyncio.sleep(0.02)
        self._models.close(0)
        await self._requests.wait(0 if self.force_exit else GRACE_SECONDS)
        # All are `BoundedConnection`s.
        for connection in cast("list[H11Protocol]", list(self.server_state.connections)):
            if connection.cycle is not None and not connection.cycle.response_complete:
                # Its client has not read what it was sent; there is nothing to wait for.
                connection.transport.abort()
        await super().shutdown(sockets)
