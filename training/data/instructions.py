"""Instruction files in, conversations out, and from them examples that know which tokens are the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from topkapi.model.conversation.chat_template import ChatTemplate, EncodedChat
from topkapi.model.errors import DataError, InvalidRequest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data.row_files import Names, read_rows
from topkapi.training.data.rows import FORMATS, Told, check_template, conversations_of
from topkapi.training.data.turns import Message
from topkapi.training.data.windows import EVALUATION_EPOCH, IGNORED, Batch, Order, joined, permutation


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer of the assistant; `origin` names the file and row for error messages.

    `told` is all that the row says, where that is more.
    """

    messages: list[Message]
    origin: str
    told: Told | None = None

    def prompt(self) -> list[Message]:
        """All but the last answer."""
        return self.messages[:-1]


@dataclass(frozen=True)
class Example:
    """Token ids of a whole conversation; `trained` marks the answers and their end tokens."""

    token_ids: list[int]
    trained: list[bool]
    origin: str


def read_conversations(
    path: Path, *, input_heading: bool, left_out: set[str] | None = None, names: Names | None = None
) -> list[Conversation]:
    """The conversations of a file that `read_rows` reads, its fields under their `names` here.

    `input_heading` puts Alpaca's `### Input:` above an input, otherwise a blank line sets it off. The names of fields
    that are not used are added to `left_out`, and so is what was said after the last answer, which trains nothing.
    Raises `DataError` naming the row (from 1) or line for invalid UTF-8 or JSON, for rows of no known form, for fields
    that mean what can't be done, for empty answers, and for rows without any that is to be trained.
    """
    conversations = []
    for origin, row in read_rows(path):
        row = row if names is None else names.applied(row, origin)
        conversations += conversations_in(row, origin, input_heading, left_out)
    if not conversations:
        raise DataError(f"{path} holds no examples", field="data", hint=FORMATS)
    return conversations


def conversations_in(row: object, origin: str, input_heading: bool, left_out: set[str] | None) -> list[Conversation]:
    """The conversations of one row. Raises as `read_conversations` does."""
    conversations = []
    for told in conversations_of(row, origin, input_heading, left_out):
        if told.messages and _end_with_answer(told.messages) and left_out is not None:
            left_out.add("messages[] after the last answer")
        check_messages(told.messages, origin)
        answers = {index for index, message in enumerate(told.messages) if message["role"] == "assistant"}
        if answers <= told.untrained:
            raise DataError(f"{origin}: every answer has the weight 0", field="data", hint="take the row out")
        conversations.append(Conversation(told.messages, origin, None if told.plain else told))
    return conversations


def _end_with_answer(messages: list[Message]) -> bool:
    """Take away what follows the last answer, where there is one; whether something did."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None or last == len(messages) - 1:
        return False
    del messages[last + 1 :]
    return True


def messages_of(row: object, origin: str, input_heading: bool) -> Iterator[list[Message]]:
    """The conversations of one row, whichever form it has, as roles and contents.

    Raises `DataError` naming `origin`, also for rows that have more than these, such as tools.
    """
    for told in conversations_of(row, origin, input_heading):
        if not told.plain:
            raise DataError(
                f"{origin}: tools, reasoning, names and answers that are not trained can't be used here",
                field="data",
                hint="topkapi finetune takes such rows; take them out here",
            )
        yield told.messages


def check_messages(messages: Sequence[Mapping[str, Any]], origin: str) -> None:
    """Raise `DataError` naming `origin` unless the last message is an answer and no answer is empty."""
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{origin}: the last message must be the assistant's answer", field="data", hint=FORMATS)
    if any(
        message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
        for message in messages
    ):
        raise DataError(f"{origin}: the answer is empty", field="data", hint="fill it, or take the row out")


def encode_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    *,
    longest: int,
    drop_overlong: bool = False,
) -> tuple[list[Example], list[str]]:
    """Examples as the template renders them, and the origins of those dropped for being longer than `longest` tokens.

    Where the template shows earlier answers otherwise than the last, a conversation becomes an example per answer.
    In every example the end of the turn is trained, so that the model learns to stop. Raises `DataError`
    naming rows where that is not so, where the template refuses the messages, and for overlong ones unless dropped.
    """
    ends = chat.turn_end(tokenizer)
    examples, overlong, lengths = [], [], []
    for conversation in conversations:
        told = conversation.told or Told(conversation.messages)
        check_template(told, chat, conversation.origin)
        shown: dict[str, Any] = {"tools": told.tools or None, "given": told.variables}
        try:
            parts = chat.encode_answers(conversation.messages, tokenizer, **shown)
        except InvalidRequest as error:
            raise DataError(f"{conversation.origin}: {error.message}", field="data", hint=error.hint) from None
        if any(part.end(tokenizer) not in ends for part in parts):
            raise DataError(
                f"{conversation.origin}: the answer's end token would not be trained, so the model could not stop",
                field="chat_template",
                hint="the template must put an end token inside {% generation %}…{% endgeneration %}",
            )
        # The last token is only ever a target.
        longest_part = max(len(part.token_ids) for part in parts)
        if longest_part - 1 > longest:
            overlong.append(conversation.origin)
            lengths.append(longest_part)
            continue
        if told.untrained:
            parts = _without(parts, told, conversation.origin)
        examples += [Example(part.token_ids, part.trained, conversation.origin) for part in parts]
    if overlong and not drop_overlong:
        listed = "; ".join(f"{origin} ({length})" for origin, length in zip(overlong[:5], lengths, strict=False))
        raise DataError(
            f"the answer would be truncated away in {len(overlong)} examples, which are longer than the context of "
            f"{longest} tokens: {listed}{'; …' if len(overlong) > 5 else ''}",
            field="data",
            hint="leave them out with --on-overlong drop, shorten them, or start from a longer context",
        )
    return examples, overlong


def _without(parts: list[EncodedChat], told: Told, origin: str) -> list[EncodedChat]:
    """A conversation, or a text for each of its answers, less the answers that are not to be trained.

    Raises `DataError` where the template does not keep answers apart.
    """
    answers = [index for index, message in enumerate(told.messages) if message["role"] == "assistant"]
    if len(parts) > 1:
        return [part for part, index in zip(parts, answers, strict=True) if index not in told.untrained]
    (whole,) = parts
    spans: list[range] = []
    for index, trained in enumerate(whole.trained):
        if trained and spans and spans[-1].stop == index:
            spans[-1] = range(spans[-1].start, index + 1)
        elif trained:
            spans.append(range(index, index + 1))
    if len(spans) != len(answers):
        raise DataError(
            f"{origin}: the chat template does not show where the answer that is not trained begins and ends",
            field="data",
            hint="take the row out, or choose another --chat-template",
        )
    dropped = {at for span, index in zip(spans, answers, strict=True) if index in told.untrained for at in span}
    kept = [each and index not in dropped for index, each in enumerate(whole.trained)]
    return [EncodedChat(whole.token_ids, kept)]


class ExampleLoader:
    """Batches of examples without padding, in an order that is a pure function of seed and step.

    `prompt_loss_weight` scales the loss of tokens that are not the answer's (0: they are not trained). What does not
    fill a batch is left out of an epoch. `order` may replace the order of an epoch, given how many examples belong to
    each of the `parts` of a mixture.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        prompt_loss_weight: float = 0.0,
        order: Order | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._chosen, self.parts = order, [len(examples)] if parts is None else list(parts)
        self.prompt_loss_weight = prompt_loss_weight
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // self.batch_size

    @cached_property
    def stream(self) -> NDArray[np.unsignedinteger[Any]]:
        """All its tokens one after another, to search in."""
        return joined(example.token_ids for example in self.examples)

    def batch(self, step: int) -> Batch:
        """The batch of update `step` (0-based, counted over all epochs)."""
        return self._collate(self._rows(step))

    def origins(self, step: int) -> list[str]:
        """File and row of each example in that batch."""
        return [self.examples[index].origin for index in self._rows(step).tolist()]

    def _rows(self, step: int) -> NDArray[np.int64]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = (
                permutation(self.seed, epoch, len(self.examples))
                if not self._chosen
                else self._chosen(epoch, self.parts)
            )
            self._order = (epoch, order)
        return self._order[1][index * self.batch_size : (index + 1) * self.batch_size]

    def first(self, batches: int | None) -> list[Batch]:
        """A fixed choice of batches to evaluate on (None: all, in order, the last one possibly smaller)."""
        order = np.arange(len(self.examples))
        if batches is not None and batches * self.batch_size < len(order):
            order = permutation(self.seed, EVALUATION_EPOCH, len(order))[: batches * self.batch_size]
        return [
            self._collate(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)
        ]

    def _collate(self, rows: NDArray[np.int64]) -> Batch:
        return collate([self.examples[index] for index in rows.tolist()], self.prompt_loss_weight)


def collate(examples: Sequence[Example], prompt_loss_weight: float = 0.0) -> Batch:
    """`examples` one after another; tokens that are no answer's weigh `prompt_loss_weight`."""
    ids = [torch.tensor(example.token_ids) for example in examples]
    trained = torch.cat([torch.tensor(example.trained[1:]) for example in examples])
    weights = torch.where(trained, 1.0, prompt_loss_weight)
    targets = torch.where(weights > 0, torch.cat([each[1:] for each in ids]), IGNORED)
    tokens = torch.cat([each[:-1] for each in ids])
    texts = tuple((len(each) - 1,) for each in ids)
    return Batch(tokens.unsqueeze(0), targets.unsqueeze(0), weights.unsqueeze(0), texts)
