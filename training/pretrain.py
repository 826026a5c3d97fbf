"""`topkapi pretrain`: text files in, a checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from topkapi.model.config import ModelConfig
from topkapi.model.errors import DataError
from topkapi.model.files import write_directory
from topkapi.model.storage.checkpoint import Checkpoint, load_checkpoint, weights_digest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder, initialise
from topkapi.model.user_files import expanded
from topkapi.training.assembly import assemble, open_run, place
from topkapi.training.data.finding import TEXTS, find_data, held_out_files
from topkapi.training.data.inspection import token_findings
from topkapi.training.data.mixing import describe_mixture, mixed_order
from topkapi.training.data.shards import TokenData, prepare_tokens
from topkapi.training.data.vocabulary import tokenizer_for
from topkapi.training.data.weights import sources_and_weights
from topkapi.training.data.windows import WindowLoader
from topkapi.training.monitoring.samples import Prompt
from topkapi.training.optimisation import distributed
from topkapi.training.recipes.recipe import PretrainRecipe
from topkapi.training.recipes.shapes import CONTEXT_LENGTH, LONGEST_WINDOW, continued_config, new_config
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.preflight import chat_template
from topkapi.training.trainer import Training


def pretrain(recipe: PretrainRecipe, directory: RunDirectory, *, resume: bool, console: Console) -> Training:
    """The run in `directory` that trains a network from random weights, or a checkpoint's on, as `recipe` says; with
    `resume` it continues there.

    Raises `DataError`, `SettingsError` and `CheckpointError`.
    """
    saved, device = open_run(recipe, directory, resume)
    parent = None if recipe.checkpoint is None else load_checkpoint(recipe.checkpoint, dtype=torch.float32)
    chat = chat_template(recipe.chat_template) or (parent.chat if parent else None)
    names, weights = sources_and_weights(recipe.data)
    found = find_data(names, recipe.data_hint)
    sources, files = found.sources, found.files
    if weights is not None and len(files) < sum(map(len, sources)):
        raise DataError("a file belongs to two sources of the mixture", field="data", hint="name each file once")
    validation_files = held_out_files(found, recipe.validation_data, recipe.validation_fraction, TEXTS)
    if found.left_out:
        console.message(f"not used: {', '.join(found.left_out)}")
    with distributed.in_turn():
        tokenizer = parent.tokenizer if parent else _tokenizer(recipe, files, directory, console, resume)
        data = prepare_tokens(
            files,
            validation_files,
            tokenizer,
            cache=expanded(recipe.cache),
            text_field=recipe.text_field,
            validation_fraction=recipe.validation_fraction,
            split=recipe.split,
            deduplicate=recipe.deduplicate,
            alone=recipe.lone_sentences,
            groups=None if weights is None else [len(source) for source in sources],
            progress=console.count,
        )
    if data.unused_fields:
        console.message(f"fields of the rows that are not used: {', '.join(data.unused_fields)}")
    model = _model(recipe, parent, tokenizer)
    window = _window(recipe, parent)
    generation = parent.generation if parent else {"temperature": 0.8, "top_p": 0.95}
    facts: dict[str, Any] = {"data": data.info, "parameters": model.config.parameter_count()}
    if parent:
        facts["parent"] = {"name": parent.name, "sha256": weights_digest(Path(str(recipe.checkpoint)))}
    of = f" of {parent.name}" if parent else ""
    del parent  # its weights are in `model` now
    place(model, recipe, device)
    loader, validation = _loaders(recipe, data, window, tokenizer.end_token_id, weights)
    training = assemble(
        recipe,
        "pretrain",
        model,
        directory=directory,
        console=console,
        saved=saved,
        tokenizer=tokenizer,
        chat=chat,
        generation=generation,
        loader=loader,
        validation=validation,
        prompts=[
            Prompt(prompt, tokenizer.encode(prompt)) for prompt in recipe.sample_prompts or _opening(tokenizer, data)
        ],
        facts=facts,
    )
    _announce(training, data, window, of)
    if weights is not None:
        epochs = training.schedule.total_steps / loader.steps_per_epoch
        for line in describe_mixture(names, loader.parts, weights, epochs):
            console.message(line)
    stride = recipe.stride or window
    console.warn(token_findings(data, tokenizer, context=window, stride=stride, batch_size=recipe.batch_size))
    return training


def model_config(recipe: PretrainRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """A new network's configuration for the tokenizer's vocabulary."""
    return new_config(recipe, tokenizer.vocab_size, tokenizer.begin_token_id, tokenizer.end_token_id)


def _model(recipe: PretrainRecipe, parent: Checkpoint | None, tokenizer: Tokenizer) -> Decoder:
    """A new network, or the parent's with the recipe's changes."""
    if parent:
        model = Decoder(continued_config(recipe, parent.config))
        model.load_state_dict(parent.model.state_dict())
        return model
    model = Decoder(model_config(recipe, tokenizer))
    initialise(model, torch.Generator().manual_seed(recipe.seed), recipe.initialisation)
    return model


def _window(recipe: PretrainRecipe, parent: Checkpoint | None) -> int:
    if recipe.context_length is not None:
        return recipe.context_length
    return min(parent.config.context_length, LONGEST_WINDOW) if parent else CONTEXT_LENGTH


def _tokenizer(
    recipe: PretrainRecipe, files: Sequence[Path], directory: RunDirectory, console: Console, resume: bool
) -> Tokenizer:
    if recipe.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if recipe.tokenizer is not None:
        return Tokenizer.from_directory(Path(recipe.tokenizer))
    own = directory.prepared("tokenizer")
    # Of several processes the first one has just trained it.
    if (resume or distributed.rank()) and own.is_dir():
        return Tokenizer.from_directory(own)
    console.message("training a tokenizer")
    tokenizer = tokenizer_for(files, recipe.vocab_size, recipe.text_field, recipe.tokenizer_megabytes)
    with write_directory(own) as partial:
        tokenizer.save(partial)
    return tokenizer


def _loaders(
    recipe: PretrainRecipe, data: TokenData, context: int, separator: int | None, weights: list[float] | None
) -> tuple[WindowLoader, WindowLoader | None]:
    stride = recipe.stride or context
    common: dict[str, Any] = {
        "context": context,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "sources": ", ".join(recipe.data),
        "separator": separator if recipe.document_mask else None,
    }
    order, parts = None, None
    if weights is not None:
        order, parts = partial(mixed_order, recipe.seed, weights=weights), data.info["train_parts"]
    loader = WindowLoader(data.train, stride=stride, documents=data.train_documents, order=order, parts=parts, **common)
    for source, windows in zip(recipe.data, loader.parts if weights else [], strict=False):
        if not windows:
            raise DataError(
                f"{source} does not fill one window of {context} tokens",
                field="data",
                hint="give it more text, lower --context-length, or leave it out",
            )
    if not len(data.validation):
        return loader, None
    if recipe.validation_data:
        common["sources"] = ", ".join(recipe.validation_data)
    return loader, WindowLoader(data.validation, stride=context, validation=True, **common)


def _opening(tokenizer: Tokenizer, data: TokenData) -> list[str]:
    """The first words of the validation text, else of the training text: a prompt that fits any data."""
    stream = data.validation if len(data.validation) else data.train
    return [tokenizer.decode(stream[:8].tolist(), skip_control=True)]


def _announce(training: Training, data: TokenData, window: int, of: str) -> None:
    console = training.console
    if again := data.info.get("repeated_documents"):
        console.message(f"left out {again:,} documents that repeat another")
    config, recipe, total = training.model.config, training.recipe, training.schedule.total_steps
    tokens = total * recipe.batch_size * window
    console.message(
        f"{config.parameter_count():,} parameters{of} ({config.family}, {config.num_layers} layers x "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,})"
    )
    console.message(
        f"{data.info['train_tokens']:,} training tokens in {data.info['train_documents']:,} documents, "
        f"{data.info['validation_tokens']:,} for validation"
    )
    console.message(
        f"{total:,} steps of {recipe.batch_size} x {window} tokens: {tokens:,} tokens, "
        f"{total / training.loader.steps_per_epoch:.2f} epochs"
    )
