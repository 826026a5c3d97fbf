"""llama2.c's `.bin` files: bare float32 numbers in a fixed order behind a header of seven, and its `tokenizer.bin`.

karpathy/llama2.c, export.py (`legacy_export`, `version1_export`) and tokenizer.py (`Tokenizer.export`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkapi.model.errors import CheckpointError
from topkapi.model.importing.llama_layouts import STORIES_END, llama_config, meta_layer
from topkapi.model.importing.options import Network
from topkapi.model.storage.gguf_vocabulary import read_vocabulary
from topkapi.model.text.tokenizer import Tokenizer

_MAGIC, _HEADER = 0x616B3432, 256
_LARGEST = (1 << 20, 1 << 24, 1 << 12, 1 << 14, 1 << 14, 1 << 24, 1 << 24)
_KINDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_MOST_BYTES = 1 << 20
"""Of a piece of a vocabulary; the longest has some dozens."""


def is_llama2c(path: Path) -> bool:
    """Whether a file begins as llama2.c's do, with sizes that a network can have and its length agrees with."""
    with path.open("rb") as file:
        head = file.read(_HEADER)
    if len(head) >= 8 and struct.unpack_from("<I", head)[0] == _MAGIC:
        return True
    if len(head) < 28:
        return False
    sizes = struct.unpack_from("<7i", head)
    if not all(0 < abs(size) <= largest for size, largest in zip(sizes, _LARGEST, strict=True)):
        return False
    return any(path.stat().st_size == 28 + 4 * sum(map(_count, _legacy(sizes, tied))) for tied in (True, False))


def read_llama2c(path: Path) -> Network:
    """llama2.c's network of version 0 (legacy) or 1. Raises `CheckpointError` for others and for a wrong length."""
    with path.open("rb") as file:
        head = file.read(_HEADER)
    offset = 28
    sizes: tuple[int, ...] = struct.unpack_from("<7i", head)
    if struct.unpack_from("<I", head)[0] == _MAGIC:
        version, *found, shared = struct.unpack_from("<i7iB", head, 4)
        if version != 1:
            raise CheckpointError(
                f"{path} is of llama2.c's version {version}, whose numbers are rounded in a way that is not read",
                field="version",
                hint="export it again: python export.py model.bin --version 1 --checkpoint ckpt.pt",
            )
        sizes, tied, offset = tuple(found), bool(shared), _HEADER
        order = _version1(sizes, tied)
    else:
        # A vocabulary of its own for the output matrix is told by the sign.
        tied = sizes[5] > 0
        sizes = (*sizes[:5], abs(sizes[5]), sizes[6])
        order = _legacy(sizes, tied)
    for name, size, largest in zip(_KINDS, sizes, _LARGEST, strict=True):
        if not 0 < size <= largest:
            raise CheckpointError(f"{path}: {name} is {size}", field=name, hint="the file is damaged: copy it again")
    dim, hidden, layers, heads, kv_heads, vocabulary, context = sizes
    if dim % heads or heads % kv_heads:
        raise CheckpointError(f"{path}: {dim} numbers cannot be shared by {heads} heads, {kv_heads} of them keys")
    expected = offset + 4 * sum(map(_count, order))
    if path.stat().st_size != expected:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, and its header implies {expected:,}",
            hint="it is only partly there, or damaged: copy it again",
        )
    config = llama_config(
        vocabulary=vocabulary, hidden=dim, inner=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
        context=context, tied=tied, eps=1e-5, theta=10_000.0,
    ) | STORIES_END  # fmt: skip

    def tensors() -> Iterator[tuple[str, Tensor]]:
        place = offset
        for name, shape in order:
            count = math.prod(shape)
            if name is not None:
                numbers = np.fromfile(path, dtype="<f4", count=count, offset=place)
                tensor = torch.from_numpy(numbers.astype(np.float32, copy=False)).reshape(shape)
                yield from _named(name, tensor, heads, kv_heads)
            place += 4 * count

    return Network("llama2.c's .bin", config, tensors, folder=path.parent)


_Order = list[tuple[str | None, tuple[int, ...]]]
"""What follows in the file: names (None: nothing that is needed) and shapes, of all layers together."""


def _legacy(sizes: tuple[int, ...], tied: bool) -> _Order:
    dim, hidden, layers, heads, kv_heads, vocabulary, context = map(abs, sizes)
    keys, half = kv_heads * (dim // max(heads, 1)), dim // max(heads, 1) // 2
    order: _Order = [
        ("embed_tokens.weight", (vocabulary, dim)), ("attention_norm", (layers, dim)),
        ("attention.wq", (layers, dim, dim)), ("attention.wk", (layers, keys, dim)),
        ("attention.wv", (layers, keys, dim)), ("attention.wo", (layers, dim, dim)), ("ffn_norm", (layers, dim)),
        ("feed_forward.w1", (layers, hidden, dim)), ("feed_forward.w2", (layers, dim, hidden)),
        ("feed_forward.w3", (layers, hidden, dim)), ("norm.weight", (dim,)), (None, (context, half)),
        (None, (context, half)),
    ]  # fmt: skip
    return order if tied else [*order, ("lm_head.weight", (vocabulary, dim))]


def _version1(sizes: tuple[int, ...], tied: bool) -> _Order:
    shapes = {name: shape for name, shape in _legacy(sizes, False) if name is not None}
    names = (
        "attention_norm", "ffn_norm", "norm.weight", "embed_tokens.weight", "attention.wq", "attention.wk",
        "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip
    return [(name, shapes[name]) for name in (*names, *(() if tied else ("lm_head.weight",)))]


def _count(entry: tuple[str | None, tuple[int, ...]]) -> int:
    return math.prod(entry[1])


def _named(name: str, tensor: Tensor, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    if name.endswith(".weight"):
        yield name, tensor
        return
    for layer, each in enumerate(tensor):
        yield meta_layer(layer, name, each, heads, kv_heads)


def read_tokenizer(path: Path, size: int) -> Tokenizer:
    """llama2.c's `tokenizer.bin` of `size` entries: SentencePiece's, with scores. Raises `CheckpointError`."""
    content = path.read_bytes()
    entries: list[str] = []
    scores: list[float] = []
    place = 4
    try:
        while len(entries) < size:
            score, length = struct.unpack_from("<fI", content, place)
            if length > _MOST_BYTES or place + 8 + length > len(content):
                raise struct.error
            entries.append(content[place + 8 : place + 8 + length].decode().replace(" ", "\u2581"))
            scores.append(score)
            place += 8 + length
    except (struct.error, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} holds {len(entries):,} entries, and the network {size:,}",
            hint="give the tokenizer.bin that the network was trained with: --tokenizer PATH",
        ) from None
    if place != len(content):
        raise CheckpointError(
            f"{path} holds more entries than the {size:,} of the network",
            hint="give the tokenizer.bin that the network was trained with: --tokenizer PATH",
        )
    return _sentencepiece(entries, scores)


def _sentencepiece(entries: list[str], scores: list[float]) -> Tokenizer:
    # The first are <unk>, <s>, </s> (written with line ends around them) and the 256 bytes, as SentencePiece sets them.
    entries[:3] = ["<unk>", "<s>", "</s>"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": entries,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *(6 if index < 259 else 1 for index in range(3, len(entries)))],
    }
    return read_vocabulary(metadata)[0]
