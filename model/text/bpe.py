"""Byte-level BPE from a `tokenizer.json` as a tiktoken encoding, where that is provably the same function.

`tokenizers` applies a list of merges, each a pair; tiktoken merges any two neighbours whose concatenation has a rank,
lowest rank first. Both choose the lowest rank that is available and never undo a merge, so what happens inside a span
whose ends are token borders depends on that span alone. The two therefore agree on every text when each entry has one
merge, made of entries that come before it, and when the merges turn the entry's own text into that entry. Entries the
merges cannot reach are left out. `Tokenizer` compares the result on a sample besides, which covers the pattern.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tiktoken
from tokenizers import models

from topkapi.model.text.byte_level import BYTE_TO_CHARACTER, byte_level_bytes
from topkapi.model.text.pretokenize import single_pattern


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
