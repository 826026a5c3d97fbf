"""By which names the server may be called, and from which web pages.

A page of a stranger's can reach servers of its visitor's own machine and network: by a name of its own that it has
turned to their address (DNS rebinding), or by requests that browsers send without asking first. The name by which a
request came and the page it came from tell both.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.errors import error_response

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
"""They change nothing, and what they answer no page of another origin can read."""


class UnknownHost(InvalidRequest):
    """The request came by a name that this server doesn't go by."""

    status = 421
    kind = "unknown_host"


class ForeignOrigin(InvalidRequest):
    """The request came from a web page that may not call this server."""

    status = 403
    kind = "foreign_origin"


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
        error = UnknownHost(
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
                error = ForeignOrigin(
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
