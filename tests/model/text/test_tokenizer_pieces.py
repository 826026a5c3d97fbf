"""Long texts are encoded in pieces, with the ids of the whole, and between two of them the work may end."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests import texts
from topkapi.model.errors import Cancelled
from topkapi.model.interruption import given_up_when
from topkapi.model.text import tokenizer as module
from topkapi.model.text.tokenizer import Tokenizer

WORDS = re.findall(
    r"\w+", "the of and to a in is it you that he was for on are with as his they at be this from I have or by one had"
)


def passage(chance: random.Random) -> str:
    """Words, with whatever may stand between and beside them."""
    between = [" "] * 8 + [
        "  ", "\n", "\n\n", " \n", "\t", "-", ", ", ". ", "'s ", " 12", "3 ", "\r\n", "\u00a0", "\n  ", ")\n",
    ]  # fmt: skip
    parts = [chance.choice([*WORDS * 3, *texts.ALL]) + chance.choice(between) for _ in range(200)]
    return "".join(parts)


def sentencepiece(kind: str) -> Tokenizer:
    """A vocabulary as Llama's (spaces by a normalizer) or T5's (by a pre-tokenizer) have it."""
    pieces = ["<unk>", "▁", *(chr(code) for code in range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"▁{word}" for word in WORDS] + [word for word in WORDS if len(word) > 1]
    pieces = list(dict.fromkeys(pieces))
    if kind == "bpe":
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        known = [piece for piece in pieces if not piece.startswith("<0x")]
        splits = [(piece[:cut], piece[cut:]) for piece in known for cut in range(1, len(piece))]
        merges = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        made = tokenizers.Tokenizer(model)
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scores = [(piece, -float(10 - len(piece))) for piece in pieces]
        made = tokenizers.Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=kind == "words")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _of(made)


def _of(made: Any) -> Tokenizer:
    return Tokenizer(json.loads(made.to_str()))


@pytest.fixture(scope="module")
def vocabularies(tiny_tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    gpt2 = dict(tiny_tokenizer.definition) | {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    }
    slow = dict(tiny_tokenizer.definition) | {"normalizer": {"type": "Lowercase"}}
    return {
        "qwen": tiny_tokenizer, "gpt2": Tokenizer(gpt2), "slow": Tokenizer(slow),
        **{kind: sentencepiece(kind) for kind in ("bpe", "unigram", "words")},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["qwen", "gpt2", "slow", "bpe", "unigram", "words"])
def test_pieces_have_the_ids_of_the_whole(monkeypatch, vocabularies, name) -> None:
    tokenizer = vocabularies[name]
    assert tokenizer.uses_tiktoken == (name in ("qwen", "gpt2"))
    assert tokenizer._can_be_cut
    chance = random.Random(name)
    for _ in range(20):
        text = passage(chance)
        whole, after = tokenizer.encode(text), tokenizer.encode_parts([["a"], [text]])[1]
        monkeypatch.setattr(module, "_PIECE", 40)
        assert "".join(tokenizer.pieces(text)) == text and len(list(tokenizer.pieces(text))) > 5
        assert tokenizer.encode(text) == whole
        assert tokenizer.encode_parts([["a"], [text]])[1] == after
        monkeypatch.undo()


@pytest.mark.parametrize("entry", ["New York", "wet paint"])
def test_a_vocabulary_with_entries_across_words_is_never_cut(tiny_tokenizer, entry: str) -> None:
    """Whether a text on which cuts are tried out holds the entry or not."""
    definition = dict(tiny_tokenizer.definition)
    added = {"id": tiny_tokenizer.vocab_size, "content": entry, "special": False, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    definition["added_tokens"] = [*definition["added_tokens"], added]
    tokenizer = Tokenizer(definition)
    assert not tokenizer._can_be_cut and list(tokenizer.pieces("a b " * 100_000)) == ["a b " * 100_000]


def test_what_strips_a_text_is_never_cut(tiny_tokenizer) -> None:
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    assert not Tokenizer(dict(tiny_tokenizer.definition) | {"normalizer": strip})._can_be_cut


def test_it_ends_between_two_pieces_when_nobody_waits(tiny_tokenizer) -> None:
    asked = iter([False, False, True])
    with given_up_when(lambda: next(asked)), pytest.raises(Cancelled):
        tiny_tokenizer.encode("some words " * 100_000)
    assert next(asked, None) is None


def test_no_text_of_so_many_tokens_is_longer(tiny_tokenizer) -> None:
    assert tiny_tokenizer.longest_token == max(len(tiny_tokenizer.token_bytes(i)) for i in range(512))


def test_white_space_before_a_token_that_swallows_it_is_searched_once(tiny_tokenizer) -> None:
    definition = dict(tiny_tokenizer.definition)
    mask = {"id": 512, "content": "<mask>", "special": True, "normalized": False, "single_word": False,
            "lstrip": True, "rstrip": True}  # fmt: skip
    definition["added_tokens"] = [*definition["added_tokens"], mask]
    tokenizer = Tokenizer(definition)
    for text, parts in (
        ("a <mask> b", ["a", 512, "b"]), (" \n <mask><mask>\t<mask> ", [512, 512, 512]), ("  a", ["  a"]),
        ("a\u2003<mask>", ["a", 512]), ("<mask>", [512]),
    ):  # fmt: skip
        assert tokenizer.split_control(text) == parts
    # Quadratic, this would take a minute.
    assert tokenizer.split_control(" " * 200_000 + "a") == [" " * 200_000 + "a"]
