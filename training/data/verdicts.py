"""Files of answers that are labelled good or bad in, and batches of them out, with answers to other prompts beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    ExampleLoader,
    collate,
    conversations_in,
    encode_conversations,
)
from topkapi.training.data.preferences import answer_start, last_answer, preference_of
from topkapi.training.data.row_files import Names, read_rows
from topkapi.training.data.turns import Message
from topkapi.training.data.windows import Batch

_FORMATS = (
    "rows are those of finetune with a label beside, as {prompt, completion, label}, true for a good answer and false "
    "for a bad one; {prompt, chosen, rejected} is one of each"
)


@dataclass(frozen=True)
class Verdict:
    """A conversation whose last answer is `desirable` or not."""

    conversation: Conversation
    desirable: bool

    def prompt(self) -> list[Message]:
        """The messages before the answer."""
        return self.conversation.prompt()


@dataclass(frozen=True)
class Answer:
    """A conversation as token ids, of which only the last answer is trained."""

    example: Example
    desirable: bool


def read_verdicts(
    path: Path, *, input_heading: bool, left_out: set[str] | None = None, names: Names | None = None
) -> list[Verdict]:
    """The labelled answers of a file that `read_rows` reads; see `read_conversations`.

    A row of `chosen` and `rejected` gives a good and a bad one, in this order. Raises `DataError` naming the row (from
    1) or line as `read_conversations` and `read_preferences` do, and for labels that are missing or no truth values.
    """
    verdicts: list[Verdict] = []
    for origin, row in read_rows(path, _FORMATS):
        row = row if names is None else names.applied(row, origin)
        if not isinstance(row, dict):
            raise DataError(f"{origin}: not an object", field="data", hint=_FORMATS)
        if {"chosen", "rejected"} <= row.keys():
            pair = preference_of(row, origin, left_out)
            verdicts += [Verdict(pair.chosen, True), Verdict(pair.rejected, False)]
            continue
        label = row.get("label")
        if not isinstance(label, bool) and label not in (0, 1):
            found = "no label" if label is None else f"the label {label!r} is neither true nor false"
            raise DataError(f"{origin}: {found}", field="data", hint=_FORMATS)
        rest = {name: value for name, value in row.items() if name != "label"}
        told = conversations_in(rest, origin, input_heading, left_out)
        for number, conversation in enumerate(told, start=1):
            if conversation.told and len(conversation.messages) - 1 in conversation.told.untrained:
                raise DataError(f"{origin}: the last answer has the weight 0", field="data", hint="take the row out")
            place = origin if len(told) == 1 else f"{origin}, answer {number}"
            verdicts.append(Verdict(replace(conversation, origin=place), bool(label)))
    if not verdicts:
        raise DataError(f"{path} holds no answers", field="data", hint=_FORMATS)
    return verdicts


def encode_verdicts(
    verdicts: Sequence[Verdict],
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    *,
    longest: int,
    drop_overlong: bool = False,
) -> tuple[list[Answer], list[str]]:
    """Answers as the template renders them, and the origins of those left out, as `encode_conversations` does."""
    conversations = [each.conversation for each in verdicts]
    examples, overlong = encode_conversations(
        conversations, tokenizer, chat, longest=longest, drop_overlong=drop_overlong
    )
    # Of a conversation that became several examples the last one has the last answer.
    of = {example.origin: example for example in examples}
    answers = [
        Answer(last_answer(example, answer_start(each.conversation, tokenizer, chat)), each.desirable)
        for each in verdicts
        if (example := of.get(each.conversation.origin)) is not None
    ]
    return answers, overlong


@dataclass(frozen=True)
class VerdictBatch(Batch):
    """Answers as texts, whether each is `desirable [answers]`, and as many answers to other prompts (`mismatched`).

    `reference [answers, 2]` are the log-probabilities of each answer and of the other one before training.
    """

    mismatched: Batch = field(kw_only=True)
    desirable: Tensor = field(kw_only=True)
    reference: Tensor = field(kw_only=True)

    def split(self, size: int) -> Iterator[Batch]:
        """The batch in parts of at most `size` answers."""
        parts = zip(
            super().split(size),
            self.mismatched.split(size),
            torch.split(self.desirable, size),
            torch.split(self.reference, size),
            strict=True,
        )
        for part, others, desirable, reference in parts:
            yield _judged(part, others, desirable, reference)

    def weight(self) -> float:
        """The number of answers: what the loss is divided by."""
        return float(self.size)


class VerdictLoader(ExampleLoader):
    """Batches of answers, see `ExampleLoader`; each brings the answer to another prompt along, always the same one.

    `reference [answers, 2]` holds log-probabilities of the answers and of the other ones before training.
    """

    def __init__(self, answers: Sequence[Answer], *, batch_size: int, seed: int, longest: int) -> None:
        super().__init__([each.example for each in answers], batch_size=batch_size, seed=seed)
        self.desirable = torch.tensor([each.desirable for each in answers], dtype=torch.bool)
        self.mismatched = mismatched(self.examples, longest)
        self.reference = torch.zeros(len(answers), 2)

    def _collate(self, rows: NDArray[np.int64]) -> Batch:
        others = collate([self.mismatched[index] for index in rows.tolist()])
        chosen = torch.from_numpy(rows)
        return _judged(super()._collate(rows), others, self.desirable[chosen], self.reference[chosen])


def _judged(answers: Batch, mismatched: Batch, desirable: Tensor, reference: Tensor) -> VerdictBatch:
    own = answers.tokens, answers.targets, answers.weights, answers.texts
    return VerdictBatch(*own, mismatched=mismatched, desirable=desirable, reference=reference)


def mismatched(examples: Sequence[Example], longest: int) -> list[Example]:
    """Each prompt with the answer of the row before it, the first with the last one's; rows of the same prompt are
    passed over where there are others. What is longer than `longest` tokens ends there."""
    parts = [_cut(example) for example in examples]
    source = [index - 1 for index in range(len(parts))]
    if any(prompt != parts[0][0] for prompt, _, _ in parts):
        # Once more around, for rows at the beginning with the prompt of those at the end.
        for index in [*range(len(parts)), *range(len(parts))]:
            source[index] = index - 1 if parts[index][0] != parts[index - 1][0] else source[index - 1]
    found = []
    for example, (prompt, _, _), index in zip(examples, parts, source, strict=True):
        _, answer, trained = parts[index]
        marks = [False] * len(prompt) + trained
        # The last token is only ever a target.
        found.append(Example((prompt + answer)[: longest + 1], marks[: longest + 1], example.origin))
    return found


def _cut(example: Example) -> tuple[list[int], list[int], list[bool]]:
    """The tokens before the answer, those from its first on, and which of these are trained."""
    first = example.trained.index(True)
    return example.token_ids[:first], example.token_ids[first:], example.trained[first:]
