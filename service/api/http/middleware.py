"""What stands around the routes: the name, the deadline and the line in the log of every request, by which names and
from which pages it may be called, how large and how slow a body may be, signs of life on streams that wait, and the
path of a proxy.

A page of a stranger's can reach servers of its visitor's own machine and network: by a name of its own that it has
turned to their address (DNS rebinding), or by requests that browsers send without asking first. The name by which a
request came and the page it came from tell both.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.errors import BodyTooLarge, Refused, RequestTimeout, error_response
from topkapi.service.calls import Call, enter
from topkapi.service.logs import ACCESS
from topkapi.service.metrics import Metrics
from topkapi.service.tracing import Tracing

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
"""They change nothing, and what they answer no page of another origin can read."""

STUDIO_BYTES = 2 * 2**20
"""Largest body of the studio's own routes, which Gradio reads on the event loop; a conversation fits many times."""

LEAST_BYTES_PER_S = 1024
"""A body may take the settings' seconds and as long as it takes at this rate."""

SILENCE = "topkapi.silence"
"""Where a request's scope says for how many seconds its stream may be silent, if there is a limit."""

COMMENT = b": still here\n\n"
"""A comment among server-sent events, which clients skip (WHATWG HTML, section 9.2)."""


class AllowedHosts:
    """Answers only by its own names: loopback ones, the address it listens on, and those it is told (`allowed`).

    Where it listens on every interface, any literal address will do as well: rebinding needs a name. A request without
    the header, as some probes send it, comes from no browser.
    """

    def __init__(self, app: ASGIApp, listening: str, allowed: Iterable[str]) -> None:
        self._app = app
        self._names = {each.lower().rstrip(".") for each in (listening, *allowed)}
        self._any = "*" in self._names
        self._suffixes = (".localhost", *(name[1:] for name in self._names if name.startswith("*.")))
        self._any_address = listening in ("", "0.0.0.0", "::")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what came by another name with 421."""
        given = [value for name, value in scope.get("headers", ()) if name == b"host"]
        if scope["type"] not in ("http", "websocket") or self._any or not given:
            await self._app(scope, receive, send)
            return
        host = host_of(given[0].decode("latin-1"))
        if len(given) == 1 and host is not None and self._knows(host):
            await self._app(scope, receive, send)
            return
        shown = given[0][:100].decode("latin-1")
        error = Refused(
            421,
            "unknown_host",
            f"this server does not answer for the host {shown!r}",
            hint=f"start it with --allowed-hosts {host or 'NAME'}, or call it by its address",
        )
        await _refuse(error, scope, receive, send)

    def _knows(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host == "localhost" or host in self._names or host.endswith(self._suffixes)
        return address.is_loopback or self._any_address or str(address) in self._names


class SameOrigin:
    """Refuses what a web page of another origin sends without asking, unless it is one of `allowed`.

    Browsers say where a request comes from by `Sec-Fetch-Site`, on secure connections and to this machine; elsewhere
    the page's origin must be the host that is called.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = set(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse such requests with 403."""
        if scope["type"] in ("http", "websocket") and scope.get("method", "GET websocket") not in SAFE_METHODS:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._allowed & {"*", origin} and _foreign(origin, headers):
                error = Refused(
                    403,
                    "foreign_origin",
                    f"pages of {origin[:200]} may not call this server",
                    hint=f"start it with --cors-origins {origin[:200]}, or let the proxy in front pass the header Host",
                )
                await _refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_of(header: str) -> str | None:
    """The host of a `Host` header without its port, in lower case; None for what is none."""
    host, colon, port = header.strip().lower().rpartition(":")
    if not colon or header.rstrip().endswith("]"):
        host, port = header.strip().lower(), ""
    if port and not (port.isascii() and port.isdecimal()):
        return None
    if host.startswith("["):
        return host[1:-1] if host.endswith("]") else None
    return host.rstrip(".") if host and not set(host) & set(":/@\\ ,") else None


def _foreign(origin: str, headers: Headers) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:  # what is no address is nobody's own page
        return True


async def _refuse(error: TopkapiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await error_response(error, dialect_of(scope))(scope, receive, send)


class BodyLimit:
    """Refuses bodies of two lengths, and those above a limit, by the declared one or, without it, as they come in.

    By RFC 9112, section 6.1, chunks come before a declared length, and who passes a request on takes that out: one
    that has both is made so that a proxy finds its end elsewhere, and takes the rest for another client's request.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 at once where the length is declared; else let reading the body fail with `BodyTooLarge`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            message = "the request has both Content-Length and Transfer-Encoding"
            response = error_response(Refused(400, "malformed_header", message, hint="send one"), dialect_of(scope))
            # What follows may be no request of this client's.
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        limit = min(self._limit, STUDIO_BYTES) if path.startswith("/gradio_api/") else self._limit
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            await error_response(BodyTooLarge(limit), dialect_of(scope))(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise BodyTooLarge(limit)
            return message

        await self._app(scope, limited, send)


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


class KeepAlive:
    """Sends a comment on every stream of events on which nothing came for so many seconds."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on. What is sent in one message is whole events, so a comment may stand between any two."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[SILENCE] = self._seconds
        async with contextlib.AsyncExitStack() as stack:
            stream: _Stream | None = None

            async def forward(message: Message) -> None:
                nonlocal stream
                if stream is not None:
                    await stream.send(message)
                    return
                await send(message)
                if message["type"] == "http.response.start" and _is_stream(message):
                    stream = _Stream(send, self._seconds)
                    await stack.enter_async_context(stream.kept_alive())

            await self._app(scope, receive, forward)


class _Stream:
    """One response. Its messages and the comments go out one after the other."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._sending = asyncio.Lock()
        self._over = False

    async def send(self, message: Message) -> None:
        async with self._sending:
            self._over = not message.get("more_body", False)
            await self._send(message)
            self._last = self._loop.time()

    @contextlib.asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Look after it while the block lasts."""
        task = self._loop.create_task(self._look_after())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _look_after(self) -> None:
        while not self._over:
            silent = self._loop.time() - self._last
            if silent < self._seconds:
                await asyncio.sleep(self._seconds - silent)
            else:
                await self.comment()

    async def comment(self) -> None:
        """Send a sign of life unless the response is over."""
        async with self._sending:
            if not self._over:
                await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                self._last = self._loop.time()


def _is_stream(message: Message) -> bool:
    headers = dict(message["headers"])
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))


class UnderPrefix:
    """Takes requests whose path begins with the prefix, or from which the proxy has taken it off.

    Either way the application sees what ASGI asks for: the whole path, and the prefix as `root_path`.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its path in one form."""
        if scope["type"] in ("http", "websocket"):
            path: str = scope["path"]
            if path != self._prefix and not path.startswith(f"{self._prefix}/"):
                path = self._prefix + path
            scope = {**scope, "path": path, "raw_path": path.encode(), "root_path": self._prefix}
        await self._app(scope, receive, send)


TIMEOUTS = {b"x-request-timeout": 1.0, b"x-envoy-expected-rq-timeout-ms": 1e-3}
"""Headers by which a client, or the proxy before it, says how long it will wait, and their unit in seconds."""

LONGEST_TIMEOUT = 86_400.0

_DECIMAL = re.compile(rb"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?")
"""A number as others read it, too: Python's own spelling has more."""

QUIET = {"/health", "/ready", "/v1/health", "/metrics"}
"""What is asked every few seconds, of which nothing is logged unless it fails."""

_IDENTIFIER = re.compile(rb"[A-Za-z0-9._:=+/-]{1,128}")


class Observed:
    """Names every request (`X-Request-Id`, the client's own if it sends one), and tells how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app, self._metrics, self._tracing = app, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on under its name. Refuses a deadline that is none with 400."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call, began = Call(), time.monotonic()
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = next((value for name, value in headers if name == b"x-request-id"), b"")
        if _IDENTIFIER.fullmatch(given):
            call.identifier = given.decode("ascii")
        enter(call)
        traced = self._tracing is not None and scope["path"].removeprefix(scope.get("root_path", "")) not in QUIET
        span = self._tracing.begin(call, scope) if self._tracing is not None and traced else None
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["X-Request-Id"] = call.identifier
            await send(message)

        try:
            try:
                call.timeout_s = timeout_of(headers)
            except Refused as error:
                await error_response(error, dialect_of(scope))(scope, receive, named)
                return
            if call.timeout_s is not None:
                call.deadline = began + call.timeout_s
            await self._app(scope, receive, named)
        except Exception:
            # Answered with 500 by what stands around this.
            status, call.refusal = status or 500, call.refusal or "internal_error"
            raise
        finally:
            self._over(scope, call, status, time.monotonic() - began)
            if self._tracing is not None and span is not None:
                self._tracing.end(span, call, status)

    def _over(self, scope: Scope, call: Call, status: int, seconds: float) -> None:
        if call.refusal is not None:
            self._metrics.refused.labels(call.refusal).inc()
        if call.key is not None:
            self._metrics.key_requests.labels(call.key.name).inc()
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not ACCESS.isEnabledFor(logging.INFO) or (path in QUIET and status == 200):
            return
        client = scope.get("client")
        # Without the query, and cut off: an address may hold anything.
        about: dict[str, Any] = {
            "client": None if client is None else client[0],
            "method": scope["method"],
            "path": path[:200],
            "status": status or None,
            "seconds": round(seconds, 6),
            "error": call.refusal,
            "model": call.model,
            "prompt_tokens": call.prompt_tokens or None,
            "generated_tokens": call.generated_tokens or None,
            "queue_s": None if call.queue_s is None else round(call.queue_s, 6),
            "first_token_s": None if call.first_token_s is None else round(call.first_token_s, 6),
        }
        about = {name: value for name, value in about.items() if value is not None}
        key = "" if call.key is None else f" key={call.key.name}"
        rest = "".join(f" {name}={value}" for name, value in list(about.items())[3:])
        shown = path[:200].encode("unicode_escape").decode("ascii")
        ACCESS.info("%s %s%s request_id=%s%s", scope["method"], shown, rest, call.identifier, key,
                    extra={"about": about})  # fmt: skip


def timeout_of(headers: list[tuple[bytes, bytes]]) -> float | None:
    """The seconds that whoever sent a request will wait for its answer; the shortest where several say so.

    Raises `Refused` for what is no number of seconds.
    """
    found = []
    for name, value in headers:
        if name in TIMEOUTS:
            shown = name.decode("ascii").title()
            seconds = float(value) * TIMEOUTS[name] if _DECIMAL.fullmatch(value) else math.nan
            if not 0 < seconds <= LONGEST_TIMEOUT:
                most = f"{LONGEST_TIMEOUT / TIMEOUTS[name]:,.0f}"
                message = f"the header {shown} must be a number above 0 and at most {most}"
                raise Refused(400, "malformed_header", message, field=shown, hint="leave it out to wait without end")
            found.append(seconds)
    return min(found, default=None)
