"""`topkapi finetune`: a checkpoint and instructions in, a checkpoint that answers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError, SettingsError
from topkapi.model.files import sha256
from topkapi.model.generation import generate
from topkapi.model.linear import set_compute_dtype
from topkapi.model.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, weights_digest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.training.data.inspection import conversation_findings, example_findings
from topkapi.training.data.instructions import Example, ExampleLoader, encode_conversations, read_conversations
from topkapi.training.data.mixing import describe_mixture, mixed_order
from topkapi.training.data.shards import tokenizer_digest
from topkapi.training.data.sources import no_such_file
from topkapi.training.data.weights import sources_and_weights, unused
from topkapi.training.data.windows import EVALUATION_EPOCH, Loader, permutation
from topkapi.training.optimisation import distributed, sharding
from topkapi.training.optimisation.device import prepare_torch
from topkapi.training.optimisation.lora import AdapterPlan
from topkapi.training.optimisation.loss import NextToken, Objective
from topkapi.training.optimisation.optimisers import trained_parameters
from topkapi.training.pretrain import DTYPES, build_optimizers, chat_template, plan, start_or_resume
from topkapi.training.recipes.recipe import FinetuneRecipe, TuningRecipe, deciding_fields
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.preflight import check_inputs
from topkapi.training.run.state import Standing
from topkapi.training.trainer import Training

# What ChatML needs beyond a base tokenizer's vocabulary.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
SAMPLES = 3
Message = dict[str, str]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Ingredients:
    """What data are prepared with; examples are at most `longest` tokens long."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    longest: int
    console: Console


@dataclass(frozen=True)
class Task:
    """What is trained on, and to what end. `loaders` and `counts` are those of training and of validation.

    `samples` are prompts with their expected answers, `prompts` those of training and of validation as texts.
    `begin(model, digest of the parent's weights)` is called before training, with the untrained network. `findings` are
    what is wrong with the rows.
    """

    loaders: tuple[Loader, Loader]
    counts: tuple[int, int]
    kind: str
    samples: list[tuple[list[Message], str | None]]
    prompts: tuple[list[str], list[str]]
    objective: Objective
    begin: Callable[[Decoder, str], None] = lambda model, parent: None
    findings: Sequence[str] = ()

    def overlap(self) -> int:
        """How many validation prompts occur word for word in training."""
        seen = set(self.prompts[0])
        return sum(prompt in seen for prompt in self.prompts[1])


def finetune(
    recipe: TuningRecipe,
    directory: RunDirectory,
    *,
    resume: bool,
    console: Console,
    command: str,
    prepare: Callable[[Ingredients], Task] | None = None,
    proceed: Callable[[Training], Standing] = Training.run,
) -> Standing:
    """Train a checkpoint as `recipe` says, in `directory`; continue there with `resume`.

    `prepare` makes the task, by default to answer as the assistant of conversations does. `proceed` is what is done
    once everything is ready, for whoever wants to try it out instead. Raises `DataError` naming rows, `SettingsError`,
    `CheckpointError`, `Diverged` and `Interrupted`.
    """
    check_inputs(recipe)
    assert recipe.checkpoint is not None, "checked with the other inputs"
    if prepare is None:
        assert isinstance(recipe, FinetuneRecipe), "another kind of recipe comes with its own task"
        prepare = partial(_conversations, recipe)
    with distributed.in_turn():
        saved = directory.load_state() if resume else None
    device = prepare_torch(recipe, saved[1]["threads"] if saved else None)
    parent = load_checkpoint(recipe.checkpoint, dtype=torch.float32)
    chat = chat_template(recipe.chat_template) or parent.chat or ChatTemplate.built_in("chatml")
    tokenizer = _tokenizer(parent, chat, console)
    model = _model(recipe, parent, tokenizer, chat)
    adapters = AdapterPlan.of(recipe, model.config.family)
    if adapters:
        adapters.attach(model, _new_tokens(parent, tokenizer))
    name, inherited = parent.name, parent.generation
    del parent  # its weights are in `model` now
    longest = min(recipe.context_length or model.config.context_length, model.config.context_length)
    if (recipe.context_length or 0) > longest:
        console.message(
            f"{name} reads {longest} tokens: a context_length of {recipe.context_length} does not change that"
        )
    task = prepare(Ingredients(tokenizer, chat, longest, console))
    if not task.loaders[0].steps_per_epoch:
        raise _too_few(recipe, task)
    overlap = task.overlap()
    model.to(device)
    set_compute_dtype(model, torch.bfloat16 if recipe.precision == "bf16" else None)
    if adapters:
        adapters.hold_base(model)
    schedule, every = plan(recipe, task.loaders[0].steps_per_epoch)
    source = Path(recipe.checkpoint)
    digest = weights_digest(source)
    with distributed.in_turn():
        task.begin(model, digest)
    sharding.distribute(model, recipe.parallel)

    def save(path: Path, network: Decoder, details: Any) -> None:
        generation = recipe.generation_config(inherited, model.config.end_token_ids)
        dtype = DTYPES[recipe.checkpoint_dtype]
        common: Any = {"tokenizer": tokenizer, "chat": chat, "generation": generation, "details": details}
        if adapters:
            adapters.save(path, network, source, dtype=dtype, **common)
        else:
            save_checkpoint(path, model=network, dtype=dtype, **common)

    trained = sum(parameter.numel() for _, parameter in trained_parameters(model))
    training = Training(
        recipe=recipe,
        model=model,
        optimizers=build_optimizers(recipe, model),
        schedule=schedule,
        loader=task.loaders[0],
        train_batches=task.loaders[0].first(recipe.evaluation_batches or 8),
        validation_batches=task.loaders[1].first(recipe.evaluation_batches),
        directory=directory,
        console=console,
        save=save,
        sample=_sampler(recipe, model, tokenizer, chat, task.samples),
        facts={
            "made_by": f"topkapi {command.split()[1]}",
            "recipe": deciding_fields(recipe),
            "data": _data_facts(recipe, task, overlap),
            "tokenizer_sha256": tokenizer_digest(tokenizer),
            "parent": {"name": name, "sha256": digest},
            "parameters": model.config.parameter_count(),
            "trained_parameters": trained,
        },
        command=command,
        evaluate_every=every,
        text_of=tokenizer.decode,
        held_out=task.loaders[1].stream,
        objective=task.objective,
    )
    start_or_resume(training, saved)
    adapted = f", {trained:,} of adapters train" if adapters else ""
    console.message(
        f"{model.config.parameter_count():,} parameters of {name}{adapted}; {task.counts[0]:,} training {task.kind}, "
        f"{task.counts[1]:,} for validation; {schedule.total_steps:,} steps of {recipe.batch_size}"
    )
    console.warn([*task.findings, *example_findings(*task.counts, task.kind, overlap, recipe.batch_size)])
    return proceed(training)


def _too_few(recipe: TuningRecipe, task: Task) -> DataError:
    """The error for data that do not fill a batch, which says how much would."""
    train, held_out = task.counts
    apart = "" if recipe.validation_data or not held_out else f" ({held_out} more held out for validation)"
    needed, fraction = recipe.batch_size, 0.0 if recipe.validation_data else recipe.validation_fraction
    while fraction and needed - max(1, round(fraction * needed)) < recipe.batch_size:
        needed += 1
    return DataError(
        f"{train} training {task.kind}{apart} do not fill one batch of {recipe.batch_size}",
        field="data",
        hint=f"give at least {needed + recipe.test_examples} {task.kind}, or lower --batch-size",
    )


def _conversations(recipe: FinetuneRecipe, given: Ingredients) -> Task:
    """The answers of the recipe's conversations."""
    left_out: set[str] = set()
    read = partial(read_conversations, input_heading=given.chat.name == "alpaca", left_out=left_out)
    train, validation = split_data(recipe, read)
    report_unused(left_out, given)
    names, weights = sources_and_weights(recipe.data)
    loaders, dropped = [], []
    for part in (train, validation):
        examples, overlong = encode_conversations(
            part, given.tokenizer, given.chat, longest=given.longest, drop_overlong=recipe.on_overlong == "drop"
        )
        dropped += overlong
        mixture: dict[str, Any] = {}
        if part is train and weights is not None:
            parts = _parts(examples, names)
            mixture = {"order": partial(mixed_order, recipe.seed, weights=weights), "parts": parts}
            for line in describe_mixture(names, parts, weights, _epochs(recipe, len(examples))):
                given.console.message(line)
        loaders.append(
            ExampleLoader(
                examples,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                prompt_loss_weight=recipe.prompt_loss_weight,
                **mixture,
            )
        )
    report_dropped(dropped, given)
    if missing := unused(recipe.data, recipe.weights):
        given.console.message(f"no data file is called {' or '.join(missing)}: their weights are not used")
    return Task(
        loaders=(loaders[0], loaders[1]),
        counts=(len(loaders[0].examples), len(loaders[1].examples)),
        kind="examples",
        samples=[(each.prompt(), each.messages[-1]["content"]) for each in validation or train if not each.told],
        prompts=([str(each.prompt()) for each in train], [str(each.prompt()) for each in validation]),
        objective=NextToken(),
        findings=conversation_findings(train, validation),
    )


def _epochs(recipe: TuningRecipe, examples: int) -> float:
    return recipe.epochs if recipe.max_steps is None else recipe.max_steps * recipe.batch_size / max(1, examples)


def _parts(examples: list[Example], names: list[str]) -> list[int]:
    """How many examples each source of a mixture has; they stand in the order of the sources."""
    of = Counter(example.origin.rpartition(", ")[0] for example in examples)
    parts = [of[str(Path(name).expanduser())] for name in names]
    for name, size in zip(names, parts, strict=True):
        if not size:
            raise DataError(f"{name} has no example left to train on", field="data", hint="leave it out")
    return parts


def report_unused(names: set[str], given: Ingredients) -> None:
    """Tell which fields of rows were not used."""
    if names:
        given.console.message(f"fields of the rows that are not used: {', '.join(sorted(names))}")


def report_dropped(origins: list[str], given: Ingredients) -> None:
    """Tell what was left out for being too long."""
    if origins:
        given.console.warn(
            [f"left out {len(origins)} examples longer than {given.longest} tokens, the first: {origins[0]}"]
        )


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


def split_data(recipe: TuningRecipe, read: Callable[[Path], list[Row]]) -> tuple[list[Row], list[Row]]:
    """What `read` finds in the recipe's files, in a part to train on and one to validate on."""
    data = _read(sources_and_weights(recipe.data)[0], read, recipe.data_hint)
    if recipe.validation_data:
        return data, _read(recipe.validation_data, read, None)
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


def _read(names: list[str], read: Callable[[Path], list[Row]], hint: str | None) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        path = Path(name).expanduser()
        if not path.is_file():
            raise no_such_file(name, hint=hint)
        rows += read(path)
    return rows


def _data_facts(recipe: TuningRecipe, task: Task, overlap: int) -> dict[str, Any]:
    names = [*sources_and_weights(recipe.data)[0], *recipe.validation_data]
    files = [Path(name).expanduser() for name in names]
    return {
        "sources": {file.name: sha256(file) for file in files},
        "train_examples": task.counts[0],
        "validation_examples": task.counts[1],
        "validation_prompts_in_training": overlap,
    }


def _sampler(
    recipe: TuningRecipe,
    model: Decoder,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    examples: list[tuple[list[Message], str | None]],
) -> Callable[[Standing], Iterator[dict[str, Any]]]:
    """Answers to the recipe's prompts, else to the first validation prompts that leave room for an answer."""
    asked = [([{"role": "user", "content": prompt}], None) for prompt in recipe.sample_prompts] or examples[
        : 8 * SAMPLES
    ]
    prompts: list[tuple[list[dict[str, str]], str | None, list[int]]] = []
    for messages, expected in asked:
        ids = chat.encode(messages, tokenizer, add_generation_prompt=True).token_ids
        if len(ids) + 1 < model.config.context_length and len(prompts) < (len(recipe.sample_prompts) or SAMPLES):
            prompts.append((messages, expected, ids))

    def sample(standing: Standing) -> Iterator[dict[str, Any]]:
        for messages, expected, ids in prompts:
            parameters = {
                "max_tokens": recipe.sample_tokens,
                "temperature": recipe.sample_temperature,
                "seed": recipe.seed + standing.step,
            }
            result = generate(model, ids, parameters)
            record: dict[str, Any] = {
                "prompt": messages[-1]["content"],
                "text": tokenizer.decode(result.token_ids, skip_control=True),
                "finish_reason": result.finish_reason,
                "token_ids": result.token_ids,
            }
            if expected is not None:
                record["expected"] = expected
            yield record

    return sample
