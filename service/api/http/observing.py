"""What is known of every request from its beginning to its end: its name, its deadline, and a line in the log."""

from __future__ import annotations

import logging
import math
import re
import time
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.service.api.http.dialect import dialect_of
from topkapi.service.api.http.errors import Refused, error_response
from topkapi.service.calls import Call, enter
from topkapi.service.logs import ACCESS
from topkapi.service.metrics import Metrics
from topkapi.service.tracing import Tracing

TIMEOUTS = {b"x-request-timeout": 1.0, b"x-envoy-expected-rq-timeout-ms": 1e-3}
"""Headers by which a client, or the proxy before it, says how long it will wait, and their unit in seconds."""

LONGEST_TIMEOUT = 86_400.0

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
        status, dialect = 0, dialect_of(scope)

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = MutableHeaders(raw=message["headers"])
                told["X-Request-Id"] = call.identifier
                if dialect.name == "anthropic":
                    told["request-id"] = call.identifier
            await send(message)

        try:
            try:
                call.timeout_s = timeout_of(headers)
            except Refused as error:
                await error_response(error, dialect)(scope, receive, named)
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
            try:
                seconds = float(value) * TIMEOUTS[name]
            except ValueError:
                seconds = math.nan
            if not 0 < seconds <= LONGEST_TIMEOUT:
                most = f"{LONGEST_TIMEOUT / TIMEOUTS[name]:,.0f}"
                message = f"the header {shown} must be a number above 0 and at most {most}"
                raise Refused(400, "malformed_header", message, field=shown, hint="leave it out to wait without end")
            found.append(seconds)
    return min(found, default=None)
