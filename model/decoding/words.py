"""Texts that stand for token sequences: what a caller writes, and what a stage can match.

A stage knows token ids only. `bad_words` and `dry_breakers` may be given as texts, so they are bound to a tokenizer
once, when a request is checked; what is echoed to the caller stays what the caller wrote.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol, SupportsIndex

from topkapi.model.errors import InvalidRequest


class Vocabulary(Hashable, Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_with_control(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Words(list[Any]):
    """Texts and token-id lists as given, with `sequences`, the token sequences they stand for, once bound.

    A list in every other respect: it compares, copies and serialises as what was given.
    """

    def __init__(self, items: Iterable[Any] = (), sequences: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__(items)
        if sequences is None and not any(isinstance(item, str) for item in self):
            sequences = [tuple(item) for item in self]
        self.sequences: tuple[tuple[int, ...], ...] | None = None
        # By their last token: what a sequence is about to end with.
        self.by_last: dict[int, list[tuple[int, ...]]] = {}
        # By the token before the last, None for those of one token: what a sequence may be about to be completed by.
        self.by_last_but_one: dict[int | None, list[tuple[int, ...]]] = {}
        if sequences is not None:
            self.sequences = tuple(dict.fromkeys(sequences))
            for sequence in self.sequences:
                self.by_last.setdefault(sequence[-1], []).append(sequence)
                before = sequence[-2] if len(sequence) > 1 else None
                self.by_last_but_one.setdefault(before, []).append(sequence)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return Words, (list(self), self.sequences)


def bind_words(name: str, words: Words, vocabulary: Vocabulary | None) -> Words:
    """`words` with the ways in which each text can be tokenised: at the start of a line and after a space.

    Raises `InvalidRequest` naming `name` where a text is given and there is no tokenizer to read it.
    """
    if words.sequences is not None:
        return words
    _require(name, vocabulary)
    assert vocabulary is not None
    sequences = []
    for item in words:
        if isinstance(item, str):
            bare = item.lstrip(" ")
            sequences += [tuple(vocabulary.encode(text)) for text in (item, bare, f" {bare}") if text]
        else:
            sequences.append(tuple(item))
    return Words(words, [sequence for sequence in sequences if sequence])


def bind_breakers(name: str, words: Words, vocabulary: Vocabulary | None) -> Words:
    """`words` with every token that holds one of the texts, and the sequences that hold it across tokens.

    Raises `InvalidRequest` naming `name` where a text is given and there is no tokenizer to read it.
    """
    if words.sequences is not None:
        return words
    _require(name, vocabulary)
    assert vocabulary is not None
    sequences: list[tuple[int, ...]] = []
    for item in words:
        sequences += _holding(vocabulary, item) if isinstance(item, str) else [tuple(item)]
    return Words(words, sequences)


@lru_cache(maxsize=256)
def _holding(vocabulary: Vocabulary, text: str) -> tuple[tuple[int, ...], ...]:
    """Token sequences in which `text` appears: inside one token, or begun by the end of one and finished by others."""
    raw = text.encode("utf-8")
    found: list[tuple[int, ...]] = []
    tails = {size: tuple(vocabulary.encode(text[size:])) for size in range(1, len(text))}
    begun: dict[int, list[tuple[bytes, tuple[int, ...]]]] = {}
    for size, tail in tails.items():
        beginning = text[:size].encode("utf-8")
        begun.setdefault(beginning[-1], []).append((beginning, tail))
    for token_id in range(vocabulary.vocab_size):
        piece = vocabulary.token_bytes(token_id)
        if raw in piece:
            found.append((token_id,))
            continue
        ends = begun.get(piece[-1], ()) if piece else ()
        found += [(token_id, *tail) for beginning, tail in ends if piece.endswith(beginning)]
    return tuple(found)


def _require(name: str, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        raise InvalidRequest(
            f"{name} holds texts, and there is no tokenizer at hand to read them",
            field=name,
            hint=f"give {name} as lists of token ids",
        )
