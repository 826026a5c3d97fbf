"""`topkapi finetune`: a checkpoint and instructions in, a checkpoint that answers out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.chat import ChatTemplate
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, weights_digest
from model.config import ModelConfig
from model.errors import DataError, SettingsError
from model.files import sha256
from model.generation import generate
from model.linear import set_compute_dtype
from model.tokenizer import Tokenizer
from model.transformer import Decoder
from training.console import Console
from training.data.instructions import Conversation, ExampleLoader, encode_conversations, read_conversations
from training.data.shards import tokenizer_digest
from training.data.windows import EVALUATION_EPOCH, permutation
from training.lora import AdapterPlan
from training.pretrain import DTYPES, build_optimizers, chat_template, plan, start_or_resume
from training.recipe import FinetuneRecipe
from training.run import RunDirectory
from training.trainer import Standing, Training, prepare_torch, trained_parameters

# What ChatML needs beyond a base tokenizer's vocabulary.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
SAMPLES = 3


def finetune(
    recipe: FinetuneRecipe, directory: RunDirectory, *, resume: bool, console: Console, command: str
) -> Standing:
    """Train a checkpoint on conversations as `recipe` says, in `directory`; continue there with `resume`.

    Raises `DataError` naming rows, `SettingsError`, `CheckpointError`, `Diverged` and `Interrupted`.
    """
    if recipe.checkpoint is None:
        raise SettingsError("no checkpoint to start from", field="checkpoint", hint="give one with --checkpoint")
    if not recipe.data:
        hint = recipe.data_hint or "give .json or .jsonl files with --data"
        raise DataError("no training examples", field="data", hint=hint)
    saved = directory.load_state() if resume else None
    device = prepare_torch(recipe, saved[1]["threads"] if saved else None)
    parent = load_checkpoint(recipe.checkpoint, dtype=torch.float32)
    chat = chat_template(recipe.chat_template) or parent.chat or ChatTemplate.built_in("chatml")
    tokenizer = _tokenizer(parent, chat, console)
    train, validation = _split(recipe, chat)
    model = _model(recipe, parent, tokenizer, chat)
    adapters = AdapterPlan.of(recipe, model.config.family)
    if adapters:
        adapters.attach(model, _new_tokens(parent, tokenizer))
    name, inherited = parent.name, parent.generation
    del parent  # its weights are in `model` now
    longest = min(recipe.context_length or model.config.context_length, model.config.context_length)
    parts, dropped = [], []
    for part in (train, validation):
        examples, overlong = encode_conversations(
            part, tokenizer, chat, longest=longest, drop_overlong=recipe.on_overlong == "drop"
        )
        parts.append(examples)
        dropped += overlong
    if dropped:
        console.message(f"left out {len(dropped)} examples longer than {longest} tokens, the first: {dropped[0]}")
    loaders = [
        ExampleLoader(
            examples,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            prompt_loss_weight=recipe.prompt_loss_weight,
        )
        for examples in parts
    ]
    if not loaders[0].steps_per_epoch:
        raise DataError(
            f"{len(parts[0])} training examples do not fill one batch of {recipe.batch_size}",
            field="data",
            hint="give more examples or lower --batch-size",
        )
    overlap = _overlap(train, validation)
    if overlap:
        console.message(f"{overlap} of {len(validation)} validation prompts also occur in training")
    model.to(device)
    set_compute_dtype(model, torch.bfloat16 if recipe.precision == "bf16" else None)
    if adapters:
        adapters.hold_base(model)
    schedule, every = plan(recipe, loaders[0].steps_per_epoch)

    source = Path(recipe.checkpoint)

    def save(path: Path, details: Any) -> None:
        generation = {**inherited, "eos_token_id": list(model.config.end_token_ids)}
        dtype = DTYPES[recipe.checkpoint_dtype]
        common: Any = {"tokenizer": tokenizer, "chat": chat, "generation": generation, "details": details}
        if adapters:
            adapters.save(path, model, source, dtype=dtype, **common)
        else:
            save_checkpoint(path, model=model, dtype=dtype, **common)

    trained = sum(parameter.numel() for _, parameter in trained_parameters(model))
    training = Training(
        recipe=recipe,
        model=model,
        optimizers=build_optimizers(recipe, model),
        schedule=schedule,
        loader=loaders[0],
        train_batches=loaders[0].first(recipe.evaluation_batches or 8),
        validation_batches=loaders[1].first(recipe.evaluation_batches),
        directory=directory,
        console=console,
        save=save,
        sample=_sampler(recipe, model, tokenizer, chat, validation or train),
        facts={
            "made_by": "topkapi finetune",
            "recipe": recipe.model_dump(
                mode="json", exclude={"out", "overwrite", "data", "data_hint", "validation_data", "checkpoint"}
            ),
            "data": _data_facts(recipe, parts, overlap),
            "tokenizer_sha256": tokenizer_digest(tokenizer),
            "parent": {"name": name, "sha256": weights_digest(source)},
            "parameters": model.config.parameter_count(),
            "trained_parameters": trained,
        },
        command=command,
        evaluate_every=every,
        save_every=recipe.save_every or every,
    )
    start_or_resume(training, saved)
    adapted = f", {trained:,} of adapters train" if adapters else ""
    console.message(
        f"{model.config.parameter_count():,} parameters of {name}{adapted}; {len(parts[0]):,} training examples, "
        f"{len(parts[1]):,} for validation; {schedule.total_steps:,} steps of {recipe.batch_size}"
    )
    return training.run()


def _tokenizer(parent: Checkpoint, chat: ChatTemplate, console: Console) -> Tokenizer:
    """The checkpoint's tokenizer, with ChatML's control tokens where it lacks them."""
    missing = [token for token in CHATML_TOKENS if token not in parent.tokenizer.control_tokens]
    if chat.name != "chatml" or not missing:
        return parent.tokenizer
    console.message(f"the vocabulary gets {' and '.join(missing)}")
    return parent.tokenizer.with_control_tokens(missing)


def _model(recipe: FinetuneRecipe, parent: Checkpoint, tokenizer: Tokenizer, chat: ChatTemplate) -> Decoder:
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


def _split(recipe: FinetuneRecipe, chat: ChatTemplate) -> tuple[list[Conversation], list[Conversation]]:
    heading = chat.name == "alpaca"
    data = _read(recipe.data, heading, recipe.data_hint)
    if recipe.validation_data:
        return data, _read(recipe.validation_data, heading, None)
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
        )
    return data[:train], data[train + recipe.test_examples :]


def _read(names: list[str], heading: bool, hint: str | None) -> list[Conversation]:
    conversations = []
    for name in names:
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"no such file: {name}", field="data", hint=hint)
        conversations += read_conversations(path, input_heading=heading)
    return conversations


def _overlap(train: list[Conversation], validation: list[Conversation]) -> int:
    """How many validation prompts occur word for word in training."""
    seen = {str(conversation.prompt()) for conversation in train}
    return sum(str(conversation.prompt()) in seen for conversation in validation)


def _data_facts(recipe: FinetuneRecipe, parts: list[Any], overlap: int) -> dict[str, Any]:
    files = [Path(name).expanduser() for name in (*recipe.data, *recipe.validation_data)]
    return {
        "sources": {file.name: sha256(file) for file in files},
        "train_examples": len(parts[0]),
        "validation_examples": len(parts[1]),
        "validation_prompts_in_training": overlap,
    }


def _sampler(
    recipe: FinetuneRecipe, model: Decoder, tokenizer: Tokenizer, chat: ChatTemplate, conversations: list[Conversation]
) -> Any:
    """Answers to the recipe's prompts, else to the first validation prompts that leave room for an answer."""
    asked: list[tuple[list[dict[str, str]], str | None]] = [
        ([{"role": "user", "content": prompt}], None) for prompt in recipe.sample_prompts
    ] or [
        (conversation.prompt(), conversation.messages[-1]["content"]) for conversation in conversations[: 8 * SAMPLES]
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
            }
            if expected is not None:
                record["expected"] = expected
            yield record

    return sample
