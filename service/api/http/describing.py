"""Parts of /openapi.json that the framework does not make: bodies of several shapes, and the events of streams."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

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
