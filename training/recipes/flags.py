"""Command-line flags from a recipe's fields, so that nothing is said twice."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from topkapi.model.flags import add_flags, declared
from topkapi.training.recipes.recipe import TrainingRecipe


def add_recipe_flags(parser: argparse.ArgumentParser, *kinds: type[TrainingRecipe]) -> None:
    """One flag per field of the `kinds`, grouped; what is given stays text, which the recipe reads."""
    add_flags(parser, declared({name: field for kind in reversed(kinds) for name, field in kind.model_fields.items()}))


def given_flags(namespace: argparse.Namespace, kind: type[TrainingRecipe]) -> dict[str, Any]:
    """The recipe fields that were given as flags; `none` clears an optional one."""
    given = {name: value for name, value in vars(namespace).items() if name in kind.model_fields}
    for name, value in given.items():
        if value == "none" and type(None) in get_args(kind.model_fields[name].annotation):
            given[name] = None
    return given
