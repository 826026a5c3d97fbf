"""What of public instruction sets a small model can use: short questions and answers in plain English."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from topkapi.model.errors import SettingsError
from topkapi.training.data.exercises.manners import honest_answer
from topkapi.training.data.exercises.typed import spelling

Messages = list[dict[str, str]]

# Marks of what a model of plain English is better spared: code, markup, links, tables.
_CODE = re.compile(r"```|</\w|\bdef \w+\(|[{}]|;\s*\n|\bimport \w+|#include|SELECT .* FROM|\|.*\|.*\|", re.IGNORECASE)
_LINK = re.compile(r"https?:|www\.|\.com\b")
_CALCULATION = re.compile(r"<<[^>]*>>")
_GSM8K_ANSWER = re.compile(r"\n?#### *(-?[\d,.]*\d)\s*$")
# An assistant that says what it is, or is asked: ours has an answer of its own to that. What is quoted does
# not ask.
_WHO_ARE_YOU = re.compile(
    r"(?<!['\"‘“])\b(?:(?:who|what) are you\W*$|what(?:'s| is) your name\b|who (?:made|created|built|trained) you\b)",
    re.IGNORECASE,
)
_ANOTHER_ASSISTANT = re.compile(
    r"\b(?:I am|I'm|as) an? (?:[\w-]+ ){0,3}(?:AI|artificial intelligence|language model)\b"
    r"|\b(?:Open ?Assistant|ChatGPT)\b",
    re.IGNORECASE,
)
_FOOTNOTE = re.compile(r"\[\d+\]|\[citation needed\]")


@dataclass(frozen=True)
class Limits:
    """Longest question and answer in characters (a question with its input and all turns before), and the part of
    characters that must be ASCII."""

    question: int = 800
    answer: int = 320
    ascii: float = 0.9


@dataclass
class Prepared:
    """The conversations kept of a file, how many were left out for what, and fields of rows that are not used."""

    rows: list[Messages] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)


def prepare(
    path: Path, limits: Limits, first: int | None = None, *, honest: bool = False, without: Container[str] = ()
) -> Prepared:
    """The conversations of a file that `finetune` reads which a small model can use, cleaned.

    With `first`, only so many rows are used; what asks the same as a later row is left out, for those are held out. So
    is what asks something whose `spelling` is among those of `without`. With `honest`, a question that a small model
    cannot answer is answered by saying so, and all others are left out, as are conversations of several turns.
    Raises `DataError` naming rows of no known form.
    """
    # torch comes with it.
    from topkapi.training.data.instructions import check_messages
    from topkapi.training.data.row_files import read_rows
    from topkapi.training.data.rows import conversations_of

    prepared, asked = Prepared(), set[str]()
    every = list(read_rows(path))
    used = every if first is None else every[:first]
    held_out = {
        _question(told.messages) for origin, row in every[len(used) :] for told in conversations_of(row, origin, False)
    }
    for origin, row in used:
        for told in conversations_of(row, origin, False, prepared.unused):
            messages = told.messages
            check_messages(messages, origin)
            cleaned = [{**message, "content": clean(message["content"])} for message in messages]
            if honest:
                cleaned = honestly(cleaned)
            reason = unusable(cleaned, limits) if told.plain else "with tools, reasoning or untrained answers"
            if honest and reason == "empty":
                reason = "answerable or about a text"
            if any(spelling(message["content"]) in without for message in cleaned):
                reason = "asked in what is excepted"
            if _question(messages) in held_out:
                reason = "asked in what is held out"
            elif _question(cleaned) in asked:
                reason = "asked before"
            if reason is None:
                asked.add(_question(cleaned))
                prepared.rows.append(cleaned)
            else:
                prepared.left_out[reason] += 1
    return prepared


def honestly(messages: Messages) -> Messages:
    """A single question with what is honest to answer; with an empty answer where there is nothing such."""
    single = [told["role"] for told in messages] == ["user", "assistant"]
    answer = honest_answer(messages[0]["content"]) if single else None
    return [*messages[:-1], {"role": "assistant", "content": answer or ""}]


def unusable(messages: Messages, limits: Limits) -> str | None:
    """Why a small model cannot use a conversation; None where it can."""
    return next((name for name, is_so in _REASONS if is_so(messages, limits)), None)


def clean(text: str) -> str:
    """The text without footnote marks, GSM8K's calculations and trailing white space; its final number in words."""
    text = _GSM8K_ANSWER.sub(r"\nThe answer is \1.", _CALCULATION.sub("", _FOOTNOTE.sub("", text)))
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.strip().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _question(messages: Messages) -> str:
    said = " ".join(message["content"] for message in messages[:-1])
    return " ".join(re.findall(r"\w+", said.casefold()))


def _texts(messages: Messages) -> Iterator[str]:
    return (message["content"] for message in messages)


def _of_another_assistant(message: dict[str, str]) -> bool:
    mark = _ANOTHER_ASSISTANT if message["role"] == "assistant" else _WHO_ARE_YOU
    return mark.search(message["content"]) is not None


_REASONS: Sequence[tuple[str, Callable[[Messages, Limits], bool]]] = (
    ("empty", lambda messages, _: not all(_texts(messages))),
    ("answer too long", lambda messages, limits: len(messages[-1]["content"]) > limits.answer),
    ("question too long", lambda messages, limits: sum(map(len, _texts(messages[:-1]))) > limits.question),
    ("code or tables", lambda messages, _: any(map(_CODE.search, _texts(messages)))),
    ("links", lambda messages, _: any(map(_LINK.search, _texts(messages)))),
    ("of another assistant", lambda messages, _: any(map(_of_another_assistant, messages))),
    ("not plain English", lambda messages, limits: any(_ascii(text) < limits.ascii for text in _texts(messages))),
)


def _ascii(text: str) -> float:
    return sum(character.isascii() for character in text) / max(1, len(text))


def write_rows(path: Path, rows: Iterable[object], mode: Literal["a", "w"] = "w") -> None:
    """Rows as JSON lines, in the place of the file or at its end. Raises `SettingsError` where that cannot be."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows), mode)


def write_lines(path: Path, lines: Iterable[str], mode: Literal["a", "w"] = "w") -> None:
    """Lines of text, as `write_rows` writes them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written: {error.strerror or error}", field="out", hint="choose another --out"
        ) from None
