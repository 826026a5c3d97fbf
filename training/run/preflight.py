"""What is wrong with a run can often be seen without torch, which takes seconds to import: files that are not there,
settings that do not go together, a directory that is taken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from topkapi.model.conversation.template_files import BUILT_IN_TEMPLATES
from topkapi.model.errors import DataError, SettingsError
from topkapi.model.storage.location import check_location
from topkapi.model.user_files import LONGEST_SETTINGS, read_file, what_it_is
from topkapi.training.data.finding import DATASET, EXAMPLES, TEXTS, find_files
from topkapi.training.data.weights import sources_and_weights
from topkapi.training.recipes.recipe import PretrainRecipe, TrainingRecipe, TuningRecipe
from topkapi.training.recipes.shapes import check_inherited, continued_config, new_config
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.hub import check_push

if TYPE_CHECKING:
    from topkapi.model.conversation.chat_template import ChatTemplate


def alone() -> bool:
    """Whether this process trains by itself: several first meet, so that what is wrong is told once."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def check_run(recipe: TrainingRecipe, directory: Path, resume: bool) -> None:
    """Raise what the run would be refused for, as far as that can be seen at once."""
    if recipe.push is not None:
        check_push(recipe.push)
    run = RunDirectory(directory)
    if resume and (directory / "config.yaml").is_file():
        run.check_idle()
        run.check_compatible(recipe)
    else:
        run.check_free(recipe)
    check_inputs(recipe)


def check_inputs(recipe: TrainingRecipe) -> None:
    """Raise `DataError`, `SettingsError` or `CheckpointError` for files that are not there and settings that do not fit
    them. Datasets by their names are looked for later."""
    checkpoint: str | None = getattr(recipe, "checkpoint", None)
    tuning = isinstance(recipe, TuningRecipe)
    if tuning and checkpoint is None:
        raise SettingsError("no checkpoint to start from", field="checkpoint", hint="give one with --checkpoint")
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"device {recipe.device!r} is not supported", field="device", hint="use cpu, cuda or auto")
    if isinstance(recipe, PretrainRecipe):
        if checkpoint is None:
            new_config(recipe, recipe.vocab_size or 1)
        else:
            check_inherited(recipe)
    before = None if checkpoint is None else check_location(Path(checkpoint))
    if isinstance(recipe, PretrainRecipe):
        if before is not None:
            continued_config(recipe, before)
        _check_tokenizer(recipe.tokenizer)
    check_chat_template(getattr(recipe, "chat_template", None))
    if not recipe.data:
        what = "examples" if tuning else "text"
        raise DataError(
            f"no training {what}", field="data", hint=recipe.data_hint or "give files or folders with --data"
        )
    names, _ = sources_and_weights(recipe.data)
    kind = EXAMPLES if tuning else TEXTS
    find_files([name for name in names if not name.startswith(DATASET)], recipe.data_hint, kind=kind)
    held_out = [name for name in recipe.validation_data if not name.startswith(DATASET)]
    find_files(held_out, kind=kind, part="validation")


def check_chat_template(name: str | None) -> None:
    """Raise `SettingsError` for what is neither a built-in template nor a file."""
    if name is not None and name not in BUILT_IN_TEMPLATES and not Path(name).is_file():
        if other := what_it_is(Path(name)):
            raise SettingsError(f"the chat template {name} {other}", field="chat_template", hint="name a Jinja file")
        raise SettingsError(
            f"there is no chat template {name}",
            field="chat_template",
            hint=f"give a Jinja file or one of: {', '.join(BUILT_IN_TEMPLATES)}",
        )


def chat_template(name: str | None) -> ChatTemplate | None:
    """A built-in template by its name, or one read from a file. Raises `SettingsError` where there is none."""
    from topkapi.model.conversation.chat_template import ChatTemplate

    check_chat_template(name)
    if name is None:
        return None
    if name in BUILT_IN_TEMPLATES:
        return ChatTemplate.built_in(name)
    source = read_file(Path(name), LONGEST_SETTINGS, field="chat_template", kind=SettingsError)
    try:
        return ChatTemplate(source.decode("utf-8"), Path(name).stem)
    except UnicodeDecodeError as error:
        raise SettingsError(f"the chat template {name} is not UTF-8: {error}", field="chat_template") from None


def _check_tokenizer(name: str | None) -> None:
    if name not in (None, "gpt2") and not Path(str(name)).is_dir():
        raise SettingsError(
            f"there is no tokenizer at {name}",
            field="tokenizer",
            hint="give a directory with tokenizer.json, or gpt2; without one a vocabulary is trained on the text",
        )
