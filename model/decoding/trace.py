"""Why each token was chosen: what every stage left, how likely the token was before and after, and by what noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from topkapi.model.decoding.noise import gumbel_of_keys, row_keys
from topkapi.model.decoding.stage import NOT_CHOSEN, Candidates, Row

RUNNERS_UP = 5
"""How many other tokens a trace names, or more where more log-probabilities are asked for."""


@dataclass(frozen=True)
class StageTrace:
    """What one stage did: candidates left, probability removed (of the distribution before it), entropy after it.

    `probabilities` are those of the trace's contenders after it, 0 for what is ruled out.
    """

    stage: str
    kept: int
    cut: float
    entropy: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class RunnerUp:
    """Another token that could have been chosen, with its probability before and after the stages."""

    token_id: int
    raw_probability: float
    probability: float


@dataclass(frozen=True)
class Contender:
    """A token that is followed through the stages, with the network's own probability of it."""

    token_id: int
    raw_probability: float


@dataclass(frozen=True)
class TokenTrace:
    """The decision for one token. Entropies are in nats; `rank` is 1 for the network's most likely token.

    `how` is `searched` in a beam or contrastive search, `greedy` at temperature 0, `forced` where one candidate was
    left, else `sampled`; `noise` is the Gumbel noise that was added to the chosen token's logit (None unless sampled).
    `runners_up` are the likeliest others. `contenders` are the chosen token and those that were likeliest before the
    stages or after them, by the network's own probability. `guessed` says that the token was read ahead and turned out
    right.
    """

    how: Literal["searched", "sampled", "greedy", "forced"]
    candidates: int
    entropy: float
    stages: tuple[StageTrace, ...]
    rank: int
    raw_probability: float
    probability: float
    noise: float | None
    runners_up: tuple[RunnerUp, ...]
    contenders: tuple[Contender, ...]
    guessed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


class Tracer:
    """Watches the rows of one group that asked for a trace pass their stages."""

    def __init__(self, candidates: Candidates, rows: Sequence[Row]) -> None:
        self._rows = [at for at, row in enumerate(rows) if row.parameters.trace]
        self._all = rows
        self._raw = self._last = self._snapshot(candidates)
        self._stages: list[list[StageTrace]] = [[] for _ in self._rows]
        # After each stage, for the contenders, who are known at the end: in half the width, for there may be many rows.
        self._seen: list[list[Tensor]] = [[] for _ in self._rows]

    def observe(self, stage: str, after: Candidates) -> None:
        """Told of each stage in order, with what it left."""
        now = self._snapshot(after)
        for place, (before, left) in enumerate(zip(self._last, now, strict=True)):
            cut = float(before.exp()[left == NOT_CHOSEN].sum())
            kept = int((left > NOT_CHOSEN).sum())
            self._stages[place].append(StageTrace(stage, kept, cut, _entropy(left), ()))
            self._seen[place].append(left.float())
        self._last = now

    def traces(self, token_ids: Sequence[int]) -> dict[int, TokenTrace]:
        """The trace of each watched row by its place in the group, once its token is chosen."""
        noise = gumbel_of_keys(row_keys(self._all), torch.tensor(token_ids).unsqueeze(-1)).squeeze(-1).tolist()
        return {at: self._trace(place, self._all[at], token_ids[at], noise[at]) for place, at in enumerate(self._rows)}

    def _trace(self, place: int, row: Row, token_id: int, noise: float) -> TokenTrace:
        raw, final = self._raw[place], self._last[place]
        left = int((final > NOT_CHOSEN).sum())
        how = _how(row, left)
        count = max(RUNNERS_UP, row.parameters.logprobs or 0)
        order = final.topk(min(count + 1, left)).indices.tolist()
        others = [other for other in order if other != token_id][:count]
        possible = int((raw > NOT_CHOSEN).sum())
        likeliest = raw.topk(min(count, possible)).indices.tolist()
        contenders = sorted({*likeliest, *others, token_id}, key=lambda each: (-float(raw[each]), each))
        return TokenTrace(
            how=how,
            candidates=possible,
            entropy=_entropy(raw),
            stages=tuple(
                replace(stage, probabilities=tuple(after[contenders].double().exp().tolist()))
                for stage, after in zip(self._stages[place], self._seen[place], strict=True)
            ),
            rank=int((raw > raw[token_id]).sum()) + 1,
            raw_probability=float(raw[token_id].exp()),
            probability=1.0 if how == "greedy" else float(final[token_id].exp()),
            noise=noise if how == "sampled" else None,
            runners_up=tuple(RunnerUp(other, float(raw[other].exp()), float(final[other].exp())) for other in others),
            contenders=tuple(Contender(each, float(raw[each].exp())) for each in contenders),
        )

    def _snapshot(self, candidates: Candidates) -> list[Tensor]:
        """Log-probabilities over the whole vocabulary, float64 `[V]` of each watched row."""
        whole = candidates.dense()
        return [whole[at].cpu().double().log_softmax(dim=-1) for at in self._rows]


def _how(row: Row, left: int) -> Literal["searched", "sampled", "greedy", "forced"]:
    if row.searching:
        return "searched"
    return "greedy" if row.greedy else "forced" if left == 1 else "sampled"


def _entropy(log_probabilities: Tensor) -> float:
    possible = log_probabilities[log_probabilities > NOT_CHOSEN]
    return float(-(possible.exp() * possible).sum())
