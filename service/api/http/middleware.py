"""What stands around the routes: by which names and from which pages they may be called, how large and how slow a body
may be, signs of life on streams that wait, and the path of a proxy.

A page of a stranger's can reach servers of its visitor's own machine and network: by a name of its own that it has
turned to their address (DNS rebinding), or by requests that browsers send without asking first. The name by which a
request came and the page it came from tell both.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Iterable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.errors import BodyTooLarge, Refused, RequestTimeout, error_response

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
