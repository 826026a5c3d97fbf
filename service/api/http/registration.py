"""Adding a dialect to the application: its routes, its errors, and the paths it shares with others."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.types import DecoratedCallable

from topkapi.service.api.http import errors
from topkapi.service.api.http.body import JSONRoute, Sharer
from topkapi.service.api.http.describing import Responses
from topkapi.service.api.http.dialect import Dialect, Dialects


class Routes(APIRouter):
    """A dialect's routes. What they read is JSON; `errors` are what they may answer besides success."""

    def __init__(self, errors: Responses, tags: list[str | Enum] | None = None) -> None:
        super().__init__(route_class=JSONRoute, tags=tags)
        self.errors = errors

    def answering(
        self, path: str, summary: str, model: Any = None, *, method: str = "POST", stream: dict[str, Any] | None = None,
        description: str | None = None, status: int = 200, errors: Responses | None = None, **options: Any,
    ) -> Callable[[DecoratedCallable], DecoratedCallable]:  # fmt: skip
        """Decorate the function that answers `path` with what `model` describes, or with the events `stream` does."""
        described = {"content": stream, "description": description} | ({} if method == "GET" else {"model": model})
        success = {name: value for name, value in described.items() if value is not None}
        responses = {**(self.errors if errors is None else errors), status: success}
        options |= {"status_code": status, "response_model": model if method == "GET" else None}
        return self.api_route(path, methods=[method], summary=summary, responses=responses, **options)


def set_up(app: FastAPI, *, ignore_unknown_fields: bool, needs_key: bool = False) -> None:
    """Make `app` ready for `register`, its errors answer by dialect, and its documentation cover shared paths and, with
    `needs_key`, have a place for the visitor's key."""
    app.state.needs_key = needs_key
    app.state.dialects = Dialects(errors.NATIVE)
    app.state.ignore_unknown_fields = ignore_unknown_fields
    app.state.api_routes = []
    errors.install(app)
    setattr(app, "openapi", lambda: _openapi(app))  # noqa: B010  FastAPI's documented way, which mypy refuses as `=`


def register(app: FastAPI, dialect: Dialect, router: APIRouter) -> None:
    """Add a dialect's routes.

    Of a route that an earlier dialect has too, path and method alike, the earlier one answers, except to bodies with
    one of the fields that `dialect.fields` names for the path.
    """
    known: list[APIRoute] = app.state.api_routes
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    for route in routes:
        same = (other for other in known if (other.path, other.methods) == (route.path, route.methods))
        first = next(same, None)
        if first is None:
            known.append(route)
            continue
        assert isinstance(first, JSONRoute) and isinstance(route, JSONRoute), "only JSON bodies can be told apart"
        router.routes.remove(route)
        first.sharers.append(Sharer(dialect, dialect.fields[route.path], route))
    for route in routes:
        # Load balancers look whether a server is there by HEAD; the server itself leaves the body out.
        if route.methods == {"GET"} and "text/event-stream" not in route.responses.get(200, {}).get("content", {}):
            router.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
            known += [each for each in router.routes[-1:] if isinstance(each, APIRoute)]
    app.state.dialects.add(dialect, [route.path for route in routes])
    app.include_router(router)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of every route; one with several dialects reads and answers what any of them does."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    shared: dict[str, list[str]] = {}
    sharers = []
    for first in app.state.api_routes:
        for sharer in getattr(first, "sharers", ()):
            # Under a name of its own, which no request has, until it is merged.
            name = f"{first.path}#{sharer.dialect.name}"
            sharer.route.path_format = name
            sharer.route.unique_id = f"{sharer.dialect.name}_{first.unique_id}"
            shared.setdefault(first.path, []).append(name)
            sharers.append(sharer.route)
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=[*app.routes, *sharers]
    )
    paths = document["paths"]
    for path, names in shared.items():
        for name in names:
            for method, operation in paths.pop(name).items():
                _merge(paths[path][method], operation)
    if app.state.needs_key:
        document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    app.openapi_schema = document
    return document


def _merge(operation: dict[str, Any], other: dict[str, Any]) -> None:
    """Let `operation` stand for another one on its path too."""
    operation["summary"] = f"{operation['summary']}; {other['summary']}"
    _merge_content(operation["requestBody"], other["requestBody"])
    for status, response in other["responses"].items():
        if status in operation["responses"]:
            _merge_content(operation["responses"][status], response)
        else:
            operation["responses"][status] = response


def _merge_content(one: dict[str, Any], other: dict[str, Any]) -> None:
    for media_type, content in other.get("content", {}).items():
        own = one.setdefault("content", {}).setdefault(media_type, content)
        if own != content:
            known = own["schema"].get("anyOf", [own["schema"]])
            own["schema"] = {"anyOf": [*known, content["schema"]]}
