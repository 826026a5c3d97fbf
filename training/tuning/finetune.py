"""`topkapi finetune`: a checkpoint and instructions in, a checkpoint that answers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError, SettingsError
from topkapi.model.files import sha256
from topkapi.model.storage.checkpoint import Checkpoint, load_checkpoint, weights_digest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.training.assembly import assemble, open_run, place
from topkapi.training.data.finding import EXAMPLES, Found, find_data, held_out_files, named
from topkapi.training.data.inspection import conversation_findings, example_findings
from topkapi.training.data.instructions import (
    Conversation,
    Example,
    ExampleLoader,
    encode_conversations,
    read_conversations,
)
from topkapi.training.data.mixing import describe_mixture, mixed_order
from topkapi.training.data.row_files import Names
from topkapi.training.data.weights import sources_and_weights, unused
from topkapi.training.data.windows import EVALUATION_EPOCH, Loader, permutation
from topkapi.training.monitoring.samples import Prompt
from topkapi.training.optimisation.lora import AdapterPlan
from topkapi.training.optimisation.loss import NextToken, Objective
from topkapi.training.optimisation.optimisers import trained_parameters
from topkapi.training.recipes.recipe import FinetuneRecipe, TuningRecipe
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory, Saved
from topkapi.training.run.preflight import chat_template
from topkapi.training.trainer import Training

# What ChatML needs beyond a base tokenizer's vocabulary.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
SAMPLES = 3
Row = TypeVar("Row")


@dataclass(frozen=True)
class Base:
    """The checkpoint that is tuned, opened and placed, and what else all tuning begins with.

    Examples are at most `longest` tokens long; `digest` is that of the checkpoint's weights, `generation` its decoding
    defaults.
    """

    recipe: TuningRecipe
    directory: RunDirectory
    console: Console
    saved: Saved | None
    name: str
    digest: str
    generation: dict[str, Any]
    model: Decoder
    adapters: AdapterPlan | None
    tokenizer: Tokenizer
    chat: ChatTemplate
    longest: int


@dataclass(frozen=True)
class Examples:
    """What is trained on, and to what end: of training and of validation the loaders, how many `kind` each has, and the
    conversations. `findings` are what is wrong with these.
    """

    kind: str
    loaders: tuple[Loader, Loader]
    counts: tuple[int, int]
    conversations: tuple[Sequence[Conversation], Sequence[Conversation]]
    objective: Objective
    files: Sequence[Path]
    findings: Sequence[str] = ()


def finetune(recipe: FinetuneRecipe, directory: RunDirectory, *, resume: bool, console: Console) -> Training:
    """The run in `directory` that trains a checkpoint to answer as the assistant of conversations does, as `recipe`
    says; with `resume` it continues there.

    Raises `DataError` naming rows, `SettingsError` and `CheckpointError`.
    """
    base = open_base(recipe, directory, resume=resume, console=console)
    return assemble_tuning(base, "finetune", _conversations(recipe, base))


def open_base(recipe: TuningRecipe, directory: RunDirectory, *, resume: bool, console: Console) -> Base:
    """Open the recipe's checkpoint for a run in `directory`. Raises `SettingsError` and `CheckpointError`."""
    saved, device = open_run(recipe, directory, resume)
    assert recipe.checkpoint is not None, "checked with the other inputs"
    parent = load_checkpoint(recipe.checkpoint, dtype=torch.float32)
    chat = chat_template(recipe.chat_template) or parent.chat or ChatTemplate.built_in("chatml")
    tokenizer = _tokenizer(parent, chat, console)
    model = _model(recipe, parent, tokenizer, chat)
    adapters = AdapterPlan.of(recipe, model.config)
    if adapters:
        adapters.attach(model, _new_tokens(parent, tokenizer))
    name, generation = parent.name, parent.generation
    del parent  # its weights are in `model` now
    longest = min(recipe.context_length or model.config.context_length, model.config.context_length)
    if (recipe.context_length or 0) > longest:
        console.message(
            f"{name} reads {longest} tokens: a context_length of {recipe.context_length} does not change that"
        )
    place(model, recipe, device)
    if adapters:
        adapters.hold_base(model)
    return Base(
        recipe=recipe,
        directory=directory,
        console=console,
        saved=saved,
        name=name,
        digest=weights_digest(Path(recipe.checkpoint)),
        generation=generation,
        model=model,
        adapters=adapters,
        tokenizer=tokenizer,
        chat=chat,
        longest=longest,
    )


def assemble_tuning(base: Base, command: str, examples: Examples) -> Training:
    """The run of `topkapi {command}` that trains `base` on `examples`."""
    recipe, model, (loader, validation) = base.recipe, base.model, examples.loaders
    train, held_out = examples.conversations
    seen = {str(each.prompt()) for each in train}
    overlap = sum(str(each.prompt()) in seen for each in held_out)
    names = named(examples.files)
    parameters = model.config.parameter_count()
    trained = sum(parameter.numel() for _, parameter in trained_parameters(model))
    training = assemble(
        recipe,
        command,
        model,
        directory=base.directory,
        console=base.console,
        saved=base.saved,
        tokenizer=base.tokenizer,
        chat=base.chat,
        generation=base.generation,
        loader=loader,
        validation=validation,
        prompts=_sample_prompts(base, held_out or train),
        facts={
            "data": {
                "sources": {name: sha256(file) for name, file in zip(names, examples.files, strict=True)},
                "train_examples": examples.counts[0],
                "validation_examples": examples.counts[1],
                "validation_prompts_in_training": overlap,
            },
            "parent": {"name": base.name, "sha256": base.digest},
            "parameters": parameters,
            "trained_parameters": trained,
        },
        objective=examples.objective,
        adapters=base.adapters,
    )
    adapted = f", {trained:,} of adapters train" if base.adapters else ""
    base.console.message(
        f"{parameters:,} parameters of {base.name}{adapted}; {examples.counts[0]:,} training {examples.kind}, "
        f"{examples.counts[1]:,} for validation; {training.schedule.total_steps:,} steps of {recipe.batch_size}"
    )
    counted = example_findings(*examples.counts, examples.kind, overlap, recipe.batch_size)
    base.console.warn([*examples.findings, *counted])
    return training


def check_enough(recipe: TuningRecipe, kind: str, train: int, held_out: int) -> None:
    """Raise `DataError` for data that do not fill a batch, saying how much would."""
    if train >= recipe.batch_size:
        return
    apart = "" if recipe.validation_data or not held_out else f" ({held_out} more held out for validation)"
    needed, fraction = recipe.batch_size, 0.0 if recipe.validation_data else recipe.validation_fraction
    while fraction and needed - max(1, round(fraction * needed)) < recipe.batch_size:
        needed += 1
    raise DataError(
        f"{train} training {kind}{apart} do not fill one batch of {recipe.batch_size}",
        field="data",
        hint=f"give at least {needed + recipe.test_examples} {kind}, or lower --batch-size",
    )


def _conversations(recipe: FinetuneRecipe, base: Base) -> Examples:
    """The answers of the recipe's conversations."""
    left_out: set[str] = set()
    fields = Names(recipe.map)
    read = partial(read_conversations, input_heading=base.chat.name == "alpaca", left_out=left_out, names=fields)
    split = split_data(recipe, read)
    train, validation = split.train, split.validation
    fields.check("the data")
    names, weights = sources_and_weights(recipe.data)
    loaders, dropped = [], []
    for part in (train, validation):
        examples, overlong = encode_conversations(
            part, base.tokenizer, base.chat, longest=base.longest, drop_overlong=recipe.on_overlong == "drop"
        )
        dropped += overlong
        mixture: dict[str, Any] = {}
        if part is train and weights is not None:
            parts = _parts(examples, names, split.found.sources)
            mixture = {"order": partial(mixed_order, recipe.seed, weights=weights), "parts": parts}
            for line in describe_mixture(names, parts, weights, _epochs(recipe, len(examples))):
                base.console.message(line)
        loaders.append(
            ExampleLoader(
                examples,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                prompt_loss_weight=recipe.prompt_loss_weight,
                **mixture,
            )
        )
    report_left_out(base, split.found.left_out, left_out, dropped)
    if missing := unused(recipe.data, recipe.weights):
        base.console.message(f"no data file is called {' or '.join(missing)}: their weights are not used")
    counts = len(loaders[0].examples), len(loaders[1].examples)
    check_enough(recipe, "examples", *counts)
    return Examples(
        kind="examples",
        loaders=(loaders[0], loaders[1]),
        counts=counts,
        conversations=(train, validation),
        objective=NextToken(),
        files=split.files,
        findings=conversation_findings(train, validation),
    )


def _epochs(recipe: TuningRecipe, examples: int) -> float:
    return recipe.epochs if recipe.max_steps is None else recipe.max_steps * recipe.batch_size / max(1, examples)


def _parts(examples: list[Example], names: list[str], sources: list[list[Path]]) -> list[int]:
    """How many examples each source of a mixture has; they stand in the order of the sources."""
    of = Counter(example.origin.rpartition(", ")[0] for example in examples)
    if len({file for source in sources for file in source}) < sum(map(len, sources)):
        raise DataError("a file belongs to two sources of the mixture", field="data", hint="name each file once")
    parts = [sum(of[str(file)] for file in source) for source in sources]
    for name, size in zip(names, parts, strict=True):
        if not size:
            raise DataError(f"{name} has no example left to train on", field="data", hint="leave it out")
    return parts


def report_left_out(base: Base, files: Sequence[str], fields: set[str], dropped: list[str]) -> None:
    """Tell which files and fields of rows were not used, and what was left out for being too long, by its origin."""
    if files:
        base.console.message(f"not used: {', '.join(files)}")
    if fields:
        base.console.message(f"fields of the rows that are not used: {', '.join(sorted(fields))}")
    if dropped:
        base.console.warn(
            [f"left out {len(dropped)} examples longer than {base.longest} tokens, the first: {dropped[0]}"]
        )


def _sample_prompts(base: Base, rows: Sequence[Conversation]) -> list[Prompt]:
    """The recipe's prompts, else the first of `rows` that leave room for an answer, with what is expected."""
    asked: list[tuple[list[Any], str | None]] = [
        ([{"role": "user", "content": prompt}], None) for prompt in base.recipe.sample_prompts
    ]
    count = len(asked) or SAMPLES
    # Prompts with tools or other variables are not sampled.
    plain = (row for row in rows if not row.told)
    asked = asked or [(row.prompt(), row.messages[-1]["content"]) for row in islice(plain, 8 * SAMPLES)]
    found: list[Prompt] = []
    for messages, expected in asked:
        ids = base.chat.encode(messages, base.tokenizer, add_generation_prompt=True).token_ids
        if len(ids) + 1 < base.model.config.context_length and len(found) < count:
            found.append(Prompt(messages[-1]["content"], ids, expected))
    return found


def _tokenizer(parent: Checkpoint, chat: ChatTemplate, console: Console) -> Tokenizer:
    """The checkpoint's tokenizer, with ChatML's control tokens where it lacks them."""
    missing = [token for token in CHATML_TOKENS if token not in parent.tokenizer.control_tokens]
    if chat.name != "chatml" or not missing:
        return parent.tokenizer
    console.message(f"the vocabulary gets {' and '.join(missing)}")
    return parent.tokenizer.with_control_tokens(missing)


def _model(recipe: TuningRecipe, parent: Checkpoint, tokenizer: Tokenizer, chat: ChatTemplate) -> Decoder:
    """The parent's network, trainable, with the recipe's dropout and a row for every token."""
    before = parent.config
    ends = tuple(dict.fromkeys((*chat.turn_end(tokenizer), *before.end_token_ids)))
    config: ModelConfig = replace(
        before,
        dropout=before.dropout if recipe.dropout is None else recipe.dropout,
        vocab_size=max(before.vocab_size, tokenizer.vocab_size),
        end_token_ids=ends,
    )
    model = Decoder(config)
    state = parent.model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            old = state[name]
            parameter[: len(old)] = old
            if len(old) < len(parameter):
                # A new token starts as the average of all others: no worse than any, and it trains quickly.
                parameter[len(old) :] = old.mean(0)
    return model


def _new_tokens(parent: Checkpoint, tokenizer: Tokenizer) -> list[int]:
    """The tokens that the parent's network has never seen: those added, and rows that its matrices lack."""
    known = set(parent.tokenizer.control_tokens.values())
    added = set(tokenizer.control_tokens.values()) - known
    return sorted(added | set(range(parent.config.vocab_size, tokenizer.vocab_size)))


@dataclass(frozen=True)
class Split(Generic[Row]):
    """Rows to train on and to validate on, and the files that they are from."""

    train: list[Row]
    validation: list[Row]
    found: Found
    files: list[Path]


def split_data(recipe: TuningRecipe, read: Callable[[Path], list[Row]]) -> Split[Row]:
    """What `read` finds in the recipe's files, in a part to train on and one to validate on."""
    found = find_data(sources_and_weights(recipe.data)[0], recipe.data_hint, kind=EXAMPLES)
    held_out = held_out_files(found, recipe.validation_data, recipe.validation_fraction, EXAMPLES)
    data = [row for file in found.files for row in read(file)]
    files = [*found.files, *(file for file in held_out if file not in found.files)]
    if held_out:
        return Split(data, [row for file in held_out for row in read(file)], found, files)
    return Split(*_set_apart(recipe, data), found, files)


def _set_apart(recipe: TuningRecipe, data: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows without those that the recipe holds out, and these."""
    held_out = round(recipe.validation_fraction * len(data))
    if recipe.validation_fraction and not held_out:
        held_out = 1
    if recipe.split == "random":
        order = permutation(recipe.seed, EVALUATION_EPOCH, len(data)).tolist()
        chosen = set(order[:held_out])
        return (
            [row for index, row in enumerate(data) if index not in chosen],
            [row for index, row in enumerate(data) if index in chosen],
        )
    train = recipe.train_examples or len(data) - held_out - recipe.test_examples
    if train + recipe.test_examples > len(data) or train < 1:
        raise SettingsError(
            f"{len(data)} examples cannot be split into {train} for training, {recipe.test_examples} for testing and "
            "some for validation",
            field="train_examples",
            hint="give more examples, or lower --train-examples and --test-examples",
        )
    return data[:train], data[train + recipe.test_examples :]
