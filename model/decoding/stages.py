"""The stages that turn a network's logits into the distribution a token is drawn from.

A stage is a pure function of `(logits [B, V], its parameters as [B] tensors, the rows' histories)`. It is applied to
the rows that need it and to no other. Removed tokens have logit -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NOT_CHOSEN = float("-inf")


@dataclass
class Row:
    """One sequence at one step: its effective parameters and the tokens so far.

    `sequence` is the index within the request (n > 1); `end_token_ids` cannot be chosen before `min_tokens`.
    """

    parameters: Mapping[str, Any]
    tokens: list[int]
    prompt_length: int
    sequence: int = 0
    end_token_ids: Sequence[int] = field(default_factory=tuple)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def greedy(self) -> bool:
        return bool(self.parameters["temperature"] == 0)


Values = Mapping[str, Tensor]
Apply = Callable[[Tensor, Values, Sequence[Row]], Tensor]


@dataclass(frozen=True)
class Stage:
    """A named stage. `needed(row)` says whether it would change anything; `parameters` are handed over as tensors."""

    name: str
    parameters: tuple[str, ...]
    needed: Callable[[Row], bool]
    apply: Apply


def _bias(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    logits = logits.clone()
    for index, row in enumerate(rows):
        bias = row.parameters["logit_bias"]
        ids = torch.tensor(list(bias), dtype=torch.int64, device=logits.device)
        logits[index, ids] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits


def _min_tokens(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    logits = logits.clone()
    for index, row in enumerate(rows):
        logits[index, [*row.end_token_ids, *row.parameters["stop_token_ids"]]] = NOT_CHOSEN
    return logits


def _repetition_penalty(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    logits = logits.clone()
    for index, row in enumerate(rows):
        ids = torch.tensor(sorted(set(row.tokens)), dtype=torch.int64, device=logits.device)
        penalty, seen = values["repetition_penalty"][index], logits[index, ids]
        logits[index, ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits


def _count_penalties(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    logits = logits.clone()
    for index, row in enumerate(rows):
        generated = torch.tensor(list(row.generated), dtype=torch.int64, device=logits.device)
        ids, counts = torch.unique(generated, return_counts=True)
        logits[index, ids] -= values["presence_penalty"][index] + values["frequency_penalty"][index] * counts
    return logits


def _temperature(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    return logits / values["temperature"].unsqueeze(-1)


def _top_k(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    keep = values["top_k"].long().clamp(max=logits.shape[-1])
    best = logits.topk(int(keep.max()), dim=-1).values
    return logits.masked_fill(logits < best.gather(-1, keep.unsqueeze(-1) - 1), NOT_CHOSEN)


def _top_p(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    probabilities = logits.double().softmax(dim=-1)
    wanted = values["top_p"].double().unsqueeze(-1)
    # The nucleus is nearly always small: widen the partial sort until it covers every row instead of sorting all.
    width = min(128, logits.shape[-1])
    while True:
        sorted_probabilities, ids = probabilities.topk(width, dim=-1)
        cumulative = sorted_probabilities.cumsum(dim=-1)
        if width == logits.shape[-1] or bool((cumulative[:, -1:] >= wanted).all()):
            break
        width = min(width * 8, logits.shape[-1])
    removed = cumulative - sorted_probabilities >= wanted
    removed[:, 0] = False
    result = torch.full_like(logits, NOT_CHOSEN)
    return result.scatter(-1, ids, logits.gather(-1, ids).masked_fill(removed, NOT_CHOSEN))


def _min_p(logits: Tensor, values: Values, rows: Sequence[Row]) -> Tensor:
    threshold = logits.amax(dim=-1, keepdim=True) + values["min_p"].log().unsqueeze(-1)
    return logits.masked_fill(logits < threshold, NOT_CHOSEN)


def _differs(name: str, off: object) -> Callable[[Row], bool]:
    return lambda row: bool(row.parameters[name] != off)


def _before_min_tokens(row: Row) -> bool:
    return len(row.tokens) - row.prompt_length < int(row.parameters["min_tokens"])


def _counts_needed(row: Row) -> bool:
    used = row.parameters["presence_penalty"] != 0 or row.parameters["frequency_penalty"] != 0
    return bool(used and len(row.tokens) > row.prompt_length)


# The default order: what changes single logits first, then temperature, then what cuts the tail, as in transformers.
STAGES: tuple[Stage, ...] = (
    Stage("min_tokens", (), _before_min_tokens, _min_tokens),
    Stage("logit_bias", (), _differs("logit_bias", {}), _bias),
    Stage("repetition_penalty", ("repetition_penalty",), _differs("repetition_penalty", 1.0), _repetition_penalty),
    Stage("count_penalties", ("presence_penalty", "frequency_penalty"), _counts_needed, _count_penalties),
    Stage("temperature", ("temperature",), _differs("temperature", 1.0), _temperature),
    Stage("top_k", ("top_k",), _differs("top_k", 0), _top_k),
    Stage("top_p", ("top_p",), _differs("top_p", 1.0), _top_p),
    Stage("min_p", ("min_p",), _differs("min_p", 0.0), _min_p),
)  # fmt: skip

# A greedy row takes the largest logit, which these never change.
SAMPLING_STAGES = frozenset({"temperature", "top_k", "top_p", "min_p"})
DEFAULT_ORDER: tuple[str, ...] = tuple(stage.name for stage in STAGES)


def process(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """`logits [B, V]` float32 through every stage its rows need, in order; the input is left as it is."""
    for stage in STAGES:
        needing = [
            index for index, row in enumerate(rows)
            if not (row.greedy and stage.name in SAMPLING_STAGES) and stage.needed(row)
        ]  # fmt: skip
        if not needing:
            continue
        chosen = [rows[index] for index in needing]
        values = {
            name: torch.tensor([row.parameters[name] for row in chosen], dtype=logits.dtype, device=logits.device)
            for name in stage.parameters
        }
        if len(needing) == len(rows):
            logits = stage.apply(logits, values, chosen)
        else:
            index = torch.tensor(needing, device=logits.device)
            logits = logits.index_copy(0, index, stage.apply(logits[index], values, chosen))
    return logits
