"""Drawing a token: the largest sum of logit and noise, found without giving every token its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from topkapi.model.decoding.candidates import LOWEST, Candidates
from topkapi.model.decoding.noise import gumbel_of_keys, loud_from, loud_tokens, row_keys
from topkapi.model.decoding.rows import Row

# Of more tokens than these few, only those whose noise or whose logit stands out are given noise.
FEW = 256
LOUD = 5.5
MARGIN = 2.5
SAMPLE = 16


def draw(parts: Sequence[Candidates], rows: Sequence[Row]) -> list[int]:
    """The tokens of the rows of several sets of candidates, in order: argmax of logit and noise, in float64.

    A token with neither noise above `LOUD` nor a logit above `reach - LOUD` cannot have a sum above `reach`. So where
    the best sum of the others is above it, it is the best of all; in the rare row where it is not, all tokens are
    given their noise.
    """
    keys, finalists, reaches = row_keys(rows), [], []
    origin: list[tuple[Candidates, int]] = []
    for part in parts:
        own = keys[len(origin) : len(origin) + len(part)]
        if part.ids is not None and part.logits.shape[-1] <= FEW:
            reach = torch.full((len(own),), -math.inf, dtype=torch.float64)
            finalists.append(part)
        elif part.scan is not None:
            reach = part.log_total - MARGIN
            floors = (reach - LOUD).numpy().astype(np.float32)
            found = part.scan.outstanding(floors, own.numpy(), loud_from(LOUD))
            finalists.append(part.found(found))
        elif not part.on_cpu:
            reach = torch.full((len(own),), -math.inf, dtype=torch.float64)
            finalists.append(_winners(part, own))
        else:
            reach = _reach(part)
            token_ids = None if part.ids is None else part.token_ids()
            loud = loud_tokens(own, part.vocab_size, token_ids, LOUD)
            finalists.append(part.outstanding(loud, (reach - LOUD).tolist()))
        reaches.append(reach)
        origin += [(part, row) for row in range(len(own))]
    chosen, sums = _loudest(Candidates.together(finalists), keys)
    # A hair's breadth, for logits were compared in float32.
    for at in (sums <= torch.cat(reaches) + 1e-3).nonzero().view(-1).tolist():
        part, row = origin[at]
        chosen[at] = _loudest(part.row(row).at_least(torch.tensor([LOWEST])), keys[at : at + 1])[0]
    result: list[int] = chosen.tolist()
    return result


def _reach(candidates: Candidates) -> Tensor:
    """What the sum of the winner of each row exceeds nearly always, `[B]` float64.

    It lies a little below the log of the sum of the exponentiated logits, here guessed from every sixteenth token;
    a bad guess costs time and never changes the outcome.
    """
    best = candidates.best.numpy()
    below = np.minimum(candidates.host()[:, ::SAMPLE] - best[:, None], -3.0)
    body = np.exp(below, out=below).sum(axis=-1, dtype=np.float64)
    return torch.from_numpy(best + np.log1p(SAMPLE * body) - MARGIN)


def _loudest(candidates: Candidates, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Token and sum of logit and noise of the winner of each row of a truncated set."""
    assert candidates.ids is not None
    sums = candidates.logits.double() + gumbel_of_keys(keys, candidates.ids)
    best, column = sums.max(dim=-1)
    return candidates.ids.gather(-1, column.unsqueeze(-1)).squeeze(-1), best


def _winners(candidates: Candidates, keys: Tensor) -> Candidates:
    """The winners of whole vocabularies on an accelerator, where noise for all of them costs nothing."""
    logits = candidates.logits
    noise = gumbel_of_keys(keys.to(logits.device), torch.arange(logits.shape[-1], device=logits.device))
    column = (logits.double() + noise).argmax(dim=-1, keepdim=True)
    return Candidates(logits.gather(-1, column).cpu(), candidates.vocab_size, column.cpu())
