"""`topkapi serve`: a bound socket, loaded checkpoints, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
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
from typing import NoReturn, cast

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from topkapi.model.errors import EngineStopped
from topkapi.service.app import add_studio, create_api
from topkapi.service.connections import bounded
from topkapi.service.following import all_followed, follow
from topkapi.service.garbage import set_aside
from topkapi.service.gate import Gate
from topkapi.service.keys import KeyRing, is_loopback
from topkapi.service.loading import load
from topkapi.service.logs import complain, say, set_up
from topkapi.service.models import Models
from topkapi.service.requests import Requests
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
        # All are of `service.connections`, whose class is uvicorn's for h11.
        for connection in cast("list[H11Protocol]", list(self.server_state.connections)):
            if connection.cycle is not None and not connection.cycle.response_complete:
                # Its client has not read what it was sent; there is nothing to wait for.
                connection.transport.abort()
        await super().shutdown(sockets)
