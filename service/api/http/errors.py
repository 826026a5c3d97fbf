"""Errors as HTTP responses: `{"error": {"type", "message", "field"?, "hint"?}}`, or as the route's dialect has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from topkapi.model.decoding.aliases import BY_ALIAS
from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.model.nearest import nearest
from topkapi.model.wrong_values import MAY_BE
from topkapi.service.api.http.dialect import Dialect, dialect_of
from topkapi.service.calls import current_call

MOST_LISTED = 60
"""Fields that a hint names; more would hide it."""

INTERNAL = TopkapiError("the server met an unexpected error", hint="its log has the details; please report it")


class Refused(InvalidRequest):
    """A request that HTTP has a status of its own for."""

    def __init__(
        self, status: int, kind: str, message: str, *, field: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, field=field, hint=hint)
        self.status, self.kind = status, kind


class UnsupportedEncoding(Refused):
    """The body is compressed."""

    def __init__(self, encoding: str) -> None:
        message = f"the body is encoded as {encoding[:100]}, and only plain ones are read"
        hint = "send it as it is, without the header Content-Encoding"
        super().__init__(415, "unsupported_media_type", message, hint=hint)


class BodyTooLarge(Refused):
    """The body is larger than the server accepts."""

    def __init__(self, limit: int) -> None:
        hint = "send less at once, or start the server with a larger TOPKAPI_MAX_BODY_BYTES"
        super().__init__(413, "body_too_large", f"the body is larger than {limit:,} bytes", hint=hint)


class RequestTimeout(Refused):
    """The body came in too slowly to be waited for."""

    def __init__(self, received: int, seconds: float) -> None:
        hint = "send it faster, or start the server with more TOPKAPI_REQUEST_TIMEOUT"
        message = f"{received:,} bytes of the body and no more came in within {seconds:.0f} s"
        super().__init__(408, "request_timeout", message, hint=hint)


class InapplicableField(InvalidRequest):
    """A field that the route does not have or that can't act here: refused, or left out by a lenient server.

    `field` says where it is, as `a.b[0].c`. Nothing has been done yet when it is raised.
    """

    def __init__(self, message: str, *, field: str, hint: str | None = None) -> None:
        super().__init__(message, field=field, hint=hint)


class ClientGone(TopkapiError):
    """The client closed the connection; nobody reads the answer."""

    status = 499
    kind = "client_gone"


def error_body(error: TopkapiError) -> dict[str, Any]:
    """The JSON object that reports `error` on the native routes."""
    content = {"type": error.kind, "message": error.message, "field": error.field, "hint": error.hint}
    return {"error": {name: value for name, value in content.items() if value is not None}}


NATIVE = Dialect("native", lambda error: (error.status, error_body(error)), error_event="error")


def error_response(error: TopkapiError, dialect: Dialect, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that reports `error` in a dialect, with Retry-After where waiting helps."""
    headers = dict(headers or {})
    call = current_call()
    if call is not None:
        call.refusal = error.kind
        # What fails beyond everything that stands around the routes is told of by this alone.
        headers.setdefault("X-Request-Id", call.identifier)
        if dialect.name_header is not None:
            headers[dialect.name_header] = call.identifier
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, RequestTimeout):
        headers["Connection"] = "close"
    if isinstance(error, UnsupportedEncoding):
        headers["Accept-Encoding"] = "identity"
    status, body = dialect.render(error)
    return JSONResponse(body, status, headers)


def install(app: FastAPI) -> None:
    """Make every error of `app` answer in the shape of the dialect that its request belongs to."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        headers = {}
        if isinstance(error, RequestValidationError):
            error = from_validation(error.errors(), error.body, known_fields(request))
        elif isinstance(error, HTTPException):
            headers = dict(error.headers or {})
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
                headers["Allow"] = _allowed(error, request)
            error = from_status(error, request)
        elif isinstance(error, ClientDisconnect):
            # No defect: the connection ended, or what came on it was no body, before the body was whole.
            error = ClientGone("the client went away before its request was whole")
        told = error if isinstance(error, TopkapiError) else INTERNAL
        return error_response(told, dialect_of(request.scope), headers)

    for kind in (TopkapiError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, handle)


def from_status(error: HTTPException, request: Request) -> TopkapiError:
    """What the framework refused by status code alone, as one of our errors."""
    if error.status_code == HTTPStatus.NOT_FOUND:
        return not_found(request.method, request.url.path)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return method_not_allowed(request.method, request.url.path, _allowed(error, request))
    kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return Refused(error.status_code, kind, str(error.detail))


def _allowed(error: HTTPException, request: Request) -> str:
    """The methods of all routes on the request's path; the framework names only those of the first."""
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    routes = (route for route in request.app.state.api_routes if route.path_regex.match(path))
    methods = {method for route in routes for method in route.methods}
    return ", ".join(sorted(methods)) or (error.headers or {}).get("Allow", "")


def not_found(method: str, path: str) -> Refused:
    """No route has this path."""
    return Refused(404, "not_found", f"there is no route {method} {path}", hint="the routes are listed at /docs")


def method_not_allowed(method: str, path: str, allowed: str) -> Refused:
    """The path exists for other methods only."""
    hint = f"use {allowed}" if allowed else None
    return Refused(405, "method_not_allowed", f"{path} does not answer {method}", hint=hint)


LISTED = "listed at /docs"
"""Where the fields of a body can be read."""


def from_validation(
    errors: Sequence[Any], body: Any, known_fields: Sequence[str] = (), listed: str = LISTED
) -> InvalidRequest:
    """The first of pydantic's complaints about a body, naming the field. `listed` says where its fields are.

    Of what it says about the alternatives of one field, that which got furthest counts.
    """
    places = [place_of(each["loc"], body, missing=each["type"] == "missing") + _tag(each) for each in errors]
    field = places[0][:1]
    depth = max(len(place) for place in places if place[:1] == field)
    chosen = [
        (place, each) for place, each in zip(places, errors, strict=True) if place[:1] == field and len(place) == depth
    ]
    location, first = chosen[0]
    name = field_name(location)
    if first["type"] == "extra_forbidden":
        return unknown_field(name, known_fields if len(location) == 1 else (), listed)
    if first["type"] == "inapplicable":
        return inapplicable(name, first["ctx"]["why"])
    if not name:
        return InvalidRequest("the body must be a JSON object", hint='send an object such as {"prompt": "Once"}')
    if first["type"] == "missing":
        return InvalidRequest(f"{name} is missing", field=name)
    said = list(dict.fromkeys(_said(each) for place, each in chosen if place == location))
    also = [text.removeprefix("must be ") if said[0].startswith("must be ") else text for text in said[1:]]
    return InvalidRequest(f"{name}: {', or '.join([said[0], *also])}", field=name)


def _tag(complaint: Any) -> list[str | int]:
    """The field that says which of several kinds an object is, where it is that field that is wrong."""
    return [complaint["ctx"]["discriminator"].strip("'")] if complaint["type"] == "union_tag_invalid" else []


def _said(complaint: Any) -> str:
    """One of pydantic's complaints in words about what may be sent."""
    if complaint["type"] in MAY_BE:
        return MAY_BE[complaint["type"]].format(**complaint.get("ctx", {}))
    text: str = complaint["msg"].removeprefix("Value error, ")
    return f"{text[:1].lower()}{text[1:]}"


def place_of(location: Sequence[str | int], body: Any, *, missing: bool = False) -> list[str | int]:
    """Where in `body` pydantic's `location` is: it also names the alternatives of a field, which nobody sent.

    Of a field that is `missing`, the name is meant though it's not there.
    """
    if location[:1] and location[0] in ("query", "path", "header"):
        return list(location[1:])
    place: list[str | int] = []
    at = body
    parts = list(location[1:]) if location[:1] == ("body",) else list(location)
    for number, part in enumerate(parts):
        inside = part in at if isinstance(at, dict) else isinstance(at, list) and part in range(len(at))
        if inside and isinstance(at, dict) and at.get("type") == part and number < len(parts) - 1:
            # The kind of this object, not its field of the same name, unless that has something inside.
            inside = isinstance(at[part], dict | list) and parts[number + 1] != part
        if inside:
            at = at[part]
        if inside or (missing and isinstance(at, dict) and number == len(parts) - 1):
            place.append(part)
    return place


def field_name(location: Sequence[str | int]) -> str:
    """A place in a body as `a.b[0].c`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def location_of(name: str) -> list[str | int]:
    """The parts of a place in a body, from `a.b[0].c`."""
    return [int(part[1:-1]) if part[0] == "[" else part for part in re.findall(r"[^.[\]]+|\[[0-9]{1,9}\]", name)]


def inapplicable(name: str, why: str) -> InapplicableField:
    """A field that is known but cannot act here, and asks for something."""
    return InapplicableField(f"{name} can't be used: {why}", field=name, hint=f"leave {name} out")


def unknown_field(name: str, known_fields: Sequence[str], listed: str = LISTED) -> InapplicableField:
    """A field that the route does not have, with the one that was probably meant: in another system's word, perhaps."""
    own = BY_ALIAS.get(name)
    if near := own if own in known_fields else nearest(name, known_fields):
        hint = f"did you mean {near}?"
    elif len(known_fields) > MOST_LISTED:
        hint = f"leave it out; the fields are {listed}"
    else:
        hint = f"known fields: {', '.join(known_fields)}" if known_fields else "leave it out"
    return InapplicableField(f"unknown field {name}", field=name, hint=hint)


def known_fields(request: Request) -> Sequence[str]:
    """The fields of the body that the request's route reads."""
    route = request.scope.get("route")
    body = getattr(route, "body_field", None)
    model = getattr(getattr(body, "field_info", None), "annotation", None)
    return list(getattr(model, "model_fields", {}))
