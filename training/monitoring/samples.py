"""What a model writes on the way: kept, shown, and searched for passages that stand, token for token, in a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkapi.model.generation import generate
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.training.data.windows import Tokens
from topkapi.training.recipes.recipe import TrainingRecipe
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.state import TrainerState

# Shorter passages are phrases that everybody uses; they count as nothing.
SHORTEST = 4
# A copy at least this long, and twice as long as any from text that was not trained on, is memorised.
MEMORISED = 16
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Copy:
    """`length` tokens of a sample from its token `start` on, which also stand at `position` of the text searched."""

    length: int = 0
    start: int = 0
    position: int = 0


def longest_copy(sample: Sequence[int], text: Tokens) -> Copy:
    """The longest passage of `sample` in `text` (one dimension), of those at least `SHORTEST` tokens long.

    One pass over the text: a small table tells which of its positions may begin any run of three tokens that the sample
    has, and only these few are compared. About 0.4 s per hundred million tokens.
    """
    wanted = np.asarray(sample, dtype=np.int64)
    if len(wanted) < SHORTEST or len(text) < SHORTEST:
        return Copy()
    table = np.zeros(1 << 16, np.bool_)
    table[_keys(wanted)] = True
    best = Copy()
    for begin in range(0, len(text), _CHUNK):
        near = np.flatnonzero(table[_keys(text[begin : begin + _CHUNK + 2])]) + begin
        best = max(best, _extend(wanted, text, near), key=lambda copy: copy.length)
    return best


def _keys(tokens: NDArray[Any]) -> NDArray[np.uint16]:
    """A number for each three tokens in a row."""
    short = tokens.astype(np.uint16)
    keys: NDArray[np.uint16] = short[:-2] * np.uint16(40503) + short[1:-1] * np.uint16(10007) + short[2:]
    return keys


def _extend(wanted: NDArray[np.int64], text: Tokens, near: NDArray[np.int64]) -> Copy:
    """The longest passage of `wanted` that begins at one of the positions `near`."""
    best = Copy()
    first = text[near]
    for start in np.unique(wanted, return_index=True)[1].tolist():
        # Every place in the sample where this token stands.
        starts = np.flatnonzero(wanted == wanted[start])
        positions = near[first == wanted[start]]
        at, place = (grid.ravel() for grid in np.meshgrid(starts, positions, indexing="ij"))
        length = 1
        while len(at):
            if length >= SHORTEST and length > best.length:
                best = Copy(length, int(at[0]), int(place[0]))
            inside = (at + length < len(wanted)) & (place + length < len(text))
            at, place = at[inside], place[inside]
            same = text[place + length] == wanted[at + length]
            at, place = at[same], place[same]
            length += 1
    return best


def memorises(from_training: int, from_validation: int) -> bool:
    """Whether such a copy can only come from having learned the text by heart."""
    return from_training >= MEMORISED and from_training >= 2 * from_validation


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from: the `text` as it is shown, its tokens, and the answer that is expected, if one is."""

    text: str
    token_ids: list[int]
    expected: str | None = None


def continuations(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], recipe: TrainingRecipe, step: int
) -> Iterator[dict[str, Any]]:
    """What the model makes of each prompt at `step`: records with `prompt`, `text` and `token_ids`."""
    for prompt in prompts:
        parameters = {
            "max_tokens": recipe.sample_tokens,
            "temperature": recipe.sample_temperature,
            "seed": recipe.seed + step,
        }
        result = generate(model, prompt.token_ids, parameters)
        yield {
            "prompt": prompt.text,
            "text": tokenizer.decode(result.token_ids, skip_control=True),
            "finish_reason": result.finish_reason,
            "token_ids": result.token_ids,
            **({} if prompt.expected is None else {"expected": prompt.expected}),
        }


NOTABLE = 2 * SHORTEST
"""Tokens of a copy that is told: shorter ones are in every text."""


def take_samples(
    samples: Iterable[dict[str, Any]],
    state: TrainerState,
    *,
    texts: tuple[Tokens, Tokens],
    directory: RunDirectory,
    console: Console,
    shown: bool,
    text_of: Callable[[list[int]], str],
) -> None:
    """Record `samples` with how much of them stands word for word in `texts`, of training and of validation.

    Prints them if they are to be `shown`, a line each and nothing that was printed last time. Says once in a run that
    the model memorises; `state` notes it, and the longest copy.
    """
    longest, elsewhere = Copy(), Copy()
    passage: list[int] = []
    for record in samples:
        ids = record.pop("token_ids")
        found, other = (longest_copy(ids, text) for text in texts)
        if found.length > longest.length:
            longest, passage = found, ids[found.start : found.start + found.length]
        elsewhere = max(elsewhere, other, key=lambda copy: copy.length)
        copied = {"copied_from_training": found.length, "copied_from_validation": other.length}
        directory.append("samples.jsonl", {"step": state.step, **record, **copied})
        prompt, text = (" ".join(str(record[part]).split()) for part in ("prompt", "text"))
        if shown:
            console.news(prompt, f"  sample: {prompt} | {text}")
    copied = {"copied_from_training": longest.length, "copied_from_validation": elsewhere.length}
    directory.append("metrics.jsonl", {"step": state.step, **copied})
    state.copied = longest.length
    if shown and longest.length > NOTABLE:
        console.news(
            "",
            f"  longest copy: {longest.length} tokens of the training text, {elsewhere.length} of the validation text: "
            f"{' '.join(text_of(passage).split())!r}",
        )
    if memorises(longest.length, elsewhere.length) and not state.memorising:
        state.memorising = True
        console.message(f"memorising: a sample repeats {longest.length} tokens of the training text word for word")
