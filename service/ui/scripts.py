"""The studio's own scripts and style sheets, served at `studio/<name>`, and the parameter table as they read it.

They are files of this package, sent as they are: no other host, nothing inline, no build. They come with the API,
before Gradio is there. Browsers ask each time whether theirs is the current one, so that no page mixes two versions.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from topkapi.model.decoding.parameters import PARAMETERS, Parameter

STATIC = Path(__file__).with_name("static")
PLACE = "studio"
"""The path of the folder, below that of the page."""

HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
COMMON = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "seed", "stop")
"""What most people reach for first; other parameters lie in folded sections."""

NOT_OFFERED = ("trace", "logprobs", "n", "best_of")
"""What a tab asks for itself, as it shows what comes of it."""


def add_scripts(app: FastAPI) -> None:
    """Serve the files, and `parameters.json`."""
    table = json.dumps([described(parameter) for parameter in PARAMETERS], ensure_ascii=False).encode()
    tag = f'"{hashlib.sha256(table).hexdigest()[:32]}"'

    async def parameters(request: Request) -> Response:
        headers = HEADERS | {"ETag": tag}
        if tag in re.findall(r'"[^"]*"', request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        return Response(table, media_type="application/json", headers=headers)

    files = Scripts(directory=STATIC)

    async def script(request: Request) -> Response:
        return await files.get_response(request.path_params["name"], request.scope)

    # Not mounted: what is not there is refused as any other path of the API's.
    app.router.routes += [Route(f"/{PLACE}/parameters.json", parameters), Route(f"/{PLACE}/{{name}}", script)]


class Scripts(StaticFiles):
    """The files of the folder, each with its digest's like to be asked for again."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file, or 304 where the browser has it."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response

    def is_not_modified(self, response_headers: Headers, request_headers: Headers) -> bool:
        """By its tag alone: a file that was put back in time is another one."""
        asked = request_headers.get("if-none-match")
        return asked is not None and response_headers.get("etag") in [
            each.strip().removeprefix("W/") for each in asked.split(",")
        ]


def described(parameter: Parameter) -> dict[str, Any]:
    """A row of the parameter table, as the drawer of `parameters.js` reads it."""
    slider = parameter.slider
    return {
        "name": parameter.name,
        "label": parameter.label or parameter.name.replace("_", " ").capitalize(),
        "kind": parameter.kind,
        "minimum": parameter.minimum,
        "maximum": parameter.maximum,
        "above": parameter.above,
        "slider": None if slider is None else {"low": slider[0], "high": slider[1], "step": slider[2]},
        "default": parameter.default,
        "meaning": parameter.meaning,
        "source": parameter.source,
        "group": parameter.group,
        "needs": parameter.needs,
        "stage": parameter.stage,
        "common": parameter.name in COMMON,
        "offered": parameter.name not in NOT_OFFERED,
    }
