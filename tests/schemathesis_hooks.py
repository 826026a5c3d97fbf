"""What schemathesis is told beside the description (see test_openapi.py): names that exist, and a record of answers."""

from __future__ import annotations

import os
import random
from typing import Any

import schemathesis

NAMES = ("chat", "base")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Most requests are for a checkpoint that is there; the schema can't know which there are."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and not body["model"].startswith("0"):
        return body | {"model": random.Random(body["model"]).choice(NAMES)}
    return body


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any]) -> dict[str, Any]:
    """One name in two exists, except where it would not for long: what is loaded is needed by all others."""
    name = (path_parameters or {}).get("name")
    if not isinstance(name, str):
        return path_parameters
    if context.operation.method.upper() == "DELETE":
        return path_parameters | {"name": f"{name}-none"}
    return path_parameters | {"name": NAMES[0]} if len(name) % 2 else path_parameters


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """A line per request: the operation and the status."""
    with open(os.environ["ANSWERS"], "a") as record:
        record.write(f"{case.operation.label} {response.status_code}\n")
