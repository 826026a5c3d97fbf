"""What is wrong with a value, said as what it must be instead, for settings, recipes and requests alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

MAY_BE = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be an object"),
    "string_type": "must be a text", "list_type": "must be a list", "none_required": "must be null",
    "literal_error": "must be {expected}", "enum": "must be {expected}",
    "union_tag_invalid": "must be one of {expected_tags}",
    "union_tag_not_found": "must be an object with a {discriminator}",
    "greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}", "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries", "too_long": "must have at most {max_length} entries",
    "string_pattern_mismatch": "must be of the form {pattern}",
    "missing": "must be given", "finite_number": "must be a finite number", "path_type": "must be a path",
    "int_parsing_size": "must be a smaller number",
}  # fmt: skip
"""What pydantic complains about, as what may be given instead."""

_LONGEST_SHOWN = 80
_NUMBERS = {"int", "float", "greater", "less", "finite"}


def told(name: str, error: Mapping[str, Any], field: FieldInfo | None = None) -> str:
    """One error of pydantic's, on what is called `name` and described by `field`, as a sentence with what was given."""
    kind: str = error["type"]
    if kind == "missing":
        return f"{name} must be given"
    given = shown(error["input"])
    if kind not in MAY_BE:
        said = str(error["msg"]).removeprefix("Value error, ")
        return f"{name}: {said[:1].lower()}{said[1:]}, not {given}"
    number = None if field is None or kind.split("_", maxsplit=1)[0] not in _NUMBERS else _number(field)
    return f"{name} {number or MAY_BE[kind].format(**error.get('ctx', {}))}, not {given}"


def shown(value: object) -> str:
    """A value as it was given, the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _number(field: FieldInfo) -> str | None:
    """What a field of one kind of number must be, its bounds included; None for any other."""
    kinds = {kind for kind in (int, float) if kind in _parts(field.annotation)}
    if len(kinds) != 1:
        return None
    bounds: dict[str, Any] = {}
    for rule in (*field.metadata, *_parts(field.annotation)):
        bounds |= {name: getattr(rule, name) for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)}
    what = "a whole number" if kinds == {int} else "a number"
    if bounds.keys() == {"ge", "le"}:
        return f"must be {what} from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least {}", "gt": "above {}", "lt": "below {}", "le": "at most {}"}
    limits = " and ".join(words[name].format(bounds[name]) for name in words if name in bounds)
    return f"must be {what} {limits}".rstrip()


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        if isinstance(part, FieldInfo):
            yield from part.metadata
        yield from _parts(part)
