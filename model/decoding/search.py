"""Searching for an answer instead of drawing one: what beam search and contrastive search compute at each token.

Beam search as transformers runs it, groups as in Vijayakumar et al. 2016, contrastive search as in Su et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topkapi.model.decoding.choosing import process
from topkapi.model.decoding.stage import NOT_CHOSEN, Row


@dataclass(frozen=True)
class Extension:
    """Beam number `beam` goes on with `token_id`; `score` is the sum of its log-probabilities then."""

    beam: int
    token_id: int
    score: float


def extensions(
    logits: Tensor, rows: Sequence[Row], scores: Sequence[float], count: int, penalties: Mapping[int, float]
) -> list[Extension]:
    """The up to `count` best ways in which beams with `scores [B]` and `logits [B, V]` can go on, best first.

    The network's log-probabilities pass the decoding stages, less the `penalties` of single tokens, and are not
    normalised again, as in transformers: what a constraint leaves is ranked by what the network thinks of it.
    """
    gains = process(logits.float().log_softmax(dim=-1), rows).double().cpu()
    for token_id, penalty in penalties.items():
        gains[:, token_id] -= penalty
    sums = (gains + torch.tensor(scores, dtype=torch.float64).unsqueeze(-1)).flatten()
    values, places = sums.topk(min(count, len(sums)))
    possible = values > NOT_CHOSEN
    found = zip(places[possible].tolist(), values[possible].tolist(), strict=True)
    return [Extension(place // logits.shape[-1], place % logits.shape[-1], score) for place, score in found]


def likeliest(logits: Tensor, row: Row, count: int) -> tuple[list[int], Tensor]:
    """The up to `count` likeliest tokens after all decoding stages and their probabilities `[count]` float64."""
    probabilities = process(logits, [row])[0].double().softmax(dim=-1).cpu()
    values, token_ids = probabilities.topk(min(count, len(probabilities)))
    possible = values > 0
    return token_ids[possible].tolist(), values[possible]


def least_alike(probabilities: Tensor, states: Tensor, context: Tensor, alpha: float) -> int:
    """Which candidate has the best (1 - alpha) * probability - alpha * likeness (Su et al. 2022, equation 5).

    `probabilities [K]`, final states of the candidates `states [K, C]` and of the text so far `context [N, C]`; the
    likeness is the largest cosine with a state of the text.
    """
    likeness = (unit(states) @ unit(context).T).amax(dim=-1).double().cpu()
    return int(((1 - alpha) * probabilities - alpha * likeness).argmax())


def unit(states: Tensor) -> Tensor:
    """`states [N, C]` scaled to length 1."""
    return torch.nn.functional.normalize(states.float(), dim=-1)
