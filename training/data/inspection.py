"""What is wrong with data before a run spends hours on it: each finding is one sentence with a number and a remedy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data.instructions import Conversation
from topkapi.training.data.shards import TokenData

Stream = NDArray[np.unsignedinteger[Any]]

# Validation text counts as seen where so many tokens in a row also stand in the training text.
OVERLAP_TOKENS = 32
# Parts of a stream that are looked at together, in tokens: 32 MB of hashes.
_CHUNK = 1 << 22
_FILTER_BITS = 24
# Shares worth a word.
_OVERLAP_SHARE = 0.01
_LEFT_OUT_SHARE = 0.1
# Control characters that no text holds, form feeds aside, and what stands for bytes that were not UTF-8.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd]")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def token_findings(data: TokenData, tokenizer: Tokenizer, *, context: int, stride: int, batch_size: int) -> list[str]:
    """What is wrong with the token streams of a pretraining run, or may be."""
    findings = []
    if not _occurs(data.train, tokenizer.end_token_id):
        findings.append(
            "no end token is trained, so the model cannot learn to end a text: the only document was split in the "
            "middle; give several documents, or --validation-fraction 0"
        )
    if stride > context:
        findings.append(
            f"a stride of {stride} after windows of {context} tokens: {stride - context} of every {stride} tokens are "
            "never trained"
        )
    windows = max(0, -(-(len(data.train) - context) // stride))
    findings += _left_out(windows, batch_size, "windows")
    train, validation = (
        _digests(stream, starts)
        for stream, starts in (
            (data.train, data.train_documents),
            (data.validation, data.validation_documents),
        )
    )
    findings += _repeated(len(train) - len(set(train)), len(train), "training documents", "--deduplicate exact")
    seen = set(train)
    if shared := sum(digest in seen for digest in validation):
        findings.append(
            f"{shared} of {len(validation)} validation documents also occur in training, word for word: the validation "
            "loss will look better than it is"
        )
    else:
        blocks, found = overlapping_blocks(data.train, data.validation)
        if found > _OVERLAP_SHARE * blocks:
            findings.append(
                f"{found / blocks:.1%} of the validation text also occurs in training (runs of {OVERLAP_TOKENS} "
                "tokens): the validation loss will look better than it is"
            )
    return [*findings, *_not_text_tokens(data, tokenizer)]


def conversation_findings(train: Sequence[Conversation], validation: Sequence[Conversation]) -> list[str]:
    """What is wrong with conversations, or may be. What cannot be trained at all is an error before this."""
    texts = [str(conversation.messages) for conversation in train]
    findings = _repeated(len(texts) - len(set(texts)), len(texts), "training examples", "take the copies out")
    marred = [
        conversation.origin
        for conversation in (*train, *validation)
        if any(_NOT_TEXT.search(message["content"]) for message in conversation.messages)
    ]
    if marred:
        findings.append(
            f"{len(marred)} examples hold control characters or U+FFFD, what is left of a wrong encoding: the first is "
            f"{marred[0]}"
        )
    return findings


def example_findings(train: int, validation: int, kind: str, shared_prompts: int, batch_size: int) -> list[str]:
    """What is wrong with the numbers of examples: prompts that are trained and held out, and incomplete batches."""
    findings = _left_out(train, batch_size, kind)
    if shared_prompts:
        findings.append(f"{shared_prompts} of {validation} validation prompts also occur in training")
    return findings


def _repeated(count: int, total: int, what: str, remedy: str) -> list[str]:
    return [f"{count} of {total:,} {what} repeat an earlier one: {remedy}"] if count else []


def _left_out(items: int, batch_size: int, what: str) -> list[str]:
    rest = items % batch_size
    if rest <= _LEFT_OUT_SHARE * items:
        return []
    return [
        f"each epoch leaves out {rest} of {items} {what}, other ones each time, for they do not fill a batch of "
        f"{batch_size}: choose a batch size that divides them"
    ]


def _occurs(stream: Stream, token_id: int | None) -> bool:
    return any(bool((chunk == token_id).any()) for chunk in _chunks(stream))


def _chunks(stream: Stream, more: int = 0) -> Iterable[Stream]:
    """Parts of a stream, each with `more` tokens of the next one."""
    return (stream[start : start + _CHUNK + more] for start in range(0, len(stream), _CHUNK))


def _digests(stream: Stream, starts: NDArray[np.int64]) -> list[bytes]:
    """A digest of each document's tokens."""
    ends = [*starts[1:].tolist(), len(stream)][: len(starts)]
    return [
        hashlib.blake2b(stream[start:end].tobytes(), digest_size=16).digest()
        for start, end in zip(starts.tolist(), ends, strict=True)
        if start < end
    ]


def overlapping_blocks(train: Stream, validation: Stream) -> tuple[int, int]:
    """How many runs of `OVERLAP_TOKENS` tokens the validation text has, side by side, and how many of them occur
    anywhere in the training text."""
    blocks = np.asarray(validation[: len(validation) // OVERLAP_TOKENS * OVERLAP_TOKENS])
    if not len(blocks):
        return 0, 0
    wanted = _hashes(blocks)[::OVERLAP_TOKENS]
    known = np.unique(wanted)
    # Most hashes are in no block: a small table tells them apart before they are looked up.
    table = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)
    table[known >> np.uint64(64 - _FILTER_BITS)] = True
    found = np.zeros(len(known), dtype=np.bool_)
    for chunk in _chunks(train, OVERLAP_TOKENS - 1):
        hashes = _hashes(np.asarray(chunk))
        hashes = hashes[table[hashes >> np.uint64(64 - _FILTER_BITS)]]
        at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        found[at[known[at] == hashes]] = True
    return len(wanted), int(found[np.searchsorted(known, wanted)].sum())


def _hashes(tokens: Stream) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of `OVERLAP_TOKENS` tokens: `[len(tokens) - OVERLAP_TOKENS + 1]`.

    Runs of twice the length are hashed from two neighbours until the length is reached.
    """
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    length = 1
    while length < OVERLAP_TOKENS:
        if len(hashes) <= length:
            return hashes[:0]
        mixed = hashes[:-length] * _MULTIPLIER
        hashes = (mixed ^ (mixed >> np.uint64(29))) + hashes[length:]
        length *= 2
    return hashes * _MULTIPLIER


def _not_text_tokens(data: TokenData, tokenizer: Tokenizer) -> list[str]:
    marks = np.array(
        [
            token_id not in tokenizer.control_tokens.values()
            and bool(_NOT_TEXT.search(tokenizer.token_bytes(token_id).decode("utf-8", "ignore")))
            for token_id in range(tokenizer.vocab_size)
        ]
    )
    count, first = 0, ""
    for name, stream in (("training", data.train), ("validation", data.validation)):
        for number, chunk in enumerate(_chunks(stream)):
            found = np.flatnonzero(marks[chunk])
            if len(found) and not first:
                at = number * _CHUNK + int(found[0])
                around = tokenizer.decode(stream[max(0, at - 8) : at + 8].tolist(), skip_control=True)
                first = f"the first in the {name} text, in {around!r}"
            count += len(found)
    if not count:
        return []
    return [f"{count:,} tokens hold control characters or U+FFFD, what is left of a wrong encoding: {first}"]
