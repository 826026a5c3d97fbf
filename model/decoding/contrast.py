"""Stages that score tokens by the difference between two sets of logits: with and without a prompt, late and early."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from topkapi.model.decoding.stage import NOT_CHOSEN, Candidates, Row, Values, stage
from topkapi.model.errors import EngineError, InvalidRequest

# DoLa looks only at tokens this fraction as likely as the likeliest (Chuang et al. 2023, section 2.3).
RELATIVE_TOP = 0.1


@stage()
def guidance(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Scores moved away from those after the negative prompt."""
    guides = [row.guide for row in rows]
    if any(guide is None for guide in guides):
        raise EngineError("guidance needs the logits after the negative prompt, and nobody computed them")
    logits = candidates.logits
    wanted = logits.float().log_softmax(dim=-1)
    avoided = torch.stack([guide for guide in guides if guide is not None]).to(logits.device).log_softmax(dim=-1)
    scale = values["guidance_scale"].float().to(logits.device).unsqueeze(-1)
    # A token that either prompt rules out has no finite difference; it stays ruled out.
    moved = (avoided + scale * (wanted - avoided)).masked_fill(
        (wanted == NOT_CHOSEN) | (avoided == NOT_CHOSEN), NOT_CHOSEN
    )
    return candidates.changed(moved)


@stage()
def dola(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Scores by how far the last layer is above the earlier one that differs most from it."""
    parts = []
    for logits, row in zip(candidates.logits, rows, strict=True):
        if row.early is None:
            raise EngineError("DoLa needs the logits of earlier layers, and nobody computed them")
        parts.append(contrasted(logits, row.early.to(logits.device)))
    return candidates.changed(torch.stack(parts))


def contrasted(late: Tensor, early: Tensor) -> Tensor:
    """`late [V]` against the layer of `early [J, V]` with the largest Jensen-Shannon divergence: scores `[V]`.

    Tokens less than a tenth as likely as the likeliest get -inf (Chuang et al. 2023, equations 2 to 5).
    """
    last, earlier = late.float().log_softmax(dim=-1), early.float().log_softmax(dim=-1)
    mean = torch.logaddexp(last, earlier) - math.log(2)
    divergence = _divergence(last, mean) + _divergence(earlier, mean)
    chosen = earlier[int(divergence.argmax())]
    return (last - chosen).masked_fill(last < last.amax() + math.log(RELATIVE_TOP), NOT_CHOSEN)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Twice the Kullback-Leibler part of log-probabilities `first` from `second`, `[J]`."""
    return (first.exp() * (first - second)).nan_to_num(nan=0.0).sum(dim=-1)


def exit_layers(wanted: str | Sequence[int], layers: int, tied: bool) -> tuple[int, ...]:
    """The layers that DoLa compares with, of a network of so many `layers`: 0 is the embedding.

    `low` and `high` are every second layer of that half (at most the 20 lowest or highest); with a tied output matrix
    the embedding and the first layer are left out, for they mostly repeat the input. Raises `InvalidRequest`.
    """
    if not isinstance(wanted, str):
        wrong = next((layer for layer in wanted if not 0 <= layer < layers), None)
        if wrong is not None:
            raise InvalidRequest(
                f"dola_layers names layer {wrong}, but the layers below the last are 0 to {layers - 1}",
                field="dola_layers",
                hint="name earlier layers, or say low or high",
            )
        return tuple(wanted)
    first = 0 if not tied or layers < 2 else min(2, layers - 1)
    middle = layers // 2
    if wanted == "low":
        found = range(first, min(middle, 20), 2)
    else:
        found = range(max(middle, layers - 20, first), layers, 2)
    return tuple(found) or (first,)
