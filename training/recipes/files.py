"""Recipe files: found by path or by name, read, and checked field by field."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from topkapi.model.errors import SettingsError
from topkapi.model.flags import flag_of
from topkapi.model.nearest import nearest
from topkapi.model.user_files import LONGEST_SETTINGS, read_file, what_it_is
from topkapi.model.wrong_values import told
from topkapi.model.yaml_reading import parse_yaml
from topkapi.training.recipes.contradictions import check_together
from topkapi.training.recipes.recipe import TrainingRecipe

RECIPES = Path(__file__).parent
R = TypeVar("R", bound=TrainingRecipe)


def resolve_recipe(name: str) -> Path:
    """A YAML file, or the name of one that comes with Topkapi."""
    path = Path(name)
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        raise SettingsError(
            f"{name} is not a recipe, which is a .yaml file",
            field="recipe",
            hint=f"if it is what to train on, give it as data: --data {name}",
        )
    if path.is_file():
        return path
    if other := what_it_is(path):
        raise SettingsError(f"the recipe {name} {other}", field="recipe", hint="name a .yaml file")
    included = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if included.is_file():
        return included
    names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    near = nearest(name, names)
    hint = f"did you mean {near}?" if near else f"give a .yaml file or one of: {', '.join(names)}"
    if name in ("pretrain", "finetune", "dpo", "kto"):
        hint = f"that is a kind of run: --run {name}"
    raise SettingsError(f"there is no recipe {name}", field="recipe", hint=hint)


_LINES = "for example: learning_rate: 0.001 in one line, batch_size: 16 in the next"


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a recipe file."""
    try:
        content = parse_yaml(read_file(path, LONGEST_SETTINGS, field="recipe", kind=SettingsError).decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise SettingsError(f"the recipe {path} cannot be read: {reason}", field="recipe", hint=_LINES) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"the recipe {path} must be a list of 'field: value' lines", field="recipe", hint=_LINES)
    return content


def build_recipe(kind: type[R], fields: dict[str, Any], source: str, flags: Iterable[str] = ()) -> R:
    """Check `fields`; `SettingsError` names the first one at fault and says what it may be.

    Those in `flags` were given on the command line, the others come from `source`.
    """
    try:
        recipe = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise unknown_field(source, name, kind) from None
        called = flag_of(name) if name in flags else f"{source}: '{name}'"
        raise SettingsError(
            told(called, first, kind.model_fields[name] if len(first["loc"]) == 1 else None),
            field=name,
            hint=kind.model_fields[name].description,
        ) from None
    check_together(recipe, set(flags))
    return recipe


def unknown_field(source: str, name: str, kind: type[TrainingRecipe]) -> SettingsError:
    """The error for what `source` says and no field of the recipe is, with the nearest one that is."""
    near = nearest(name, kind.model_fields)
    return SettingsError(
        f"{source}: unknown field {name!r}",
        field=name,
        hint=f"did you mean {near!r}?" if near else f"fields: {', '.join(sorted(kind.model_fields))}",
    )
