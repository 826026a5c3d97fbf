"""`topkapi pretrain`: text files in, a checkpoint out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import BUILT_IN_TEMPLATES, ChatTemplate
from topkapi.model.errors import DataError, SettingsError
from topkapi.model.files import write_directory
from topkapi.model.generation import generate
from topkapi.model.linear import set_compute_dtype
from topkapi.model.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, weights_digest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder, initialise
from topkapi.model.user_files import LONGEST_SETTINGS, read_file
from topkapi.training.data.inspection import token_findings
from topkapi.training.data.mixing import describe_mixture, mixed_order
from topkapi.training.data.shards import TokenData, prepare_tokens, tokenizer_digest
from topkapi.training.data.sources import fields_beside, find_files
from topkapi.training.data.weights import sources_and_weights
from topkapi.training.data.windows import WindowLoader
from topkapi.training.optimisation import distributed, sharding
from topkapi.training.optimisation.device import prepare_torch
from topkapi.training.optimisation.optimisers import Optimizers
from topkapi.training.optimisation.schedule import Schedule, warmup_steps
from topkapi.training.recipes.recipe import PretrainRecipe, TrainingRecipe, deciding_fields
from topkapi.training.recipes.shapes import CONTEXT_LENGTH, LONGEST_WINDOW, continued_config, new_config
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.preflight import check_chat_template, check_inputs
from topkapi.training.run.state import Standing
from topkapi.training.tokenizer import tokenizer_for
from topkapi.training.trainer import Training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pretrain(
    recipe: PretrainRecipe,
    directory: RunDirectory,
    *,
    resume: bool,
    console: Console,
    command: str,
    proceed: Callable[[Training], Standing] = Training.run,
) -> Standing:
    """Train a network from random weights, or a checkpoint's on, as `recipe` says, in `directory`; continue there with
    `resume`.

    `proceed` is what is done once everything is ready, for whoever wants to try it out instead.

    Raises `DataError`, `SettingsError`, `CheckpointError`, `Diverged` and `Interrupted`.
    """
    check_inputs(recipe)
    parent = _parent(recipe)
    chat = chat_template(recipe.chat_template) or (parent.chat if parent else None)
    names, weights = sources_and_weights(recipe.data)
    sources = [find_files([name], recipe.data_hint) for name in names]
    files = list(dict.fromkeys(file for source in sources for file in source))
    if weights is not None and len(files) < sum(map(len, sources)):
        raise DataError("a file belongs to two sources of the mixture", field="data", hint="name each file once")
    validation_files = find_files(recipe.validation_data)
    if beside := {name for file in files for name in fields_beside(file, recipe.text_field)}:
        console.message(f"fields of the rows that are not used: {', '.join(sorted(beside))}")
    with distributed.in_turn():
        saved = directory.load_state() if resume else None
        device = prepare_torch(recipe, saved[1]["threads"] if saved else None)
        tokenizer = parent.tokenizer if parent else _tokenizer(recipe, files, directory, console, resume)
        data = prepare_tokens(
            files,
            validation_files,
            tokenizer,
            cache=Path(recipe.cache).expanduser(),
            text_field=recipe.text_field,
            validation_fraction=recipe.validation_fraction,
            split=recipe.split,
            deduplicate=recipe.deduplicate,
            alone=recipe.lone_sentences,
            groups=None if weights is None else [len(source) for source in sources],
            progress=console.count,
        )
    config = continued_config(recipe, parent.config) if parent else model_config(recipe, tokenizer)
    window = _window(recipe, parent)
    model = Decoder(config)
    if parent:
        model.load_state_dict(parent.model.state_dict())
    else:
        initialise(model, torch.Generator().manual_seed(recipe.seed), recipe.initialisation)
    inherited = parent.generation if parent else {"temperature": 0.8, "top_p": 0.95}
    of = f" of {parent.name}" if parent else ""
    origin = {"parent": {"name": parent.name, "sha256": weights_digest(Path(str(recipe.checkpoint)))}} if parent else {}
    del parent  # its weights are in `model` now
    model.to(device)
    set_compute_dtype(model, torch.bfloat16 if recipe.precision == "bf16" else None)
    sharding.distribute(model, recipe.parallel)
    loader, validation = _loaders(recipe, data, window, tokenizer.end_token_id, weights)
    schedule, every = plan(recipe, loader.steps_per_epoch)

    def sample(standing: Standing) -> Iterator[dict[str, Any]]:
        for prompt in recipe.sample_prompts or _opening(tokenizer, data):
            parameters = {
                "max_tokens": recipe.sample_tokens,
                "temperature": recipe.sample_temperature,
                "seed": recipe.seed + standing.step,
            }
            result = generate(model, tokenizer.encode(prompt), parameters)
            yield {
                "prompt": prompt,
                "text": tokenizer.decode(result.token_ids, skip_control=True),
                "finish_reason": result.finish_reason,
                "token_ids": result.token_ids,
            }

    def save(path: Path, network: Decoder, details: Any) -> None:
        save_checkpoint(
            path,
            model=network,
            tokenizer=tokenizer,
            chat=chat,
            generation=recipe.generation_config(inherited, config.end_token_ids),
            details=details,
            dtype=DTYPES[recipe.checkpoint_dtype],
        )

    facts = {
        "made_by": "topkapi pretrain",
        "recipe": deciding_fields(recipe),
        "data": data.info,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "parameters": config.parameter_count(),
        **origin,
    }
    training = Training(
        recipe=recipe,
        model=model,
        optimizers=build_optimizers(recipe, model),
        schedule=schedule,
        loader=loader,
        train_batches=loader.first(recipe.evaluation_batches or 8),
        validation_batches=validation.first(recipe.evaluation_batches) if validation else [],
        directory=directory,
        console=console,
        save=save,
        sample=sample,
        facts=facts,
        command=command,
        evaluate_every=every,
        text_of=tokenizer.decode,
        held_out=data.validation,
    )
    start_or_resume(training, saved)
    _announce(training, data, window, of, console)
    if weights is not None:
        for line in describe_mixture(names, loader.parts, weights, schedule.total_steps / loader.steps_per_epoch):
            console.message(line)
    findings = token_findings(
        data,
        tokenizer,
        context=window,
        stride=recipe.stride or window,
        batch_size=recipe.batch_size,
    )
    console.warn(findings)
    return proceed(training)


def start_or_resume(training: Training, saved: tuple[dict[str, torch.Tensor], dict[str, Any]] | None) -> None:
    """Take over a saved state, once it is certain that the run would go on with the same data."""
    if saved is None:
        return
    tensors, facts = saved
    for name in ("data", "tokenizer_sha256", "parent"):
        if facts["run"].get(name) != training.facts.get(name):
            raise DataError(
                f"the {name.removesuffix('_sha256')} changed since the run in {training.directory.path} was started",
                field=name.removesuffix("_sha256"),
                hint="bring the earlier files back, or start another run with another --out",
            )
    training.load_state(tensors, facts)
    training.console.message(f"resumed at step {training.standing.step} of {training.schedule.total_steps}")


def plan(recipe: TrainingRecipe, steps_per_epoch: int) -> tuple[Schedule, int]:
    """The schedule, and the updates between evaluations."""
    total = recipe.max_steps or max(1, math.ceil(recipe.epochs * steps_per_epoch))
    schedule = Schedule(
        recipe.schedule, total, warmup_steps(recipe.warmup, total), recipe.final_learning_rate, recipe.decay_fraction
    )
    return schedule, recipe.evaluate_every or max(1, total // 20)


def build_optimizers(recipe: TrainingRecipe, model: Decoder) -> Optimizers:
    """The recipe's optimisers over `model`."""
    return Optimizers(
        model,
        name=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        muon_learning_rate=recipe.muon_learning_rate or recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(recipe.beta1, recipe.beta2),
        decay=recipe.decay,
    )


def model_config(recipe: PretrainRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """A new network's configuration for the tokenizer's vocabulary."""
    return new_config(recipe, tokenizer.vocab_size, tokenizer.begin_token_id, tokenizer.end_token_id)


def _parent(recipe: PretrainRecipe) -> Checkpoint | None:
    """The checkpoint that is trained on."""
    return None if recipe.checkpoint is None else load_checkpoint(recipe.checkpoint, dtype=torch.float32)


def _window(recipe: PretrainRecipe, parent: Checkpoint | None) -> int:
    if recipe.context_length is not None:
        return recipe.context_length
    return min(parent.config.context_length, LONGEST_WINDOW) if parent else CONTEXT_LENGTH


def chat_template(name: str | None) -> ChatTemplate | None:
    """A built-in template by its name, or one read from a file. Raises `SettingsError` where there is none."""
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


def _announce(training: Training, data: TokenData, window: int, of: str, console: Console) -> None:
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
