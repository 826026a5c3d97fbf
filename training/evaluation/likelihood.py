"""Log-likelihoods of many token sequences at once: what several begin with is read once, and like lengths together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topkapi.model.attention import causal_attention, masked_attention
from topkapi.model.transformer import Attend, Decoder

# Tokens that go through the network at once: enough to keep the matrix products busy, few enough for the caches.
BATCH_TOKENS = 4096
# Logits held at once, in numbers: 32 MB of float32.
LOGITS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Scored:
    """A sequence of which the tokens from `first` (at least 1) on are scored."""

    token_ids: Sequence[int]
    first: int = 1


@dataclass(frozen=True)
class Likelihood:
    """Of each scored token its natural log-probability; `greedy`: whether each was the most likely one."""

    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of all scored tokens together."""
        return sum(self.logprobs)


class _Packed:
    """Sequences side by side: the tokens all begin with once, then what follows in each. No last token: it predicts
    nothing. Each part sees the common one and itself, which is told by `ends` of the parts."""

    def __init__(self, group: Sequence[Scored]) -> None:
        texts = [scored.token_ids for scored in group]
        shortest = min(map(len, texts))
        common = next(
            (at for at in range(shortest) if any(text[at] != texts[0][at] for text in texts[1:])),
            shortest,
        )
        # A common part that is a whole sequence need not read that one's last token.
        common = min(common, max(map(len, texts)) - 1)
        self.token_ids = list(texts[0][:common])
        self.positions = list(range(common))
        self.common = common
        self.branches: list[tuple[int, int]] = []
        # Of each sequence, where the state is that predicts each scored token.
        self.places: list[list[int]] = []
        for scored in group:
            start = len(self.token_ids)
            rest = scored.token_ids[common:-1]
            self.token_ids += rest
            self.positions += range(common, common + len(rest))
            self.branches.append((start, start + len(rest)))
            before = range(scored.first - 1, len(scored.token_ids) - 1)
            self.places.append([at if at < common else start + at - common for at in before])

    def sees(self, length: int) -> Tensor:
        """`[length, length]`: whether a token (row) sees another."""
        mask = torch.ones(length, length, dtype=torch.bool).tril_()
        for start, end in self.branches:
            mask[start:end, self.common : start] = False
        return mask

    @property
    def plain(self) -> bool:
        """Whether a causal mask says it all."""
        return sum(start < end for start, end in self.branches) <= 1


@torch.inference_mode()
def log_likelihoods(
    model: Decoder,
    groups: Sequence[Sequence[Scored]],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Likelihood]]:
    """The likelihood of each sequence of each group; the sequences of a group may begin alike.

    Every sequence must fit: at most one token longer than the context, for the last one is not read.
    `progress(groups done, groups)` is called after each batch.
    """
    packed = [_Packed(group) for group in groups]
    results: list[list[Likelihood]] = [[] for _ in groups]
    done = 0
    for batch in _batches(packed):
        logprobs, greedy = _score(model, [packed[index] for index in batch], [groups[index] for index in batch])
        at = 0
        for index in batch:
            for places in packed[index].places:
                part = slice(at, at + len(places))
                results[index].append(Likelihood(logprobs[part], all(greedy[part])))
                at += len(places)
        done += len(batch)
        if progress is not None:
            progress(done, len(groups))
    return results


def _batches(packed: Sequence[_Packed]) -> Iterator[list[int]]:
    """Numbers of groups of about the same length, the longest first."""
    order = sorted(range(len(packed)), key=lambda index: -len(packed[index].token_ids))
    start = 0
    while start < len(order):
        longest = max(1, len(packed[order[start]].token_ids))
        end = start + max(1, BATCH_TOKENS // longest)
        yield order[start:end]
        start = end


def _score(
    model: Decoder, batch: Sequence[_Packed], groups: Sequence[Sequence[Scored]]
) -> tuple[list[float], list[bool]]:
    """Log-probability of every scored token of the batch, in order, and whether it was the most likely one."""
    length = max(1, *(len(one.token_ids) for one in batch))
    tokens = torch.zeros(len(batch), length, dtype=torch.int64)
    positions = torch.zeros(len(batch), length, dtype=torch.int64)
    for row, one in enumerate(batch):
        tokens[row, : len(one.token_ids)] = torch.tensor(one.token_ids, dtype=torch.int64)
        positions[row, : len(one.positions)] = torch.tensor(one.positions, dtype=torch.int64)
    attend: Attend = causal_attention
    if not all(one.plain for one in batch):
        sees = torch.stack([one.sees(length) for one in batch]).unsqueeze(1)
        attend = _Masked(sees.to(model.device), positions.to(model.device))
    hidden = model.hidden(tokens.to(model.device), positions.to(model.device), attend).flatten(0, 1)

    places = [row * length + place for row, one in enumerate(batch) for states in one.places for place in states]
    targets = [token_id for group in groups for scored in group for token_id in scored.token_ids[scored.first :]]
    # A state predicts a token of each sequence that shares it; its logits are computed once.
    states, states_of = torch.unique(torch.tensor(places), return_inverse=True)
    order = states_of.argsort(stable=True)
    states_of, wanted = states_of[order], torch.tensor(targets)[order]
    logprobs, greedy = torch.empty(len(order), dtype=torch.float64), torch.empty(len(order), dtype=torch.bool)
    step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(states), step):
        logits = model.logits(hidden[states[start : start + step].to(hidden.device)])
        first, last = torch.searchsorted(states_of, torch.tensor([start, start + step])).tolist()
        rows, own = (each[first:last].to(logits.device) for each in (states_of - start, wanted))
        found = logits[rows, own] - logits.logsumexp(-1)[rows]
        logprobs[order[first:last]] = found.double().cpu()
        greedy[order[first:last]] = (logits.argmax(-1)[rows] == own).cpu()
    return logprobs.tolist(), greedy.tolist()


class _Masked:
    """Attention under `mask [B, 1, T, T]`: whether a token (row) sees another; `positions [B, T]` say which of them a
    window leaves."""

    def __init__(self, mask: Tensor, positions: Tensor) -> None:
        self.mask, self.positions = mask, positions
        self._within: dict[int | None, Tensor] = {None: mask}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, softcap: float | None = None
    ) -> Tensor:
        if window is not None and window not in self._within:
            near = self.positions.unsqueeze(1) > self.positions.unsqueeze(2) - window
            self._within[window] = self.mask & near.unsqueeze(1)
        return masked_attention(q, k, v, self._within[window], softcap)
