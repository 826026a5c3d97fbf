"""How one text is handed to the libraries that encode it: checked, without holding others up, cut where its pieces have
the ids of the whole, and with what they do where they fail told as an error.

Byte-level BPE from a `tokenizer.json` becomes a tiktoken encoding where that is provably the same function.
`tokenizers` applies a list of merges, each a pair; tiktoken merges any two neighbours whose concatenation has a rank,
lowest rank first. Both choose the lowest rank that is available and never undo a merge, so what happens inside a span
whose ends are token borders depends on that span alone. The two therefore agree on every text when each entry has one
merge, made of entries that come before it, and when the merges turn the entry's own text into that entry. Entries the
merges cannot reach are left out. `Tokenizer` compares the result on a sample besides, which covers the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tiktoken
import tokenizers
from tokenizers import models

from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.model.text.byte_level import BYTE_TO_CHARACTER, byte_level_bytes
from topkapi.model.text.pretokenize import single_pattern

_LONG_RUN = 16_384
"""tiktoken's regular expressions run out of stack on runs of about a million characters; `tokenizers` does not."""

_SHORT = 2048
"""Characters that `tokenizers` encodes in a few milliseconds."""

_LOCAL_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "BertNormalizer", "ByteLevel",
    "Prepend", "Replace",
}  # fmt: skip
"""Normalizers that change a piece of a text as they change it within the whole, but for its beginning."""

_ACROSS_BORDER = re.compile(rb"[A-Za-z] |\n[A-Za-z\x80-\xff]")
"""What no entry of the vocabulary may hold: then nothing is merged across a border."""


def backend_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids by `tokenizers`. What encodes several texts lets go of the interpreter, what encodes one does not."""
    if len(text) < _SHORT:
        return list(backend.encode(text, add_special_tokens=False).ids)
    (encoded,) = backend.encode_batch_fast([text], add_special_tokens=False)
    return list(encoded.ids)


@contextmanager
def panics_refused() -> Iterator[None]:
    """Turn what the libraries raise where a pattern fails on a text into an error: their panics are no `Exception`."""
    try:
        yield
    except (TopkapiError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if "Missing [UNK]" in str(error):
            raise InvalidRequest(
                "the text has characters that the checkpoint's vocabulary lacks, and it has no token for those",
                hint="leave out what it was not trained on",
            ) from error
        raise InvalidRequest(
            f"the checkpoint's tokenizer fails on this text: {' '.join(str(error).split())[:200]}",
            hint="its pattern cannot be matched there; send another text or use another checkpoint",
        ) from error


def check_unicode(text: str) -> None:
    """Raise `InvalidRequest` for a text with half a character, which has no bytes in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}",
            hint="send valid Unicode; a lone surrogate is half of a character, usually cut in two",
        ) from None


def has_long_run(text: str) -> bool:
    """Whether `text` may hold a run of over 2 * _LONG_RUN characters with or without white space throughout.

    Such a run covers one aligned block, and a block is judged without a scan of its own.
    """
    if len(text) < 2 * _LONG_RUN:
        return False
    blocks = (text[start : start + _LONG_RUN] for start in range(0, len(text), _LONG_RUN))
    return any(block.isspace() or len(block.split(None, 1)) == 1 for block in blocks if len(block) == _LONG_RUN)


def keeps_borders(normalizers: Set[str], entries: Iterable[bytes]) -> bool:
    """Whether these kinds of normalizers look no further than a piece, and no entry lies across a border."""
    return normalizers <= _LOCAL_NORMALIZERS and not any(map(_ACROSS_BORDER.search, entries))


def next_border(text: str, start: int) -> int | None:
    """The next place from `start` on where a text may be cut, if there is one.

    That is between two words of ASCII letters, before the space, and where a line begins with a letter. Each place is
    looked at by itself: one expression for it all would hold the interpreter for a second on a text without any.
    """
    space, line = text.find(" ", start), text.find("\n", start)
    while max(space, line) >= 0:
        at = min(each for each in (space, line) if each >= 0)
        before, after = text[at - 1 : at], text[at + 1 : at + 2]
        if at == space:
            if before.isascii() and before.isalpha() and after.isascii() and after.isalpha():
                return at
            space = text.find(" ", at + 1)
        else:
            if before and not before.isspace() and after.isalpha():
                return at + 1
            line = text.find("\n", at + 1)
    return None


def cut(text: str, size: int) -> Iterator[str]:
    """`text` in pieces, each cut at the first place after `size` characters of it."""
    start = 0
    while start < len(text):
        end = next_border(text, start + size) if len(text) > start + size else None
        yield text[start:end]
        start = len(text) if end is None else end


@dataclass(frozen=True)
class BytePairEncoding:
    """A tiktoken encoding with what lies between its ranks and the vocabulary's ids."""

    encoding: tiktoken.Encoding
    id_of_rank: list[int] | None
    """Ids by rank where the two differ; -1 for a byte without an entry, which produces no token."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which must be valid Unicode and already normalised."""
        ranks = self.encoding.encode_ordinary(text)
        if self.id_of_rank is None:
            return ranks
        ids = [self.id_of_rank[rank] for rank in ranks]
        return ids if -1 not in ids else [token_id for token_id in ids if token_id >= 0]


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE `model` section, whether written as strings or as pairs."""
    pairs: list[tuple[str, str]] = []
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def byte_pair_encoding(definition: Mapping[str, Any]) -> BytePairEncoding | None:
    """The tiktoken encoding equal to `definition`, or None where it is not known to be equal."""
    model = definition["model"]
    pattern = single_pattern(definition.get("pre_tokenizer"))
    unsupported = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if pattern is None or model.get("type", "BPE") != "BPE" or any(model.get(key) for key in unsupported):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    missing = [character for character in BYTE_TO_CHARACTER.values() if character not in vocabulary]
    if missing and model.get("unk_token"):
        return None
    merged = _merged_entries(model)
    if merged is None:
        return None
    order = [*(character for character in BYTE_TO_CHARACTER.values() if character in vocabulary), *merged]
    ids = [vocabulary[entry] for entry in order]
    byte_strings = [byte_level_bytes(entry) for entry in order]
    ranks: dict[bytes, int] = {}
    first_merge = 256 - len(missing)
    ranks_are_ids = not missing and all(a < b for a, b in zip(ids[first_merge:], ids[first_merge + 1 :], strict=False))
    for rank, (data, token_id) in enumerate(zip(byte_strings, ids, strict=True)):
        if data is None:
            return None
        ranks[data] = token_id if ranks_are_ids else rank
    for character in missing:
        ranks[byte_level_bytes(character) or b""] = len(ids)
        ids.append(-1)
    if len(set(ranks.values())) != len(ids):
        return None
    encoding = tiktoken.Encoding("topkapi", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return BytePairEncoding(encoding, None if ranks_are_ids else ids)


def _merged_entries(model: Mapping[str, Any]) -> list[str] | None:
    """The reachable merged entries in merge order, or None where tiktoken's rule could differ from the merges."""
    vocabulary: dict[str, int] = model["vocab"]
    if model.get("ignore_merges"):
        return _entries_of_whole_words(model)
    known = set(BYTE_TO_CHARACTER.values())
    merged: dict[str, None] = {}
    pairs = merge_pairs(model)
    for left, right in pairs:
        entry = left + right
        if entry in merged or left not in known or right not in known or entry not in vocabulary:
            return None
        known.add(entry)
        merged[entry] = None
    # One that remembers nothing: what such a model has looked up stays in memory when it is let go of (tokenizers
    # 0.23).
    plain = models.BPE(vocab=vocabulary, merges=pairs, cache_capacity=0)
    return [entry for entry in merged if len(plain.tokenize(entry)) == 1]


def _entries_of_whole_words(model: Mapping[str, Any]) -> list[str] | None:
    """As `_merged_entries`, for a vocabulary that looks up whole words first, as those made by tiktoken do.

    Such a vocabulary lists every way to split an entry, the splits of one entry in a row: tiktoken's own rule.
    """
    vocabulary: dict[str, int] = model["vocab"]
    splits: dict[str, int] = {}
    last = ""
    for left, right in merge_pairs(model):
        entry = left + right
        if entry not in vocabulary or (entry in splits and entry != last):
            return None
        splits[entry] = splits.get(entry, 0) + 1
        last = entry
    for entry in vocabulary:
        if byte_level_bytes(entry) is not None and len(entry) > 1:
            possible = sum(entry[:cut] in vocabulary and entry[cut:] in vocabulary for cut in range(1, len(entry)))
            if splits.setdefault(entry, 0) != possible:
                return None
    return list(splits)
