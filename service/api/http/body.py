"""Request bodies read strictly: UTF-8, JSON as its standard has it, nothing dropped in silence.

Neither their size nor their shape stops everything else. Python's own fast reader holds the interpreter from the first
byte to the last: 32 MB of `[],[],…` for ten seconds. What is large is read by its slow one, which gives way, and token
ids by the thousand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from json.decoder import JSONArray, JSONObject, scanstring  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from topkapi.model.errors import InvalidRequest
from topkapi.model.interruption import between_pieces
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


FAST = 128 * 1024
"""Bytes that the fast reader reads in a few milliseconds, whatever they are."""

MOST_CONTAINERS = 100_000
MOST_NESTED = 128
MOST_FIELDS, MOST_NAMED = 20_000, 256
"""Fields of any object, and of the body itself, whose unknown ones are told one by one."""

WITHIN_FLOAT64 = 308
"""Digits of a whole number that float64 can hold, whichever they are."""

_NUMBERS = re.compile(r"(?:[ \t\r\n]*(?:0|[1-9][0-9]{0,14})[ \t\r\n]*,){1,4096}")
_LIST_END = re.compile(r"[ \t\r\n]*\]")

Scan = Callable[[str, int], tuple[Any, int]]


class MalformedBody(InvalidRequest):
    """The body is not the JSON that the route reads."""

    status = 400
    kind = "malformed_body"


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises `MalformedBody` for anything else: bytes that are not UTF-8, JSON with NaN or Infinity or a number beyond
    float64, a field given twice, half of a surrogate pair, more lists and objects than MOST_CONTAINERS or deeper than
    MOST_NESTED.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedBody(
            f"the body is not valid UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}",
            hint="encode the body as UTF-8",
        ) from None
    if not text.strip():
        raise MalformedBody("the body is empty", hint='send a JSON object such as {"prompt": "Once"}')
    reader = _Reader if len(body) > FAST or body.count(b"[") + body.count(b"{") > MOST_NESTED else _FastReader
    try:
        document = reader(escapes="\\u" in text).decode(text)
    except json.JSONDecodeError as error:
        raise MalformedBody(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            hint="check quotes, commas and brackets there",
        ) from None
    except UnicodeEncodeError:
        raise MalformedBody(
            "a text in the body holds half of a surrogate pair, which is no character",
            hint="send characters beyond U+FFFF as UTF-8 or as a pair of \\u escapes",
        ) from None
    except RecursionError:
        raise _nested_too_deeply() from None
    if not isinstance(document, dict):
        raise MalformedBody("the body must be a JSON object", hint='send an object such as {"prompt": "Once"}')
    if len(document) > MOST_NAMED:
        raise InvalidRequest(f"the body has {len(document):,} fields, and no route has more than {MOST_NAMED}")
    return document


def json_in(text: str, field: str, name: str | None = None) -> Any:
    """The JSON in a text of a request. Raises `InvalidRequest` naming `field`, called `name`, where it is none."""
    called = name or field
    try:
        return json.loads(text)
    except RecursionError:
        raise InvalidRequest(f"{called} is nested too deeply", field=field) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{called} is not valid JSON: {error}", field=field) from None
    except ValueError:
        raise InvalidRequest(f"{called} holds a number with too many digits", field=field) from None


def schema_in(text: str, field: str, name: str | None = None) -> Any:
    """The JSON schema in a text; null is none. Raises as `json_in` does."""
    schema = json_in(text, field, name)
    if schema is None:
        raise InvalidRequest(f"{name or field} must be a JSON schema, not null", field=field, hint="leave it out")
    return schema


def _refuse_constant(name: str) -> float:
    raise MalformedBody(f"the body holds {name}, which is not JSON", hint="send a finite number or null")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise MalformedBody(f"the body holds {digits[:40]}, which is beyond float64", hint="send a finite number")
    return number


def _whole(digits: str) -> int:
    if len(digits) > WITHIN_FLOAT64:
        _finite(digits)
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_FIELDS:
        raise InvalidRequest(f"an object in the body has {len(pairs):,} fields, and {MOST_FIELDS:,} are the most")
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name[:200] for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise MalformedBody(f"{twice} is given twice in one object", field=twice, hint="give every field once")
    return fields


_STRICT: dict[str, Any] = {
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
    "parse_int": _whole,
    "object_pairs_hook": _without_duplicates,
}


class _FastReader(json.JSONDecoder):
    """For what is small and flat."""

    def __init__(self, *, escapes: bool) -> None:
        super().__init__(**_STRICT)
        self._escapes = escapes

    def decode(self, text: str) -> Any:  # type: ignore[override]
        """The document. Raises what the module's `parse_json` makes `MalformedBody` of."""
        document = super().decode(text)
        if self._escapes:
            json.dumps(document, ensure_ascii=False).encode()
        return document


class _Reader(json.JSONDecoder):
    """For everything else: counts lists and objects, and lets other threads run between two values."""

    def __init__(self, *, escapes: bool) -> None:
        super().__init__(**_STRICT)
        self._escapes = escapes
        self._containers = self._depth = 0
        self.parse_array = self._array
        self.parse_object = self._object
        self.parse_string = self._string
        self.scan_once = py_make_scanner(self)

    def _enter(self) -> None:
        self._containers += 1
        self._depth += 1
        if self._containers > MOST_CONTAINERS:
            raise MalformedBody(
                f"the body holds more than {MOST_CONTAINERS:,} lists and objects", hint="send less at once"
            )
        if self._depth > MOST_NESTED:
            raise _nested_too_deeply()
        between_pieces()

    def _array(self, place: tuple[str, int], scan: Scan) -> tuple[list[Any], int]:
        self._enter()
        text, at = place
        numbers: list[int] = []
        while found := _NUMBERS.match(text, at):
            numbers += map(int, found[0][:-1].split(","))
            at = found.end()
            between_pieces()
        if numbers and _LIST_END.match(text, at):
            raise json.JSONDecodeError("Expecting value", text, at)
        rest, end = JSONArray((text, at), scan)
        self._depth -= 1
        return numbers + rest if numbers else rest, end

    def _object(self, place: tuple[str, int], *options: Any) -> tuple[Any, int]:
        self._enter()
        found, end = JSONObject(place, *options)
        if self._escapes:
            for name in found:
                name.encode()
        self._depth -= 1
        return found, end

    def _string(self, text: str, at: int, strict: bool = True) -> tuple[str, int]:
        found: tuple[str, int] = scanstring(text, at, strict)
        if self._escapes:
            found[0].encode()
        return found


def _nested_too_deeply() -> MalformedBody:
    return MalformedBody(f"the body is nested too deeply: {MOST_NESTED} lists and objects in one another are the most")
