"""Who may do what: every request's key, what it may do by it, and what it may use of what there is.

A key comes as any family of clients sends it: `Authorization: Bearer`, `x-api-key` (Anthropic, llama.cpp) or `api-key`
(Azure's clients of OpenAI). Never as part of an address, which ends in the logs of every proxy.
"""

from __future__ import annotations

import datetime
import math
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.service.api.http.dialect import Dialect, dialect_of
from topkapi.service.api.http.errors import Refused, error_response
from topkapi.service.calls import current_call
from topkapi.service.keys import KeyRing, Role
from topkapi.service.quotas import Quota, RateLimited

OPEN = {"/health", "/ready", "/v1/health"}
"""What probes ask, which say nothing of anybody."""

READING = {"GET", "HEAD", "OPTIONS"}

NAMED = (b"x-api-key", b"api-key")
"""Headers whose whole value is a key."""

HOW = "send it as Authorization: Bearer KEY or x-api-key: KEY; whoever runs the server makes keys with topkapi key new"


class NoKey(Refused):
    """There is no key, or none of this server's."""

    def __init__(self, message: str, hint: str = HOW) -> None:
        super().__init__(401, "invalid_api_key", message, hint=hint)


def needed(method: str, path: str, api: Any) -> Role | None:
    """The role that a request needs; None: it needs no key.

    What no route of the API takes is a page, its scripts and its pictures: whoever opens it has a key only then.
    """
    if path in OPEN or method == "OPTIONS":
        return None
    if path.rstrip("/") == "/metrics" or changes_what_is_loaded(method, path):
        return "admin"
    if method in READING and (_below(path, "/studio") or not _is_route(path, api)):
        return None
    return "use"


def changes_what_is_loaded(method: str, path: str) -> bool:
    """Whether a request loads, unloads or replaces checkpoints or adapters."""
    return method not in READING and (_below(path, "/models") or _below(path, "/adapters"))


def _below(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def _is_route(path: str, api: Any) -> bool:
    # A slash more leads to the route by a redirect, which tells nothing.
    return any(route.path != "/" and route.path_regex.match(path) for route in api.state.api_routes)


def given_key(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The key among a request's headers, if it has one. Raises `NoKey` where there are two, or what is none."""
    found: list[str] = []
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name in NAMED and text:
            found.append(text)
        elif name == b"authorization" and text:
            scheme, _, key = text.partition(" ")
            if scheme.lower() != "bearer" or not key.strip():
                raise NoKey("the header Authorization holds no bearer's key")
            found.append(key.strip())
    if len(set(found)) > 1:
        # Whoever stands in front might have looked at the other one.
        raise NoKey("the request holds two different keys", hint="send one")
    return found[0] if found else None


class Authority:
    """Lets through what its key may do and has not used up, and says in headers what is left of its limits."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self._app, self._ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 401, 403 or 429, or pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            # No route of ours is one.
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        quota: Quota | None = None
        # Asked now: an application within this one takes the scope for its own.
        dialect = dialect_of(scope)
        try:
            quota = self._admit(scope, needed(scope["method"], path, scope["app"]))
        except (Refused, RateLimited) as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            call = current_call()
            quota = None if call is None else call.quota
            if quota is not None:
                headers |= rate_limit_headers(quota, dialect)
            await error_response(error, dialect, headers)(scope, receive, send)
            return
        if quota is None or not quota.buckets:
            await self._app(scope, receive, send)
            return

        async def with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"]).update(rate_limit_headers(quota, dialect))
            await send(message)

        await self._app(scope, receive, with_limits)

    def _admit(self, scope: Scope, role: Role | None) -> Quota | None:
        """What the request's key has used, if it needs one. Raises for what it may not."""
        if role is None:
            return None
        given = given_key(scope["headers"])
        if given is None:
            raise NoKey("this server answers only to those who have a key")
        key = self._ring.find(given)
        if key is None:
            raise NoKey("this is none of the server's keys")
        call = current_call()
        quota = self._ring.quota(key)
        if call is not None:
            call.key, call.quota = key, quota
        if role == "admin" and key.role != "admin":
            message = f"the key {key.name} may use the server, but neither change it nor read its metrics"
            raise Refused(403, "forbidden", message, hint="this takes a key with the role admin")
        if scope["method"] == "POST":
            quota.count_request()
        return quota


def rate_limit_headers(quota: Quota, dialect: Dialect) -> dict[str, str]:
    """What a key has left, as OpenAI's clients read it, or Anthropic's."""
    headers: dict[str, str] = {}
    for limited, bucket in quota.buckets.items():
        left, full = str(max(0, math.floor(bucket.left))), bucket.wait(bucket.limit)
        if dialect.name == "anthropic":
            at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=math.ceil(full))
            told = {"limit": str(bucket.limit), "remaining": left, "reset": at.strftime("%Y-%m-%dT%H:%M:%SZ")}
            headers |= {f"anthropic-ratelimit-{limited}-{name}": value for name, value in told.items()}
        else:
            told = {"limit": str(bucket.limit), "remaining": left, "reset": _duration(full)}
            headers |= {f"x-ratelimit-{name}-{limited}": value for name, value in told.items()}
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI tells it: 120ms, 6.2s, 1m3s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
