"""Offline measures of an answer's text: exact match, token F1, ROUGE-L, repetition."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"\w+")
# A run of words this long that occurs again counts as repetition.
REPEATED_WORDS = 4


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return _WORD.findall(text.casefold())


def exact_match(answer: str, reference: str) -> bool:
    """Whether the two have the same words in the same order."""
    return words(answer) == words(reference)


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, order aside (Rajpurkar et al. 2016, articles kept)."""
    first, second = words(answer), words(reference)
    shared = sum((Counter(first) & Counter(second)).values())
    return _f1(shared, len(first), len(second))


def rouge_l(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence of words (Lin 2004)."""
    first, second = words(answer), words(reference)
    return _f1(longest_common_subsequence(first, second), len(first), len(second))


def _f1(shared: int, first: int, second: int) -> float:
    if not first or not second:
        return float(first == second)
    return 2 * shared / (first + second)


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Its length. One bit per word of `first`, a row of the dynamic programme at a time (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def repetition(answer: str) -> float:
    """The part of the runs of four words that occurred before in the answer; 0 for an answer of fewer."""
    found = words(answer)
    runs = list(zip(*(found[start:] for start in range(REPEATED_WORDS)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
