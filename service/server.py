"""`topkapi serve`: a bound socket, loaded checkpoints, and a clean end."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from model.errors import SettingsError
from service.api.checkpoints import describe
from service.app import create_app
from service.gate import Gate
from service.models import Models, default_checkpoints
from service.settings import Settings
from service.version import VERSION

FLAGS = (
    "host",
    "port",
    "dtype",
    "threads",
    "draft",
    "root_path",
    "model_directory",
    "stream_grace",
    "max_queue",
    "cors_origins",
    "allowed_hosts",
    "studio",
    "access_log",
    "ignore_unknown_fields",
)
GRACE_SECONDS = 1
"""How long open connections may take to end after a signal, once their engines have been told to stop."""


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. While checkpoints load, `/health` and `/ready` say not yet.

    Raises `SettingsError` and `CheckpointError` for what can't be served.
    """
    settings = Settings.read(**{name: getattr(arguments, name) for name in FLAGS})
    # The port is taken first: finding out that it is in use should not take as long as loading.
    listener = bind(settings.host, settings.port)
    with listener:
        print(f"Topkapi {VERSION}", flush=True)
        models = Models(settings)
        gate = Gate(models)
        config = uvicorn.Config(
            gate,
            log_level="info" if settings.access_log else "warning",
            access_log=settings.access_log,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )

        def make() -> FastAPI:
            load(models, arguments.checkpoint)
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
    """Load the named checkpoints, or the default ones, saying what each is."""
    if models.settings.threads is not None:
        torch.set_num_threads(models.settings.threads)
    for location in locations or default_checkpoints(models.settings):
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


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises `SettingsError` saying why it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise SettingsError(f"{host!r} is not an address of this machine", hint="use --host 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listening at once makes a second server on the port fail now instead of after loading.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: (f"port {port} on {host} is in use", "choose another one with --port, or 0 for any"),
            errno.EACCES: (f"port {port} is reserved for the system", "choose one above 1023 with --port"),
            errno.EADDRNOTAVAIL: (f"{host} is not an address of this machine", "use --host 127.0.0.1"),
        }
        message, hint = reasons.get(error.errno or 0, (f"cannot listen on {host}:{port}: {error.strerror}", None))
        raise SettingsError(message, field="port", hint=hint) from None
    return listener


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
