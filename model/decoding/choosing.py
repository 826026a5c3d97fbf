"""From logits to the next token of every row, with the log-probabilities a caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoding.noise import gumbel
from model.decoding.stages import NOT_CHOSEN, Row, process
from model.errors import EngineError


@dataclass(frozen=True)
class Choice:
    """A chosen token; the rest is filled where the row's `logprobs` parameter asks for it.

    `raw_logprob` is the network's own, `logprob` the one of the distribution the token was drawn from; `rank` counts
    from 1 for the network's most likely token; `top` holds `(token id, raw log-probability)`, most likely first.
    """

    token_id: int
    logprob: float | None = None
    raw_logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Choose one token per row from the network's `logits [B, V]`.

    The token is `argmax(log-probability + gumbel(seed, sequence, position, token))`, greedy rows without the noise.
    Raises `EngineError` where the logits hold NaN or every token has been ruled out.
    """
    logits = logits.float()
    processed = process(logits, rows)
    best = processed.amax(dim=-1)
    if bool(best.isnan().any()):
        raise EngineError("the network produced NaN logits", hint="the checkpoint is damaged or overflows in its dtype")
    if bool((best == NOT_CHOSEN).any()):
        raise EngineError("no token is left to choose", hint="loosen the parameters that rule tokens out")
    token_ids = processed.argmax(dim=-1)
    sampled = [index for index, row in enumerate(rows) if not row.greedy]
    if sampled:
        token_ids[sampled] = _sample(processed[sampled], [rows[index] for index in sampled])
    ids: list[int] = token_ids.tolist()
    return [
        Choice(token_id) if row.parameters["logprobs"] is None
        else _explained(token_id, row, logits[index], processed[index])
        for index, (token_id, row) in enumerate(zip(ids, rows, strict=True))
    ]  # fmt: skip


def _sample(processed: Tensor, rows: Sequence[Row]) -> Tensor:
    device = processed.device

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    noise = gumbel(
        column([row.parameters["seed"] for row in rows]),
        column([row.sequence for row in rows]),
        column([len(row.tokens) - row.prompt_length for row in rows]),
        torch.arange(processed.shape[-1], device=device),
    )
    return (processed.double() + noise).argmax(dim=-1)


def _explained(token_id: int, row: Row, raw: Tensor, processed: Tensor) -> Choice:
    log_probabilities = raw.double().log_softmax(dim=-1)
    own = log_probabilities[token_id]
    count = min(int(row.parameters["logprobs"]), raw.shape[-1])
    values, ids = log_probabilities.topk(count)
    final = 0.0 if row.greedy else float(processed.double().log_softmax(dim=-1)[token_id])
    return Choice(
        token_id,
        logprob=final,
        raw_logprob=float(own),
        rank=int((log_probabilities > own).sum()) + 1,
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )
