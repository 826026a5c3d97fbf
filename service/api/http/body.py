"""Request bodies read strictly: UTF-8, JSON as its standard has it, nothing dropped in silence."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from topkapi.service.api.http.answering import apart
from topkapi.service.api.http.dialect import CHOSEN, Dialect
from topkapi.service.api.http.errors import (
    InapplicableField,
    Refused,
    UnsupportedEncoding,
    field_name,
    location_of,
    place_of,
)
from topkapi.service.api.http.json_reader import FAST, parse_json

Handle = Callable[[Request], Coroutine[Any, Any, Response]]

IGNORED = "X-Ignored-Parameters"
"""The header in which a lenient server names the fields it left out."""


@dataclass(frozen=True)
class Sharer:
    """Another dialect's route on the same path and method: what it reads, it is told by one of `fields`."""

    dialect: Dialect
    fields: tuple[str, ...]
    route: JSONRoute


class JSONRoute(APIRoute):
    """A route whose body must be declared as JSON and is read by `parse_json`.

    Insisting on the content type is also what keeps a web page of another origin from calling a server on the
    visitor's own machine: a browser sends such a body only after asking, and the answer is no.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.sharers: list[Sharer] = []
        super().__init__(*arguments, **options)

    def get_route_handler(self) -> Handle:
        """FastAPI's handler, on a request whose JSON has been read already, or that of the route sharing its path."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def strict(request: Request) -> Response:
            if not isinstance(request, _StrictRequest):
                request = _StrictRequest(request.scope, request.receive)
            document = await request.json()
            for sharer in self.sharers:
                if any(name in document for name in sharer.fields):
                    request.scope.update({CHOSEN: sharer.dialect, "route": sharer.route})
                    return await sharer.route.get_route_handler()(request)
            if request.app.state.ignore_unknown_fields:
                return await _leniently(handle, request, document)
            return await handle(request)

        return strict


async def _leniently(handle: Handle, request: Request, document: dict[str, Any]) -> Response:
    """Answer a request without the fields that would be refused as unknown or inapplicable, and say which."""
    ignored: list[str] = []
    while True:
        try:
            response = await handle(request)
        except RequestValidationError as error:
            errors = [each for each in error.errors() if each["type"] in ("extra_forbidden", "inapplicable")]
            unknown = [place_of(each["loc"], document) for each in errors]
            if not unknown or not all(_remove(document, location) for location in unknown):
                raise
            ignored += map(field_name, unknown)
        except InapplicableField as error:
            assert error.field is not None, "an inapplicable field has a name"
            if not _remove(document, location_of(error.field)):
                raise
            ignored.append(error.field)
        else:
            if ignored:
                response.headers[IGNORED] = ", ".join(quote(name, safe="[].") for name in ignored)
            return response


def _remove(document: Any, location: Sequence[str | int]) -> bool:
    """Take what is at `location` out of the document; whether it was there."""
    *parents, last = location
    try:
        for part in parents:
            document = document[part]
        del document[last]
    except (KeyError, IndexError, TypeError):
        return False
    return True


class _StrictRequest(Request):
    _document: Any = None

    async def json(self) -> Any:
        if self._document is None:
            body = await self.body()
            encoding = self.headers.get("content-encoding", "").strip().lower()
            if encoding not in ("", "identity"):
                raise UnsupportedEncoding(encoding)
            media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json" and not media_type.endswith("+json"):
                declared = f"declared as {media_type}" if media_type else "not declared as anything"
                raise Refused(
                    415,
                    "unsupported_media_type",
                    f"the body must be JSON, but it is {declared}",
                    hint="send the header Content-Type: application/json",
                )
            self._document = parse_json(body) if len(body) <= FAST else await apart(self, parse_json, body)
        return self._document


class Strict(BaseModel):
    """A body whose every field is known and has exactly its type."""

    model_config = ConfigDict(extra="forbid", strict=True)
