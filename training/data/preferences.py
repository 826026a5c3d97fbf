"""Preference files in, pairs of a chosen and a rejected answer to the same prompt out, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data.instructions import (
    Conversation,
    Example,
    check_messages,
    collate,
    encode_conversations,
)
from topkapi.training.data.row_files import Names, read_rows
from topkapi.training.data.rows import Row, spoken
from topkapi.training.data.turns import Message
from topkapi.training.data.windows import EVALUATION_EPOCH, Batch, joined, permutation

_FORMATS = (
    "rows are {prompt, chosen, rejected}, each a text or a list of messages {role, content}; without a prompt, chosen "
    "and rejected are whole conversations that differ in their last answers, as messages or as a text in which Human: "
    "and Assistant: speak"
)


# What rows of instructions hold.
_ANSWERS = {"completion", "answer", "output", "messages", "instances"}


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ in their last answers; `origin` names the file and row for error messages."""

    chosen: Conversation
    rejected: Conversation
    origin: str

    def prompt(self) -> list[Message]:
        """The messages before the two answers."""
        return self.chosen.prompt()


@dataclass(frozen=True)
class Pair:
    """Both conversations as token ids, of which only the last answers are trained."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs as texts that stay together, the chosen one first.

    `reference [pairs, 2]` are the answers' log-probabilities before training.
    """

    reference: Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    def split(self, size: int) -> Iterator[Batch]:
        """The batch in parts of at most `size` pairs."""
        for part, reference in zip(super().split(size), torch.split(self.reference, size), strict=True):
            yield PairBatch(part.tokens, part.targets, None, part.texts, reference)

    def weight(self) -> float:
        """The number of pairs: what the loss is divided by."""
        return float(self.size)


def read_preferences(path: Path, left_out: set[str] | None = None, names: Names | None = None) -> list[Preference]:
    """The pairs of a file that `read_rows` reads, its fields under their `names` here; unused fields are added to
    `left_out`.

    Raises `DataError` naming the row (from 1) or line for rows of no known form, answers that are empty, and pairs
    whose answers are the same or whose prompts differ.
    """
    preferences = [
        preference_of(row if names is None else names.applied(row, origin), origin, left_out)
        for origin, row in read_rows(path, _FORMATS)
    ]
    if not preferences:
        raise DataError(f"{path} holds no pairs", field="data", hint=_FORMATS)
    return preferences


def preference_of(row: object, origin: str, left_out: set[str] | None) -> Preference:
    """The pair of one row. Raises as `read_preferences` does."""
    if not isinstance(row, dict):
        raise DataError(f"{origin}: not an object", field="data", hint=_FORMATS)
    reader = Row(row, origin, _FORMATS)
    answers = _answers(reader)
    prompt = _prompt(reader)
    both = []
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        check_messages(answer, f"{origin}, {name}")
        told = reader.common(_joined(prompt, answer, name, reader))
        both.append(Conversation(told.messages, f"{origin}, {name}", None if told.plain else told))
    chosen, rejected = both
    if not any(message["role"] != "system" for message in chosen.prompt()):
        raise DataError(f"{origin}: there is no prompt", field="data", hint=_FORMATS)
    if chosen.prompt() != rejected.prompt():
        raise DataError(f"{origin}: chosen and rejected answer different prompts", field="data", hint=_FORMATS)
    if chosen.messages == rejected.messages:
        raise DataError(f"{origin}: chosen and rejected are the same", field="data", hint="take the row out")
    reader.close(left_out)
    return Preference(chosen, rejected, origin)


def _prompt(reader: Row) -> list[Message]:
    """The turns that a row names as its prompt; none where they are part of both answers."""
    name = next((name for name in ("prompt", "question", "instruction") if name in reader.row), None)
    if name is None:
        return []
    if isinstance(reader.row[name], str):
        asked = reader.asked(name, False)
        return spoken(asked) or [{"role": "user", "content": asked}]
    return reader.turns(name, "user")[0]


def _answers(reader: Row) -> list[list[Message]]:
    """What chosen and rejected say: an answer, or all turns up to it."""
    for name in ("chosen", "rejected"):
        if name not in reader.row:
            answers = _ANSWERS & reader.row.keys()
            hint = _FORMATS + ("; topkapi finetune trains on answers alone" if answers else "")
            raise reader.error(f"no field {name!r}", hint)
    chosen, rejected = (reader.row[name] for name in ("chosen", "rejected"))
    prompt = reader.row.get("prompt")
    if all(isinstance(each, str) for each in (prompt, chosen, rejected)) and prompt and not spoken(chosen):
        # Sets whose answers repeat the prompt's text: only what follows it is the answer.
        rest = [each.removeprefix(prompt) for each in (chosen, rejected)]
        if all(each.startswith(prompt) and other.strip() for each, other in zip((chosen, rejected), rest, strict=True)):
            for name in ("chosen", "rejected"):
                reader.get(name)
            return [[{"role": "assistant", "content": each.strip()}] for each in rest]
    found = []
    for name in ("chosen", "rejected"):
        messages, untrained = reader.turns(name, "assistant")
        if len(messages) - 1 in untrained:
            raise reader.error(f"the answer in {name!r} has the weight 0", "take the row out")
        text = reader.row[name]
        found.append((spoken(text) if isinstance(text, str) else None) or messages)
    return found


def _joined(prompt: list[Message], answer: list[Message], name: str, reader: Row) -> list[Message]:
    """The whole conversation, in which no turn is said twice: `answer` may begin with the turns of `prompt`."""
    if not prompt or answer[0]["role"] == "assistant" or prompt[-1]["role"] == "assistant":
        return [*prompt, *answer]
    system = [message for message in answer[:1] if message["role"] == "system"]
    asked = [message for message in prompt if message["role"] != "system"]
    turns = answer[len(system) :]
    repeated = [_bare(each) for each in turns[: len(asked)]] == [_bare(each) for each in asked]
    # A prompt of one text may also be the last question of several turns.
    last = turns[-2:-1] if len(asked) == 1 else []
    if not repeated and [_bare(each) for each in last] != [_bare(each) for each in asked]:
        raise reader.error(
            f"{name!r} begins with turns that are not those of its prompt", "take the prompt out, or those turns"
        )
    return answer if system else [*(each for each in prompt if each["role"] == "system"), *answer]


def _bare(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def encode_preferences(
    preferences: Iterable[Preference],
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    *,
    longest: int,
    drop_overlong: bool = False,
) -> tuple[list[Pair], list[str]]:
    """Pairs as the template renders them, and the origins of those left out, as `encode_conversations` does."""
    preferences = list(preferences)
    encoded: list[dict[str, Example]] = []
    for conversations in ([each.chosen for each in preferences], [each.rejected for each in preferences]):
        examples, _ = encode_conversations(conversations, tokenizer, chat, longest=longest, drop_overlong=drop_overlong)
        encoded.append({example.origin: example for example in examples})
    pairs, overlong = [], []
    for preference in preferences:
        found = [
            part.get(each.origin) for part, each in zip(encoded, (preference.chosen, preference.rejected), strict=True)
        ]
        chosen, rejected = found
        if chosen is None or rejected is None:
            overlong.append(preference.origin)
            continue
        start = answer_start(preference.chosen, tokenizer, chat)
        pairs.append(Pair(last_answer(chosen, start), last_answer(rejected, start)))
    return pairs, overlong


def answer_start(conversation: Conversation, tokenizer: Tokenizer, chat: ChatTemplate) -> int:
    """How many tokens the template puts before the last answer."""
    told = conversation.told
    shown: dict[str, Any] = {} if told is None else {"tools": told.tools or None, "given": told.variables}
    return len(chat.encode(conversation.prompt(), tokenizer, add_generation_prompt=True, **shown).token_ids)


def last_answer(example: Example, start: int) -> Example:
    """Earlier answers, before the place `start`, are the same for every answer, so they are no part of a preference."""
    trained = [each and index >= start for index, each in enumerate(example.trained)]
    return replace(example, trained=trained)


class PairLoader:
    """Batches of pairs in an order that is a pure function of seed and step; see `ExampleLoader`.

    `reference [pairs, 2]` holds log-probabilities of the chosen and the rejected answers before training.
    """

    def __init__(self, pairs: Sequence[Pair], *, batch_size: int, seed: int) -> None:
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.reference = torch.zeros(len(pairs), 2)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.pairs) // self.batch_size

    @cached_property
    def stream(self) -> NDArray[np.unsignedinteger[Any]]:
        """All its tokens one after another, to search in."""
        return joined(each.token_ids for pair in self.pairs for each in (pair.chosen, pair.rejected))

    def batch(self, step: int) -> Batch:
        """The batch of update `step` (0-based, counted over all epochs)."""
        return self._collate(self._rows(step))

    def origins(self, step: int) -> list[str]:
        """File and row of each pair in that batch."""
        return [self.pairs[index].chosen.origin for index in self._rows(step).tolist()]

    def _rows(self, step: int) -> NDArray[np.int64]:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, len(self.pairs))
        return order[index * self.batch_size : (index + 1) * self.batch_size]

    def first(self, batches: int | None) -> list[Batch]:
        """A fixed choice of batches to evaluate on (None: all, in order, the last one possibly smaller)."""
        order = np.arange(len(self.pairs))
        if batches is not None and batches * self.batch_size < len(order):
            order = permutation(self.seed, EVALUATION_EPOCH, len(order))[: batches * self.batch_size]
        return [
            self._collate(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)
        ]

    def _collate(self, rows: NDArray[np.int64]) -> Batch:
        pairs = [self.pairs[index] for index in rows.tolist()]
        plain = collate([each for pair in pairs for each in (pair.chosen, pair.rejected)])
        lengths = plain.lengths or ()
        texts = tuple(zip(lengths[0::2], lengths[1::2], strict=True))
        return PairBatch(plain.tokens, plain.targets, None, texts, self.reference[torch.from_numpy(rows)])
