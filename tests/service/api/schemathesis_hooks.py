"""What schemathesis is told beside the description (see test_openapi.py): names that exist, and a record of answers."""

from __future__ import annotations

import os
import random
from typing import Any

import schemathesis

NAMES = ("chat", "base")


def _without_long_lists(schema: Any) -> None:
    """Lists of thousands take minutes to make and megabytes to send: tests/service/test_limits.py has them."""
    if isinstance(schema, dict):
        if schema.get("maxItems", 0) > 200:
            del schema["maxItems"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            _without_long_lists(each)


@schemathesis.hook
def before_load_schema(context: Any, schema: dict[str, Any]) -> None:
    """What is not tried."""
    _without_long_lists(schema)


@schemathesis.hook
def before_call(context: Any, case: Any, **options: Any) -> None:
    """Most requests are for a checkpoint that is there: the schema can't know which are. None is unloaded."""
    chance = random.Random(case.operation.label + str(case.body)[:200])
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and chance.random() < 0.9:
        case.body = body | {"model": chance.choice(NAMES)}
    if case.headers and "Last-Event-ID" in case.headers and chance.random() < 0.9:
        del case.headers["Last-Event-ID"]
    name = (case.path_parameters or {}).get("name")
    if isinstance(name, str) and case.method.upper() == "DELETE":
        case.path_parameters = case.path_parameters | {"name": f"{name}-none"}
    elif isinstance(name, str) and chance.random() < 0.5:
        case.path_parameters = case.path_parameters | {"name": chance.choice(NAMES)}


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """A line per request: the operation and the status."""
    with open(os.environ["ANSWERS"], "a") as record:
        record.write(f"{case.operation.label} {response.status_code}\n")
