"""Stages that change the logits of single tokens: bias, and penalties for what was said before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from topkapi.model.decoding.stage import Candidates, Ids, Row, Values, stage

Floats = NDArray[np.float32]

FLOAT32 = np.finfo(np.float32)
# Beyond this the DRY penalty would overflow; llama.cpp stops there as well.
LOG_OF_LARGEST = 88.0


@stage(scans=True)
def logit_bias(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Add to the logits of given tokens."""
    biases = [row.parameters.logit_bias for row in rows]
    flat, present = candidates.locate(*flatten([list(bias) for bias in biases]))
    added = np.array([value for bias in biases for value in bias.values()], dtype=np.float32)[present]
    return candidates.put(flat, candidates.get(flat) + added)


@stage(scans=True)
def repetition_penalty(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Divide positive and multiply negative logits of tokens that occurred."""
    seen = [row.context_counts(row.parameters.repetition_range)[0] for row in rows]
    where, token_ids = flatten(seen)
    flat, present = candidates.locate(where, token_ids)
    # An extreme penalty makes an extreme logit, not an infinite one, which would leave nothing to compare.
    penalty = values["repetition_penalty"].numpy().clip(FLOAT32.tiny, FLOAT32.max).astype(np.float32)[where[present]]
    logits = candidates.get(flat)
    with np.errstate(over="ignore"):
        changed = np.where(logits > 0, logits / penalty, logits * penalty)
    return candidates.put(flat, np.where(np.isfinite(logits), changed.clip(FLOAT32.min, FLOAT32.max), logits))


@stage(needed=lambda row: row.position > 0, scans=True)
def count_penalties(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Subtract for each generated token, once and by its count."""
    answers = [row.answer_counts() for row in rows]
    where, token_ids = flatten([ids for ids, _ in answers])
    flat, present = candidates.locate(where, token_ids)
    where, counts = where[present], np.concatenate([counts for _, counts in answers])[present]
    penalty = values["presence_penalty"].numpy()[where] + values["frequency_penalty"].numpy()[where] * counts
    return candidates.put(flat, candidates.get(flat) - penalty.astype(np.float32))


@stage(scans=True)
def dry(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Subtract from the logits of tokens that would go on with a passage seen before (don't repeat yourself)."""
    found = [_dry_penalties(row) for row in rows]
    flat, present = candidates.locate(*flatten([list(penalties) for penalties in found]))
    penalty = np.array([value for penalties in found for value in penalties.values()], dtype=np.float32)[present]
    return candidates.put(flat, candidates.get(flat) - penalty)


def _dry_penalties(row: Row) -> dict[int, float]:
    """The penalty of each token that would continue a repeated passage."""
    parameters = row.parameters
    allowed, base = parameters.dry_allowed_length, parameters.dry_base
    multiplier, breakers = parameters.dry_multiplier, parameters.dry_breakers
    tokens = row.history(parameters.dry_range)
    # With base 1 every length costs the same, so none beyond the allowed one need be told apart.
    farthest = allowed + (int(LOG_OF_LARGEST / math.log(base)) if base > 1 else 0)
    longest: dict[int, int] = {}
    # Places before the last whose last `length` tokens are also the last ones of the context.
    places, length = np.flatnonzero(tokens[:-1] == tokens[-1]), 1
    while len(places) and length <= farthest:
        if _ends_breaker(tokens[: len(tokens) - length + 1], breakers.by_last):
            break
        if length >= allowed:
            for token_id in tokens[places + 1].tolist():
                longest[token_id] = length
        places = places[places >= length]
        places = places[tokens[places - length] == tokens[-1 - length]]
        length += 1
    return {
        token_id: multiplier * base ** (length - allowed)
        for token_id, length in longest.items()
        if not any(len(sequence) == 1 for sequence in breakers.by_last.get(token_id, ()))
    }


def _ends_breaker(tokens: Ids, by_last: Mapping[int, list[tuple[int, ...]]]) -> bool:
    """Whether a sequence that breaks passages stands at the end of `tokens`."""
    return any(
        len(sequence) == 1 or tuple(tokens[-len(sequence) :].tolist()) == sequence
        for sequence in by_last.get(int(tokens[-1]), ())
    )


def flatten(groups: Sequence[Iterable[int]]) -> tuple[Ids, Ids]:
    """Row numbers and token ids, `[n]` each, of one group of token ids per row."""
    arrays = [np.asarray(group, dtype=np.int64) for group in groups]
    return np.repeat(np.arange(len(arrays)), [len(array) for array in arrays]), np.concatenate(arrays)
