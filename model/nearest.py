"""Which of several names was probably meant by one that is none of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SHORTEST = 3
"""Letters without which a name says too little to guess from."""


def nearest(typed: str, known: Iterable[str]) -> str | None:
    """The name among `known` that `typed` is a slip or a beginning of; None rather than one that is far-fetched.

    Capitals and the marks between words count for nothing. A slip are the same letters in another order, or with
    another of them doubled; or at most one letter in three that is missing, too many, another one or exchanged with
    its neighbour. A beginning is one where no other name begins so, or each of its words where no other name's do.
    """
    plain = _plain(typed)
    names = {name: _plain(name) for name in known}
    if len(plain) < _SHORTEST:
        return next((name for name, letters in names.items() if letters == plain != ""), None)
    begun = [name for name, letters in names.items() if letters.startswith(plain)]
    if len(begun) == 1:
        return begun[0]
    words = _words(typed)
    shortened = [name for name in names if len(words) > 1 and _begin(words, _words(name))]
    if len(shortened) == 1:
        return shortened[0]
    found: tuple[int, str] | None = None
    for name, letters in names.items():
        most = max(len(plain), len(letters)) // 3
        alike = len(plain) == len(letters) and set(plain) == set(letters)
        edits = 1 if alike else _edits(plain, letters, most)
        if edits <= most and (found is None or edits < found[0]):
            found = edits, name
    return None if found is None else found[1]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name[:1000]).casefold()


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name[:1000].casefold())


def _begin(words: list[str], others: list[str]) -> bool:
    """Whether each word is the beginning of the other one in its place."""
    return len(words) == len(others) and all(map(str.startswith, others, words))


def _edits(first: str, second: str, most: int) -> int:
    """How many letters have to be put in, taken out, replaced or exchanged with a neighbour; any number above `most`
    where it would be more."""
    if abs(len(first) - len(second)) > most:
        return most + 1
    before, last = [0] * (len(second) + 1), list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        line = [row]
        for column, other in enumerate(second, 1):
            cost = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != other))
            if row > 1 and column > 1 and letter == second[column - 2] and other == first[row - 2]:
                cost = min(cost, before[column - 2] + 1)
            line.append(cost)
        if min(line) > most:
            return most + 1
        before, last = last, line
    return last[-1]
