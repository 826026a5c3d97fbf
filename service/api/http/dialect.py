"""Whose clients a route is for: how it tells them of errors, and which bodies are its own on a path that is shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.routing import compile_path
from starlette.types import Scope

from topkapi.model.errors import TopkapiError

CHOSEN = "topkapi.dialect"
"""Where a request's scope says that its body was found to be of another dialect than its path's first one."""


@dataclass(frozen=True)
class Dialect:
    """One family of clients. `render(error)` is the status and the JSON body by which they learn of an error.

    Its routes answer so; what no route takes does under one of `prefixes`. `fields` maps a path that an earlier
    dialect has too to those fields of a body any of which makes the request this dialect's. A stream that breaks off
    says so by an event named `error_event`; before an event's data stands `data_mark`.
    """

    name: str
    render: Callable[[TopkapiError], tuple[int, dict[str, Any]]]
    prefixes: tuple[str, ...] = ()
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    error_event: str | None = None
    data_mark: str = "data: "
    name_header: str | None = None
    """Where its clients look for the request's name, besides `X-Request-Id`."""

    def failure(self, error: TopkapiError) -> tuple[str | None, Any]:
        """The last event of a stream that breaks off: its name and data."""
        return self.error_event, self.render(error)[1]


class Dialects:
    """The dialects of one application; `default` is that of everything that belongs to no other."""

    def __init__(self, default: Dialect) -> None:
        self._default = default
        self._paths: list[tuple[re.Pattern[str], Dialect]] = []
        self._prefixes: list[tuple[str, Dialect]] = []

    def add(self, dialect: Dialect, paths: Iterable[str]) -> None:
        """Add a dialect with the paths of its routes. Of a path that is there already, the earlier one answers."""
        self._paths += [(compile_path(path)[0], dialect) for path in paths]
        self._prefixes += [(prefix, dialect) for prefix in dialect.prefixes]

    def named(self, name: str) -> Dialect | None:
        """The dialect of that name."""
        return next((dialect for _, dialect in self._paths if dialect.name == name), None)

    def of(self, scope: Scope) -> Dialect:
        """The dialect of a request, known from its path even where no route has taken it."""
        if CHOSEN in scope:
            chosen: Dialect = scope[CHOSEN]
            return chosen
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        by_route = (dialect for pattern, dialect in self._paths if pattern.match(path))
        by_prefix = (dialect for prefix, dialect in self._prefixes if path.startswith(prefix))
        return next(by_route, None) or next(by_prefix, self._default)


def dialect_of(scope: Scope) -> Dialect:
    """The dialect of a request to an application that `service.api.http.registration` set up."""
    dialects: Dialects = scope["app"].state.dialects
    return dialects.of(scope)


def with_hint(error: TopkapiError) -> str:
    """Message and hint in one text, for dialects that have one place for both."""
    return error.message if error.hint is None else f"{error.message} ({error.hint})"
