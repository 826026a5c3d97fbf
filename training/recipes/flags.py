"""Command-line flags from a recipe's fields, so that nothing is said twice."""

from __future__ import annotations

import argparse
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from topkapi.training.recipes.recipe import TrainingRecipe


def add_flags(parser: argparse.ArgumentParser, *kinds: type[TrainingRecipe]) -> None:
    """One flag per field of the `kinds`, grouped; only flags that are given appear in the namespace."""
    groups: dict[str, Any] = {}
    fields = {name: field for kind in reversed(kinds) for name, field in kind.model_fields.items()}
    for name, field in fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), "every field is made by setting()"
        group = str(extra["group"])
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add_flag(groups[group], name, field)


def given_flags(namespace: argparse.Namespace, kind: type[TrainingRecipe]) -> dict[str, Any]:
    """The recipe fields that were given as flags; `none` clears an optional one."""
    given = {name: value for name, value in vars(namespace).items() if name in kind.model_fields}
    for name, value in given.items():
        if value == "none" and type(None) in get_args(kind.model_fields[name].annotation):
            given[name] = None
    return given


def _add_flag(group: Any, name: str, field: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    description = (field.description or "").replace("%", "%%")
    default = field.get_default(call_default_factory=True)
    kind = _without_none(field.annotation)
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=description)
        return
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name, "metavar": _metavar(kind)}
    if get_origin(kind) is list:
        options["nargs"] = "+"
    if default is not None and default != []:
        description += f" [{default}]"
    group.add_argument(flag, help=description, **options)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "TEXT"
    names = {int: "N", float: "X", str: "TEXT"}
    return names.get(kind, "VALUE")
