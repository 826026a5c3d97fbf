"""A client for measuring: streams of a running server, whose events are only counted while they come in.

Client and server often share their cores, so that whatever the client did besides would be measured too.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from topkapi.model.errors import SettingsError

TOKEN = b"event: token\n"
"""How the head of a token's event ends."""

PATIENCE = 600.0
"""Seconds without a byte after which a stream counts as lost."""


@dataclass(frozen=True)
class Server:
    """Where a server listens: `http://host:port/prefix`."""

    host: str
    port: int
    prefix: str = ""
    encrypted: bool = False

    @classmethod
    def at(cls, url: str) -> Server:
        """Raises `SettingsError` for what is no address of a server."""
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise SettingsError(
                f"--url {url!r} is not the address of a server", field="url", hint="such as --url http://127.0.0.1:8000"
            )
        return cls(parts.hostname, port, parts.path.rstrip("/"), parts.scheme == "https")

    def __str__(self) -> str:
        return f"http{'s' if self.encrypted else ''}://{self.host}:{self.port}{self.prefix}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises `SettingsError` where nobody listens."""
        try:
            context = ssl.create_default_context() if self.encrypted else None
            return await asyncio.open_connection(self.host, self.port, ssl=context)
        except OSError as error:
            raise SettingsError(
                f"nothing answers at {self} ({error.strerror or error})", field="url",
                hint="start it with topkapi serve, or leave --url out to measure in this process",
            ) from None  # fmt: skip

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """An HTTP request after which the server closes the connection."""
        head = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        key = os.environ.get("TOPKAPI_API_KEY", "")
        if key and not key.startswith("sha256:"):
            head.append(f"Authorization: Bearer {key}")
        if body:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*head, "", ""]).encode() + body

    async def models(self) -> list[dict[str, Any]]:
        """What `/models` lists. Raises `SettingsError` where that is no Topkapi server."""
        reader, writer = await self.connect()
        writer.write(self.request("GET", "/models"))
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        try:
            if b" 401 " in head.split(b"\r\n")[0]:
                hint = "set TOPKAPI_API_KEY to one of its keys"
                raise SettingsError(f"{self} answers only to those who have a key", field="url", hint=hint)
            if b" 200 " not in head.split(b"\r\n")[0]:
                raise ValueError("another status")
            listed: list[dict[str, Any]] = json.loads(body)["models"]
        except (ValueError, KeyError, TypeError):
            first = head.split(b"\r\n")[0].decode(errors="replace")[:100]
            raise SettingsError(f"{self} is no Topkapi server: GET /models answered {first!r}", field="url") from None
        return listed

    async def generate(self, bodies: Sequence[dict[str, Any]]) -> list[list[float]]:
        """Ask for all at once; for each, when its tokens came, in seconds since. Raises `SettingsError` with what the
        server said where it refuses one."""
        requests = [self.request("POST", "/generate", json.dumps(body | {"stream": True}).encode()) for body in bodies]
        began = time.perf_counter()
        received = await asyncio.gather(*(self._follow(request, began) for request in requests))
        return [self._tokens(*each) for each in received]

    async def _follow(self, request: bytes, began: float) -> tuple[bytearray, list[float]]:
        """What came, and when each `token` event did."""
        reader, writer = await self.connect()
        writer.write(request)
        times: list[float] = []
        received = bytearray()
        while part := await asyncio.wait_for(reader.read(2**16), PATIENCE):
            now = time.perf_counter() - began
            # An event's head may come in two parts, and is counted with the second.
            before = max(0, len(received) - len(TOKEN) + 1)
            received += part
            times.extend([now] * received.count(TOKEN, before))
        writer.close()
        return received, times

    def _tokens(self, received: bytearray, times: list[float]) -> list[float]:
        """When each token came: an event may have several, or, with text that was held back to the end, none."""
        *events, last = bytes(received).split(TOKEN)
        if b"event: done\n" not in last:
            said = last.decode(errors="replace").strip().splitlines() or ["nothing"]
            raise SettingsError(f"{self} did not answer to the end, and said last: {said[-1][:300]}", field="url")
        found = []
        for at, event in zip(times, [*events[1:], last] if events else [], strict=True):
            data = event.split(b"\n", 1)[0].removeprefix(b"data:")
            found.extend([at] * len(json.loads(data)["token_ids"]))
        return found
