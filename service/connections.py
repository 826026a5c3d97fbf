"""Connections with bounds: how many there are, how long they may be idle, and how long a request may take to come in.

uvicorn bounds the size of a request's head and the idle time after an answer; what dribbles in, what never begins and
what is never read to its end it would wait for without end. An answer that is read slowly is nobody's attack; one of
which nothing worth mentioning is read for long is, and its connection ends. (A body that dribbles in is told so by
`service.api.http.middleware`, in the dialect of its route.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, ClassVar, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from topkapi.service.settings import Settings

LINGER_SECONDS = 1.0
"""How long a connection stays open for its refusal to be read: what is closed while more comes in may lose that."""

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


class BoundedConnection(H11Protocol):
    """uvicorn's connection, within the bounds of the settings."""

    settings: ClassVar[Settings]
    lingering: ClassVar[set[BoundedConnection]]
    _phase: Phase | None = None
    _timer: asyncio.TimerHandle | None = None
    leaving = False
    """Whether all has been said, and what still comes in is thrown away until the client has read it."""
    _unread: asyncio.TimerHandle | None = None

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
