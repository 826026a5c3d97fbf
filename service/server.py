"""`topkapi serve`: a bound socket, loaded checkpoints, and a clean end."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from service.api.checkpoints import describe
from service.app import create_app
from service.gate import Gate
from service.models import Models
from service.settings import Settings

GRACE_SECONDS = 1
"""How long open connections may take to end after a signal, once their engines have been told to stop."""


def serve(settings: Settings, listener: socket.socket, locations: list[str]) -> int:
    """Serve until SIGINT or SIGTERM. While checkpoints load, `/health` and `/ready` say not yet.

    Raises `SettingsError` and `CheckpointError` for what can't be served.
    """
    with listener:
        models = Models(settings)
        gate = Gate(models)
        config = uvicorn.Config(
            gate,
            log_level="info" if settings.access_log else "warning",
            access_log=settings.access_log,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )

        def make() -> FastAPI:
            load(models, locations)
            return create_app(models, settings)

        server = Server(config, models, listener, lambda: gate.open(make))
        try:
            server.run(sockets=[listener])
        finally:
            models.close()
        if models.loading is not None:
            # What loads can't be stopped half-way, and the interpreter can't be taken down around it.
            sys.stdout.flush()
            os._exit(0)
        if server.failure is not None:
            raise server.failure
    return 0


def load(models: Models, locations: list[str]) -> None:
    """Load the checkpoints, saying what each is."""
    if models.settings.threads is not None:
        torch.set_num_threads(models.settings.threads)
    for location in locations:
        print(f"  {summary(describe(models, models.load(location)))}", flush=True)


def summary(details: dict[str, object]) -> str:
    """One line about a loaded checkpoint."""
    parameters = details["parameters"]
    assert isinstance(parameters, int)
    size = f"{parameters / 1e6:.1f}M" if parameters >= 1e5 else f"{parameters / 1e3:.1f}K"
    kind = "chat" if details["chat"] else "base"
    return (
        f"{details['name']}: {kind} checkpoint, {details['family']}, {size} parameters ({details['dtype']}), "
        f"context {details['context_length']}, vocabulary {details['vocab_size']}"
    )


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
        super().__init__(config)
        self.failure: Exception | None = None
        self._models = models
        self._listener = listener
        self._opening = opening
        self._opened: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends the server as asked for, with exit code 0; a second one while it ends, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

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
        host, port = self._listener.getsockname()[:2]
        shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{port}{self._models.settings.root_path or ''}"
        print(f"Ready at {url} (API documentation: {url}/docs). Ctrl-C stops the server.", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End running requests as cancelled, then the connections."""
        if self._opened is not None:
            self._opened.cancel()
        await asyncio.to_thread(self._models.close)
        await super().shutdown(sockets)
