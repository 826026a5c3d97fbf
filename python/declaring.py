"""Keywords of the Python API from what declares them: the table of decoding parameters, recipes and settings.

    python -m topkapi.python.declaring

writes the files whose names end in `_fields.py`, by which type checkers and editors know the keywords.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from topkapi.model.decoding.parameters import PARAMETERS, Kind

if TYPE_CHECKING:
    from pydantic import BaseModel

HERE = Path(__file__).parent
Function = TypeVar("Function", bound=Callable[..., Any])

TYPES: Mapping[Kind, str] = {
    "integer": "int", "number": "float", "boolean": "bool", "text": "str", "strings": "str | Sequence[str]",
    "integers": "Sequence[int]", "integer_to_number": "Mapping[int, float]",
    "words": "str | Sequence[str | Sequence[int]]", "schema": "Mapping[str, Any] | bool",
    "prompt": "str | Sequence[int]", "layers": 'Literal["low", "high"] | Sequence[int]',
}  # fmt: skip
"""What a caller in Python may give for each kind of parameter."""

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
    marks: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    stars = marks.get(parameter.kind, "")
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


def decoding_keywords() -> dict[str, tuple[str, Any]]:
    """Type and default of each decoding parameter: None, for what counts then is the checkpoint's own."""
    return {each.name: (f"{TYPES[each.kind]} | None", None) for each in PARAMETERS}


def recipe_keywords(kind: type[BaseModel]) -> dict[str, tuple[str, Any]]:
    """Type and default of each field of a recipe."""
    return {
        name: (
            _recipe_type(field.annotation) + (" | Mapping[str, float]" if name in WEIGHTED else ""),
            field.get_default(call_default_factory=True),
        )
        for name, field in kind.model_fields.items()
    }


def files() -> dict[str, str]:
    """The files that declare keywords, by their names."""
    about, imports = "The decoding parameters as keywords", "from typing import Any, Literal, TypedDict"
    made = {"decoding_fields.py": _HEAD.format(about=about, imports=imports) + "\n" + _fields(
        "DecodingFields",
        "What `generate` and its like take. Left out, or None: the checkpoint's default, then this one.",
        decoding_keywords(),
        {each.name: each.meaning for each in PARAMETERS},
        {each.name: each.default for each in PARAMETERS},
    )}  # fmt: skip
    from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, KtoRecipe, PretrainRecipe

    imports = "from os import PathLike\nfrom typing import Literal, TypedDict"
    recipes: Mapping[str, type[BaseModel]] = {
        "pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "dpo": DpoRecipe, "kto": KtoRecipe,
    }  # fmt: skip
    for command, kind in recipes.items():
        keywords = recipe_keywords(kind)
        meanings = {name: field.description or "" for name, field in kind.model_fields.items()}
        made[f"{command}_fields.py"] = "".join([
            _HEAD.format(about=f"The fields of a recipe for `{command}` as keywords", imports=imports),
            "Text = str | PathLike[str]\n\n\n",
            _fields(f"{command.capitalize()}Fields", f"What `topkapi.{command}` takes: the fields of its recipe.",
                    keywords, meanings, {name: default for name, (_, default) in keywords.items()}),
        ])  # fmt: skip
    return made


def _fields(
    name: str,
    about: str,
    keywords: Mapping[str, tuple[str, Any]],
    meanings: Mapping[str, str],
    defaults: Mapping[str, Any],
) -> str:
    """The class that declares keywords."""
    lines = []
    for keyword, meaning in meanings.items():
        default = defaults[keyword]
        # Some meanings say it themselves.
        said = default is None or default in ([], {}) or "(default" in meaning
        text = meaning if said else f"{meaning} [{default!r}]"
        lines.append(textwrap.fill(f"{keyword}: {text}", 110, initial_indent="    ", subsequent_indent="        "))
    described = "\n".join(lines).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    body = "".join(_line(keyword, kind) for keyword, (kind, _) in keywords.items())
    return f'class {name}(TypedDict, total=False):\n    """{about}\n\n{described}\n    """\n\n{body}'


def _line(name: str, kind: str) -> str:
    """A field, and one of many choices over several lines, as the formatter has it."""
    line = f"    {name}: {kind}\n"
    if len(line) <= 120:
        return line
    opening, _, choices = kind.partition("[")
    return "".join(
        [f"    {name}: {opening}[\n", *(f"        {each},\n" for each in choices[:-1].split(", ")), "    ]\n"]
    )


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
    for name, text in files().items():
        (HERE / name).write_text(text, encoding="utf-8")
