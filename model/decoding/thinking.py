"""The block of reasoning before an answer, as tokens: where it ends, and how long it may be.

`model.conversation.reasoning` reads the same block in the answer's text.
"""

from __future__ import annotations

from collections.abc import Sequence

from topkapi.model.decoding.parameter import Vocabulary
from topkapi.model.errors import InvalidRequest

OPEN, CLOSE = "<think>", "</think>"

Marks = tuple[tuple[int, ...], tuple[int, ...]]
"""The token ids of `OPEN` and of `CLOSE`."""


class Budget(int):
    """How many tokens may be thought, and once bound to a tokenizer the `marks` around them. A number otherwise."""

    marks: Marks | None = None


def marks_of(vocabulary: Vocabulary) -> Marks:
    """The marks in a vocabulary: a token each where it has them, else what they are spelled with."""
    opened, closed = (tuple(vocabulary.encode_with_control(mark)) for mark in (OPEN, CLOSE))
    return opened, closed


def bind_budget(name: str, budget: int, vocabulary: Vocabulary | None) -> Budget:
    """`budget` with the marks of a tokenizer. Raises `InvalidRequest` naming `name` where there is none."""
    if vocabulary is None:
        raise InvalidRequest(f"{name} needs a tokenizer, and there is none at hand", field=name)
    bound = Budget(budget)
    bound.marks = marks_of(vocabulary)
    return bound


def begun_at(tokens: Sequence[int], prompt_length: int, marks: Marks) -> int | None:
    """Where in `tokens` the block's first token stands or would stand; None where the answer has begun without one.

    The prompt's last tokens may have opened it, with white space behind, or the answer's first ones do.
    """
    opened, closed = marks
    tail = list(tokens[max(0, prompt_length - len(opened) - 2) : prompt_length])
    for start in range(len(tail) - len(opened), -1, -1):
        if tuple(tail[start : start + len(opened)]) == opened:
            rest = tail[start + len(opened) :]
            return None if closed[0] in rest else prompt_length
    end = prompt_length + len(opened)
    return end if tuple(tokens[prompt_length:end]) == opened else None


def closed_at(tokens: Sequence[int], start: int, marks: Marks) -> int | None:
    """Where in `tokens` the mark stands that closes a block begun at `start`, if it does."""
    closed = marks[1]
    at = start
    while True:
        try:
            at = tokens.index(closed[0], at)
        except ValueError:
            return None
        if tuple(tokens[at : at + len(closed)]) == closed:
            return at
        at += 1


def forced_token(tokens: Sequence[int], prompt_length: int, budget: Budget) -> int | None:
    """The token that has to come next, because as many as may be have been thought and the block is still open."""
    marks = budget.marks
    # What has not been generated at all can't be too long; nothing is looked for until then.
    if marks is None or len(tokens) - prompt_length < budget:
        return None
    start = begun_at(tokens, prompt_length, marks)
    if start is None or len(tokens) - start < budget:
        return None
    closed = marks[1]
    done = len(tokens) - start - budget
    if closed_at(tokens, start, marks) is not None or tuple(tokens[start + budget :]) != closed[:done]:
        return None
    return closed[done]


def thought_tokens(tokens: Sequence[int], prompt_length: int, marks: Marks) -> int:
    """How many of the generated tokens are thought: the block with its marks."""
    start = begun_at(tokens, prompt_length, marks)
    if start is None:
        return 0
    end = closed_at(tokens, start, marks)
    return (len(tokens) if end is None else end + len(marks[1])) - prompt_length
