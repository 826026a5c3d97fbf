"""Log-probabilities of a text under a network, in strided windows where it is longer than the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from topkapi.model.cache import LOGIT_ROWS, PREFILL_CHUNK, SlotCache, Work, read, wanted_logits
from topkapi.model.config import ModelConfig
from topkapi.model.errors import InvalidRequest
from topkapi.model.transformer import Decoder
from topkapi.model.windows import window_sizes


@dataclass
class Scores:
    """Of each scored token (all but the first, if nothing else is said): natural log-probability, rank (1 is the most
    likely), entropy in nats, and the most likely alternatives as `(token id, log-probability)`, most likely first."""

    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats, summed."""
        return -sum(self.logprobs)


@dataclass(frozen=True)
class Window:
    """Tokens `[start, end)` are read; those from `first` on are scored (the ones before are context only)."""

    start: int
    first: int
    end: int


def windows(
    length: int, config: ModelConfig, window: int | None = None, stride: int | None = None, first: int = 1
) -> list[Window]:
    """Cut `length` tokens into windows so that each token from `first` on is scored exactly once.

    `window` (default: the context length) tokens are read at a time; each following window starts `stride` (default:
    half a window) further on, so a token has at least `window - stride` tokens of context once the text is longer.
    Where the windows lie does not depend on `first`; those that end before it are left out. Raises `InvalidRequest`
    for sizes that cannot work.
    """
    size, step = window_sizes(config.context_length, window, stride)
    result = []
    start, scored_to = 0, 1
    while scored_to < length:
        end = min(start + size, length)
        if end > first:
            result.append(Window(start, max(scored_to, first), end))
        start, scored_to = start + step, end
    return result


def check_text(token_ids: list[int], config: ModelConfig) -> None:
    """Raise `InvalidRequest` for what cannot be scored."""
    if not token_ids:
        raise InvalidRequest("there is nothing to score: the text is empty", field="text")
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < config.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"token id {wrong} is not in the vocabulary (0 to {config.vocab_size - 1})", field="token_ids"
        )


@torch.inference_mode()
def score_steps(
    model: Decoder,
    token_ids: list[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    top: int = 0,
    first: int = 1,
) -> Iterator[Scores]:
    """Score the tokens from `first` on in steps of at most one chunk of tokens, yielding the result so far after each.

    Every window is read from its start in chunks of fixed size, as a prompt is.
    """
    check_text(token_ids, model.config)
    scores = Scores()
    for part in windows(len(token_ids), model.config, window, stride, first):
        cache = SlotCache(model, capacity=part.end - part.start)
        for start in range(part.start, part.end, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, part.end)
            # State i predicts token i + 1.
            begin, last = max(start, part.first - 1), min(end, part.end - 1)
            work = Work(0, start - part.start, token_ids[start:end], wanted=max(0, end - begin))
            states = read(model, cache, [work])
            for at in range(begin, last, LOGIT_ROWS):
                until = min(at + LOGIT_ROWS, last)
                logits = wanted_logits(model, states[at - begin : until - begin])
                add_scores(scores, logits, token_ids[at + 1 : until + 1], top)
            yield scores


def score(
    model: Decoder,
    token_ids: list[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    top: int = 0,
    first: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Log-probability of each token from `first` on, given those before it (within its window).

    `progress(scored, total)` is called after each step. Raises `InvalidRequest` for an empty text, ids outside the
    vocabulary, or a window and stride that cannot work.
    """
    scores = Scores()
    for scores in score_steps(model, token_ids, window=window, stride=stride, top=top, first=first):
        if progress is not None:
            progress(len(scores.logprobs), len(token_ids) - first)
    return scores


def add_scores(scores: Scores, logits: torch.Tensor, targets: list[int], top: int) -> None:
    """Add what `logits [T, vocab_size]` say of the `targets` they predict."""
    logprobs = logits.double().log_softmax(dim=-1)
    own = logprobs.gather(-1, torch.tensor(targets, device=logits.device).unsqueeze(-1))
    scores.logprobs += own.squeeze(-1).tolist()
    scores.ranks += ((logprobs > own).sum(dim=-1) + 1).tolist()
    # A token ruled out (-inf) adds nothing to the entropy.
    scores.entropies += (-(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(dim=-1)).tolist()
    if top:
        values, ids = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        scores.tops += [list(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
