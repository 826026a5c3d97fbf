"""One request over a bare connection: as a client sends it, or as one that leaves, dawdles or breaks off does."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.soak.cases import Case

LONGEST = 180.0
"""Seconds after which a request that has no end counts as lost."""


@dataclass
class Outcome:
    """What became of a request. `status` 0: no answer, `broken`: the connection ended before the answer did."""

    identifier: str
    kind: str
    case: Case
    sent_at: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    broken: bool = False
    attempt: int = 0


async def ask(url: str, outcome: Outcome, *, leave_after: float | None = None, slowly: bool = False,
              raw: bytes | None = None, authority: str | None = None) -> Outcome:  # fmt: skip
    """Send the request of `outcome` (or the body `raw`) and fill in what came; with `leave_after` hang up then."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(LONGEST if leave_after is None else leave_after):
            await _exchange(url, outcome, slowly, raw, authority)
    except TimeoutError:
        outcome.broken = True
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        outcome.broken, outcome.headers = True, outcome.headers | {"failure": repr(error)}
    outcome.seconds = time.monotonic() - began
    return outcome


async def _exchange(url: str, outcome: Outcome, slowly: bool, raw: bytes | None, authority: str | None) -> None:
    address = urlsplit(url)
    plain = socket.socket()
    plain.setblocking(False)
    if slowly:
        # As little as the kernel allows, so that what is not read fills up on the server's side.
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    try:
        await asyncio.get_running_loop().sock_connect(plain, (address.hostname, address.port))
        reader, writer = await asyncio.open_connection(sock=plain, limit=2048 if slowly else 65536)
    except BaseException:
        plain.close()
        raise
    try:
        body = json.dumps(outcome.case.body).encode() if raw is None else raw
        head = [
            f"POST {outcome.case.path} HTTP/1.1", "Host: localhost", "Connection: close",
            "Content-Type: application/json", f"Content-Length: {len(body)}", f"X-Request-Id: {outcome.identifier}",
            *(() if authority is None else (f"Authorization: Bearer {authority}",)),
        ]  # fmt: skip
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        outcome.status = int(status.split()[1])
        outcome.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        outcome.body = await _read(reader, outcome.headers, slowly)
    finally:
        writer.transport.abort() if outcome.status == 0 else writer.close()


async def _read(reader: asyncio.StreamReader, headers: dict[str, str], slowly: bool) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers["content-length"]))
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
        if slowly:
            await asyncio.sleep(0.1)
    return b"".join(parts)


def send(url: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """A request of whoever operates the server, on the calling thread."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LONGEST)
    try:
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def probe(url: str, path: str) -> None:
    """Ask `/health` ten times a second, in a process of its own, and write the seconds that each answer took."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(path, "w", buffering=1) as file:
        while True:
            began = time.perf_counter()
            try:
                status, _ = send(url, "GET", "/health")
            except OSError:
                status = 0
            file.write(f"{time.perf_counter() - began if status == 200 else 1e9}\n")
            time.sleep(0.1)
