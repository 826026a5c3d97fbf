"""Stages that settle which tokens may be chosen at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from topkapi.model.decoding.penalties import flatten
from topkapi.model.decoding.stage import NOT_CHOSEN, Candidates, Ids, Row, Values, stage
from topkapi.model.decoding.thinking import Budget, forced_token


@stage(needed=lambda row: row.constraint is not None, scans=True)
def grammar(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """What the structure that was asked for may go on with."""
    allowed = torch.stack([row.constraint.mask() for row in rows if row.constraint is not None])
    logits = candidates.dense()
    masked = logits.masked_fill(~allowed.to(logits.device), NOT_CHOSEN)
    return candidates.changed(masked)


@stage(needed=lambda row: row.position < row.parameters.min_tokens, scans=True)
def min_tokens(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Nothing that ends the answer before it has its least length."""
    return _without(candidates, [[*row.end_token_ids, *row.parameters.stop_token_ids] for row in rows])


@stage(scans=True)
def banned_token_ids(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """None of these."""
    return _without(candidates, [row.parameters.banned_token_ids for row in rows])


@stage(scans=True)
def allowed_token_ids(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """None but these."""
    return candidates.only(*flatten([sorted(set(row.parameters.allowed_token_ids or ())) for row in rows]))


@stage(scans=True)
def bad_words(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Nothing that would complete one of the sequences."""
    return _without(candidates, [_completing(row) for row in rows])


def _completing(row: Row) -> list[int]:
    tokens, words = row.tokens, row.parameters.bad_words.by_last_but_one
    found = [word for (word,) in words.get(None, ())]
    for sequence in words.get(tokens[-1], ()) if tokens else ():
        if tuple(tokens[1 - len(sequence) :]) == sequence[:-1]:
            found.append(sequence[-1])
    return found


@stage(scans=True)
def no_repeat_ngram_size(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Nothing that would complete an n-gram a second time."""
    return _without(candidates, [_repeating(row.history(), row.parameters.no_repeat_ngram_size) for row in rows])


def _repeating(tokens: Ids, size: int) -> Ids:
    """The tokens that followed each earlier appearance of the last `size - 1` tokens."""
    if len(tokens) < size:
        return tokens[:0]
    ends = np.arange(size - 1, len(tokens))
    for back in range(1, size):
        ends = ends[tokens[ends - back] == tokens[-back]]
    return np.unique(tokens[ends])


def _to_be_closed(row: Row) -> int | None:
    budget = row.parameters.thinking_budget
    return forced_token(row.tokens, row.prompt_length, budget) if isinstance(budget, Budget) else None


@stage(needed=lambda row: _to_be_closed(row) is not None, scans=True)
def thinking_budget(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """The end of the block of reasoning, once it is as long as it may be, whatever else is ruled out."""
    ids = torch.tensor([[_to_be_closed(row)] for row in rows])
    return Candidates(torch.zeros(ids.shape), candidates.vocab_size, ids)


def _without(candidates: Candidates, ruled_out: Sequence[Sequence[int] | Ids]) -> Candidates:
    flat, _ = candidates.locate(*flatten(ruled_out))
    return candidates.put(flat, NOT_CHOSEN)
