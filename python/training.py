"""`pretrain`, `finetune`, `dpo` and `kto` from Python: commands of these names, their recipes' fields as keywords."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from topkapi.python.declaring import declares, recipe_keywords
from topkapi.python.errors import readable
from topkapi.python.runs import Run
from topkapi.training.recipes.arguments import unknown_field
from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, KtoRecipe, PretrainRecipe, TrainingRecipe

if TYPE_CHECKING:
    from topkapi.python.dpo_fields import DpoFields
    from topkapi.python.finetune_fields import FinetuneFields
    from topkapi.python.kto_fields import KtoFields
    from topkapi.python.pretrain_fields import PretrainFields

Recipe = str | os.PathLike[str] | None
Resume = bool | str | os.PathLike[str]


@declares(recipe_keywords(PretrainRecipe))
def pretrain(recipe: Recipe = None, *, resume: Resume = False, **fields: Unpack[PretrainFields]) -> Run:
    """Train a model from random weights on plain text, and return its run.

        run = topkapi.pretrain(data="book.txt", model="tiny", context_length=128, epochs=3, out="runs/book")

    Keywords are the fields of the recipe, which help(topkapi.PretrainFields) explains; `recipe` is a file of such
    fields, or the name of one that comes with Topkapi, and keywords override it. All goes as with the command: it
    prints how it goes, leaves a directory (`out`, or one below runs/), and Ctrl-C saves and stops it. `resume=True`
    goes on with the run in `out`, `resume="runs/x"` with that one. Raises `topkapi.TopkapiError`, whose `field` is the
    keyword at fault.
    """
    return _train("pretrain", PretrainRecipe, recipe, resume, fields)


@declares(recipe_keywords(FinetuneRecipe))
def finetune(recipe: Recipe = None, *, resume: Resume = False, **fields: Unpack[FinetuneFields]) -> Run:
    """Train a checkpoint on instructions or conversations, and return the run.

        run = topkapi.finetune(checkpoint="checkpoints/topkapi-base", data="answers.jsonl", learning_rate=1e-3)

    Keywords are the fields of the recipe, which help(topkapi.FinetuneFields) explains; `recipe` is a file of such
    fields, or the name of one that comes with Topkapi, and keywords override it. All goes as with the command: it
    prints how it goes, leaves a directory (`out`, or one below runs/), and Ctrl-C saves and stops it. `resume=True`
    goes on with the run in `out`, `resume="runs/x"` with that one. Raises `topkapi.TopkapiError`, whose `field` is the
    keyword at fault.
    """
    return _train("finetune", FinetuneRecipe, recipe, resume, fields)


@declares(recipe_keywords(DpoRecipe))
def dpo(recipe: Recipe = None, *, resume: Resume = False, **fields: Unpack[DpoFields]) -> Run:
    """Train a checkpoint to prefer some answers to others, and return the run.

        run = topkapi.dpo(checkpoint="runs/answers/best", data="preferences.jsonl", beta=0.1)

    Keywords are the fields of the recipe, which help(topkapi.DpoFields) explains; `recipe` is a file of such
    fields, or the name of one that comes with Topkapi, and keywords override it. All goes as with the command: it
    prints how it goes, leaves a directory (`out`, or one below runs/), and Ctrl-C saves and stops it. `resume=True`
    goes on with the run in `out`, `resume="runs/x"` with that one. Raises `topkapi.TopkapiError`, whose `field` is the
    keyword at fault.
    """
    return _train("dpo", DpoRecipe, recipe, resume, fields)


@declares(recipe_keywords(KtoRecipe))
def kto(recipe: Recipe = None, *, resume: Resume = False, **fields: Unpack[KtoFields]) -> Run:
    """Train a checkpoint on answers labelled good or bad, and return the run.

        run = topkapi.kto(checkpoint="runs/answers/best", data="labelled.jsonl", beta=0.1)

    Keywords are the fields of the recipe, which help(topkapi.KtoFields) explains; `recipe` is a file of such
    fields, or the name of one that comes with Topkapi, and keywords override it. All goes as with the command: it
    prints how it goes, leaves a directory (`out`, or one below runs/), and Ctrl-C saves and stops it. `resume=True`
    goes on with the run in `out`, `resume="runs/x"` with that one. Raises `topkapi.TopkapiError`, whose `field` is the
    keyword at fault.
    """
    return _train("kto", KtoRecipe, recipe, resume, fields)


def _train(
    command: str, kind: type[TrainingRecipe], recipe: Recipe, resume: Resume, fields: Mapping[str, object]
) -> Run:
    with readable(kind.model_fields.keys() | {"resume", "recipe"}):
        for name in fields:
            if name not in kind.model_fields:
                raise unknown_field(command, name, kind)
        from topkapi.training.recipes.arguments import read_arguments
        from topkapi.training.start import train

        given = argparse.Namespace(
            recipe=None if recipe is None else os.fspath(recipe),
            resume=None if resume is False else "" if resume is True else os.fspath(resume),
            training_kind=kind,
            training_command=command,
            **{name: _plain(kind, name, value) for name, value in fields.items() if (name, value) != ("out", None)},
        )
        recipe_read, directory, goes_on = read_arguments(given)
        with _threads():
            train(recipe_read, directory, goes_on)
        return Run.open(directory)


class _threads:
    """Gives back the number of threads that were used before: a run may set another one."""

    def __enter__(self) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        self._before = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self._before)


def _plain(kind: type[TrainingRecipe], name: str, value: Any) -> Any:
    """A value as a recipe file has it: paths as texts, and a list where there may be several."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind.model_fields[name].annotation == list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, Mapping):
            return {os.fspath(key) if isinstance(key, os.PathLike) else key: each for key, each in value.items()}
        if isinstance(value, Sequence):
            return [os.fspath(each) if isinstance(each, os.PathLike) else each for each in value]
    return value
