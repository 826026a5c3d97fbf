"""Parts of /openapi.json that the framework does not make: bodies of several shapes, the events of streams, and what
the table of decoding parameters says of a field."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, Field

from topkapi.model.decoding.aliases import own_name
from topkapi.model.decoding.parameters import BY_NAME

_EVENT = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
STREAM: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}
"""How a route's documentation says that it may answer by server-sent events: the schema is that of one event."""


Responses = dict[int | str, dict[str, Any]]
"""What a route may answer, by status, as FastAPI describes it."""


_MEANINGS = {
    400: "The body is not valid JSON",
    404: "The checkpoint is not loaded",
    408: "Nothing was done in the time that `timeout_s` or X-Request-Timeout gives it",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    429: "The queue is full; wait Retry-After seconds",
    500: "A step of the engine failed",
}


def errors_of(model: type[BaseModel], *statuses: int, more: Mapping[int, str] = MappingProxyType({})) -> Responses:
    """The errors that a route may answer, told as `model`: those that mean what they mostly do, and `more`."""
    meanings = sorted(({status: _MEANINGS[status] for status in statuses} | dict(more)).items())
    return {status: {"model": model, "description": meaning} for status, meaning in meanings}


def one_of(*shapes: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, Any]:
    """The schema of bodies that have the fields of one shape, and of the other shapes (and `others`) none.

    A name with a question mark may be there or not; null counts as absent.
    """
    names = dict.fromkeys([*(name.rstrip("?") for shape in shapes for name in shape), *others])
    return {
        "oneOf": [
            {
                "required": [name for name in shape if not name.endswith("?")],
                "properties": {
                    name: {"not": {"type": "null"}} if name in shape else {"type": "null"}
                    for name in names
                    if f"{name}?" not in shape
                },
            }
            for shape in shapes
        ]
    }


def stream_of(**events: type[BaseModel]) -> dict[str, Any]:
    """How a route's documentation says that it may answer by these server-sent events, whose data is JSON."""
    schemas = [
        {
            "type": "object",
            "properties": {
                "id": {"type": "string"},
                "event": {"const": name},
                "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": _inline(model)},
            },
            "required": ["id", "event", "data"],
        }
        for name, model in events.items()
    ]
    return {"text/event-stream": {"schema": {"oneOf": schemas}}}


def _inline(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema in one piece: within a content schema, names of the description mean nothing to readers."""
    schema = model.model_json_schema(mode="serialization")
    parts = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(parts[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items()}
        return [resolved(each) for each in node] if isinstance(node, list) else node

    whole: dict[str, Any] = resolved(schema)
    return whole


def decoding(name: str, **own: Any) -> Any:
    """What `Field` says of the decoding parameter `name`, by whatever system's name: its bounds and its meaning.

    `own` are those of a dialect that differ from the table's; a bound of None is none.
    """
    parameter = BY_NAME[own_name(name) or name]
    told: dict[str, Any] = {
        "ge": parameter.minimum,
        "gt": parameter.above,
        "le": parameter.maximum,
        "max_length": parameter.most,
        "description": parameter.meaning,
    }
    # A dialect's bound takes the place of the table's at the same end.
    for either, other in (("ge", "gt"), ("gt", "ge"), ("lt", "le")):
        if either in own:
            told[other] = None
    return Field(**{each: value for each, value in (told | own).items() if value is not None})
