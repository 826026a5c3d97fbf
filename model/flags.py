"""One way from a declared option to its command-line flag: decoding parameters, recipes and settings all take it."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

METAVARS = {int: "N", float: "X", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """An option by its name, its type (an annotation) and its meaning in one line.

    Flags stand in the help under the option's `group`, with its `default` unless that is None or empty. `about` are
    `add_argument`'s own arguments, which come before what follows from the type.
    """

    name: str
    type: Any
    meaning: str
    default: Any = None
    group: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def add_flags(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """One flag for each option. Only those given appear in the namespace, as text unless `about` has a type."""
    groups: dict[str | None, Any] = {None: parser}
    for option in options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        default = ("no", "yes")[option.default] if isinstance(option.default, bool) else option.default
        shown = "" if default in (None, [], ()) else f" [{default}]"
        about: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
        about["help"] = (option.meaning + shown).replace("%", "%%")
        kind = _bare(option.type)
        about |= {"action": argparse.BooleanOptionalAction} if kind is bool else {"metavar": _metavar(kind)}
        about |= {"nargs": "+"} if get_origin(kind) is list else {}
        groups[option.group].add_argument(flag_of(option.name), **{**about, **option.about})


def declared(fields: Mapping[str, Any]) -> list[Option]:
    """The options that fields of a pydantic model declare; `json_schema_extra` has `group` and `about`."""
    return [
        Option(name, each.annotation, each.description, each.default, extra.get("group"), extra.get("about", {}))
        for name, each in fields.items()
        if (extra := each.json_schema_extra) is not None
    ]


def flag_of(name: str) -> str:
    """An option's name as it is typed."""
    return "--" + name.replace("_", "-")


def _bare(annotation: Any) -> Any:
    """The type of an option that may also be None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def _metavar(kind: Any) -> str:
    return "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else METAVARS.get(kind, "TEXT")
