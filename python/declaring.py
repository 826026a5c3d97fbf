"""Keywords of the Python API from what declares them: the table of decoding parameters, recipes and settings.

    python -m topkapi.python.declaring

writes `decoding_fields.py` and `recipe_fields.py`, by which type checkers and editors know the keywords.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from topkapi.model.decoding.parameters import PARAMETERS, Kind, Parameter
from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, PretrainRecipe, TrainingRecipe

HERE = Path(__file__).parent
Function = TypeVar("Function", bound=Callable[..., Any])

TYPES: Mapping[Kind, str] = {
    "integer": "int", "number": "float", "boolean": "bool", "text": "str", "strings": "str | Sequence[str]",
    "integers": "Sequence[int]", "integer_to_number": "Mapping[int, float]",
    "words": "str | Sequence[str | Sequence[int]]", "schema": "Mapping[str, Any] | bool",
    "prompt": "str | Sequence[int]", "layers": 'Literal["low", "high"] | Sequence[int]',
}  # fmt: skip
"""What a caller in Python may give for each kind of parameter."""

KINDS: Mapping[str, type[TrainingRecipe]] = {
    "PretrainFields": PretrainRecipe, "FinetuneFields": FinetuneRecipe, "DpoFields": DpoRecipe,
}  # fmt: skip

WEIGHTED = ("data", "weights", "generation")
"""Lists of a recipe that may also be objects: names with numbers."""

_HEAD = '''"""{about}, written by `python -m topkapi.python.declaring`: do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
{imports}

'''


class Keywords(inspect.Signature):
    """A signature of many keywords: its `parameters` are complete, as text it is wrapped, or `brief`.

    Of functions that take what another one takes, `help` says so instead of listing it again.
    """

    __slots__ = ("brief",)

    def __init__(self, *arguments: Any, brief: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.brief = brief

    def replace(self, **changes: Any) -> Keywords:
        """As `inspect.Signature` does."""
        changed = super().replace(**changes)
        return Keywords(
            list(changed.parameters.values()), return_annotation=changed.return_annotation, brief=self.brief
        )

    def __str__(self) -> str:
        shown = []
        for each in self.parameters.values():
            if each.kind is each.KEYWORD_ONLY and "*" not in shown:
                shown.append("*")
            if not isinstance(each.annotation, _Declared):
                shown.append(_shown(each))
            elif not self.brief:
                shown.append(f"{each.name}={each.default!r}")
        shown += ["**parameters"] if self.brief else []
        returned = "" if self.return_annotation is self.empty else f" -> {self.return_annotation}"
        text = f"({', '.join(shown)}){returned}"
        return text if len(text) <= 100 else textwrap.fill(text, 100, subsequent_indent="    ")

    def format(self, **_: Any) -> str:
        """As text, for Python's own help from 3.13 on."""
        return str(self)


class _Declared(str):
    """The type of a keyword that comes from a declaration."""

    __slots__ = ()


def _shown(parameter: inspect.Parameter) -> str:
    """A parameter as it is written."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}{kind}{default}"


def declares(keywords: Mapping[str, tuple[str, Any]], *, brief: bool = False) -> Callable[[Function], Function]:
    """A decorator: the function's `**keywords` are these, each with its type and its default, for who looks."""

    def declare(function: Function) -> Function:
        own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_Declared(kind))
            for name, (kind, default) in keywords.items()
        ]
        returned = inspect.signature(function).return_annotation
        function.__signature__ = Keywords([*own, *more], return_annotation=returned, brief=brief)  # type: ignore[attr-defined]
        return function

    return declare


def as_declared_by(other: Callable[..., Any]) -> Callable[[Function], Function]:
    """A decorator: the function takes what the `other` one does."""

    def declare(function: Function) -> Function:
        returned = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(other).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return function

    return declare


def decoding_keywords() -> dict[str, tuple[str, Any]]:
    """Type and default of each decoding parameter: None, for what counts then is the checkpoint's own."""
    return {each.name: (f"{TYPES[each.kind]} | None", None) for each in PARAMETERS}


def recipe_keywords(kind: type[TrainingRecipe]) -> dict[str, tuple[str, Any]]:
    """Type and default of each field of a recipe."""
    return {
        name: (
            _recipe_type(field.annotation) + (" | Mapping[str, float]" if name in WEIGHTED else ""),
            field.get_default(call_default_factory=True),
        )
        for name, field in kind.model_fields.items()
    }


def decoding_fields() -> str:
    """The module that declares the decoding parameters."""
    lines = [
        _HEAD.format(about="The decoding parameters as keywords", imports="from typing import Any, Literal, TypedDict"),
        "\nclass DecodingFields(TypedDict, total=False):\n",
        *_docstring("What `generate` and its like take. Left out, or None: the checkpoint's default, then this one.",
                    map(_parameter_line, PARAMETERS)),
        *(_line(name, kind) for name, (kind, _) in decoding_keywords().items()),
    ]  # fmt: skip
    return "".join(lines)


def recipe_fields() -> str:
    """The module that declares the fields of recipes."""
    imports = "from os import PathLike\nfrom typing import Literal, TypedDict"
    lines = [_HEAD.format(about="The fields of recipes as keywords", imports=imports), "Text = str | PathLike[str]\n"]
    for name, kind in KINDS.items():
        about = f"What `{name.removesuffix('Fields').lower()}` takes: the fields of its recipe."
        lines += [
            f'\n\nclass {name}(TypedDict, total=False):\n    """{about}"""\n\n',
            *(_line(field, annotation) for field, (annotation, _) in recipe_keywords(kind).items()),
        ]
    return "".join(lines)


def _line(name: str, kind: str) -> str:
    """A field, and one of many choices over several lines, as the formatter has it."""
    line = f"    {name}: {kind}\n"
    if len(line) <= 120:
        return line
    opening, _, choices = kind.partition("[")
    return "".join(
        [f"    {name}: {opening}[\n", *(f"        {each},\n" for each in choices[:-1].split(", ")), "    ]\n"]
    )


def _parameter_line(parameter: Parameter) -> tuple[str, str]:
    default = parameter.default
    shown = "" if default is None or default in ([], {}) else f" [{default!r}]"
    return parameter.name, f"{parameter.meaning}{shown}"


def described(keywords: Iterable[tuple[str, str]]) -> str:
    """Names and what they mean, as the lines of a docstring."""
    return "\n".join(
        textwrap.fill(f"{name}: {meaning}", 110, initial_indent="    ", subsequent_indent="        ")
        for name, meaning in keywords
    )


def _docstring(first: str, keywords: Iterable[tuple[str, str]]) -> Iterator[str]:
    body = described(keywords).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    yield f'    """{first}\n\n{body}\n    """\n\n'


def _recipe_type(annotation: Any) -> str:
    """The annotation of a field as a caller may give it: paths for texts, and one text for a list of one."""
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_recipe_type, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return f"Literal{json.dumps(get_args(annotation))}"
    if annotation == list[str]:
        return "Text | Sequence[Text]"
    return {str: "Text", NoneType: "None"}.get(annotation) or re.sub(r"^<class '(.*)'>$", r"\1", str(annotation))


if __name__ == "__main__":
    (HERE / "decoding_fields.py").write_text(decoding_fields(), encoding="utf-8")
    (HERE / "recipe_fields.py").write_text(recipe_fields(), encoding="utf-8")
