"""One `/score` request: texts or completions as jobs, and the engine's log-probabilities as scores of texts."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from topkapi.engine.request import Completed, ScoreJob, ScoreProgress
from topkapi.engine.scheduler import LEAST_COPIED
from topkapi.model.errors import DeadlineExceeded, EngineError
from topkapi.model.scoring import Scores, check_text, windows
from topkapi.service.calls import current_call
from topkapi.service.jobs import EngineWork, JobGroup
from topkapi.service.models import LoadedModel

IMPOSSIBLE = -9999.0
"""What stands for a log-probability of minus infinity, which JSON cannot hold (vLLM sends the same)."""

ScoringProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """Tokens to score from position `first` on; those before it are context only. `is_completion` if it is a pair's."""

    token_ids: list[int]
    first: int = 1
    is_completion: bool = False


@dataclass(frozen=True)
class TextScore:
    """The scores of one item. `nll` is in nats over `scored_tokens`; what needs a scored token is None without one."""

    tokens: int
    scored_tokens: int
    bytes: int
    nll: float
    nll_per_token: float | None
    nll_per_byte: float | None
    perplexity: float | None
    bits_per_byte: float | None
    greedy_match: bool


def item_of_pair(prompt: list[int], completion: list[int]) -> Item:
    """A completion scored after its prompt."""
    return Item(prompt + completion, len(prompt), is_completion=True)


def check_items(model: LoadedModel, items: Sequence[Item], window: int | None, stride: int | None) -> None:
    """Raise `InvalidRequest` for what the engine would refuse, before anything is computed."""
    for item in items:
        check_text(item.token_ids, model.checkpoint.config)
        windows(len(item.token_ids), model.checkpoint.config, window, stride)


class Scoring(EngineWork[tuple[int, int]]):
    """Scores items.

    What items have in common before their completions (the prompt of several choices) is read once. `timeout_s`
    counts from here, and waiting for room is part of it.
    """

    def __init__(
        self,
        model: LoadedModel,
        items: Sequence[Item],
        window: int | None = None,
        stride: int | None = None,
        top: int = 0,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        self.cached_tokens = 0
        self.deterministic = True
        self.model = model
        self._items = items
        self._found: dict[int, Scores] = {}
        self._timeout_s, self._given_by = timeout_s, "timeout_s"
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        call = current_call()
        if call is not None and call.deadline is not None and call.deadline < (self._deadline or math.inf):
            self._timeout_s, self._deadline, self._given_by = call.timeout_s, call.deadline, "X-Request-Timeout"
        jobs = [
            ScoreJob(item.token_ids, window, stride, top, deadline=self._deadline, priority=priority, first=item.first)
            for item in items
        ]
        self._group = JobGroup(model, jobs, _leaders(items))

    async def steps(self) -> AsyncIterator[tuple[int, int]]:
        """(tokens scored, tokens to score) of all items after each step, until all are done.

        Raises `DeadlineExceeded` where they are not in time, and `Cancelled`.
        """
        scored = [0] * len(self._items)
        total = sum(map(_count, self._items))
        done = 0
        async for number, event in self._group.events():
            if isinstance(event, ScoreProgress):
                done += event.scored - scored[number]
                scored[number] = event.scored
                yield done, total
            elif isinstance(event, Completed):
                if event.scores is None or len(event.scores.logprobs) != _count(self._items[number]):
                    if self._deadline is not None and time.monotonic() >= self._deadline:
                        given = f"the {self._timeout_s:g} s of {self._given_by}"
                        message = f"{done:,} of {total:,} tokens were scored within {given}"
                        hint = "give it more time, or send less at once"
                        raise DeadlineExceeded(message, field=self._given_by, hint=hint)
                    raise self.model.engine.cancellation()
                self._found[number] = event.scores
                self.cached_tokens += event.cached_tokens
                self.deterministic = self.deterministic and event.deterministic

    @property
    def scores(self) -> list[Scores]:
        """Of each item, in order, the log-probabilities of its tokens from its `first` on; once all are done."""
        return [self._found[number] for number in range(len(self._items))]


async def score_items(
    model: LoadedModel,
    items: Sequence[Item],
    window: int | None = None,
    stride: int | None = None,
    top: int = 0,
    progress: ScoringProgress | None = None,
) -> list[Scores]:
    """The log-probabilities of each item's tokens from its `first` on, in order.

    `progress(scored, total)` is told how many tokens of all items are done.
    """
    async with Scoring(model, items, window, stride, top) as scoring:
        async for scored, total in scoring.steps():
            if progress is not None:
                progress(scored, total)
        return scoring.scores


def _count(item: Item) -> int:
    return len(item.token_ids) - item.first


def _leaders(items: Sequence[Item]) -> dict[int, int]:
    """For each item whose prompt is that of an earlier one, that one's number.

    They would all read the prompt if they began together. Below a few tokens that costs less than waiting.
    """
    first: dict[tuple[int, ...], int] = {}
    leaders = {}
    for number, item in enumerate(items):
        if item.first > LEAST_COPIED:
            leader = first.setdefault(tuple(item.token_ids[: item.first]), number)
            if leader != number:
                leaders[number] = leader
    return leaders


def summarise(model: LoadedModel, item: Item, scores: Scores) -> TextScore:
    """Total, perplexity and bits per byte of an item.

    `bytes` are those of the text, or of the completion alone. Raises `EngineError` where the network gave no number.
    """
    logprobs = [finite(logprob) for logprob in scores.logprobs]
    nll = 0.0 - math.fsum(logprobs)
    own_tokens = item.token_ids[item.first :] if item.is_completion else item.token_ids
    size = sum(len(model.checkpoint.tokenizer.token_bytes(token_id)) for token_id in own_tokens)
    mean = nll / len(logprobs) if logprobs else None
    per_byte = nll / size if logprobs and size else None
    return TextScore(
        tokens=len(item.token_ids),
        scored_tokens=len(logprobs),
        bytes=size,
        nll=nll,
        nll_per_token=mean,
        nll_per_byte=per_byte,
        # Beyond this, exp overflows: the text is impossible under the network.
        perplexity=math.exp(mean) if mean is not None and mean < 700 else None,
        bits_per_byte=None if per_byte is None else per_byte / math.log(2),
        greedy_match=all(rank == 1 for rank in scores.ranks),
    )


@dataclass(frozen=True)
class Stretch:
    """Tokens `[start, end)` of a text, or of a completion, with their bytes. `nll` is in nats over the scored ones."""

    start: int
    end: int
    start_byte: int
    end_byte: int
    scored_tokens: int
    nll: float


def stretches(model: LoadedModel, item: Item, scores: Scores, count: int) -> list[Stretch]:
    """An item cut into `count` stretches of equally many tokens (one more or less), or one for each token."""
    sizes, known = _own_sizes(model, item), _own_logprobs(item, scores)
    count = min(count, len(sizes))
    found, at_byte = [], 0
    for number in range(count):
        start, end = len(sizes) * number // count, len(sizes) * (number + 1) // count
        logprobs = [finite(logprob) for logprob in known[start:end] if logprob is not None]
        end_byte = at_byte + sum(sizes[start:end])
        found.append(Stretch(start, end, at_byte, end_byte, len(logprobs), 0.0 - math.fsum(logprobs)))
        at_byte = end_byte
    return found


def most_surprising(model: LoadedModel, item: Item, scores: Scores, count: int) -> list[tuple[int, int]]:
    """The `count` least probable tokens of an item, the least probable first: their positions and first bytes."""
    known = _own_logprobs(item, scores)
    scored = (position for position, logprob in enumerate(known) if logprob is not None)
    found = heapq.nsmallest(count, scored, key=lambda position: (known[position], position))
    starts = [0, *accumulate(_own_sizes(model, item))] if found else []
    return [(position, starts[position]) for position in found]


def _own_sizes(model: LoadedModel, item: Item) -> list[int]:
    """Bytes of each token of a text, or of a completion alone."""
    size_of = cache(lambda token_id: len(model.checkpoint.tokenizer.token_bytes(token_id)))
    return [size_of(token_id) for token_id in item.token_ids[item.first if item.is_completion else 0 :]]


def _own_logprobs(item: Item, scores: Scores) -> list[float | None]:
    """The log-probability of each of these tokens; None for those that nothing precedes."""
    return list(scores.logprobs) if item.is_completion else [*[None] * item.first, *scores.logprobs]


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold. Raises `EngineError` for NaN."""
    if math.isnan(logprob):
        raise EngineError("the network produced NaN", hint="the checkpoint is damaged or overflows in its dtype")
    return max(logprob, IMPOSSIBLE)


Normalization = Literal["byte", "token", "none"]


def ranking(scores: Sequence[TextScore], normalization: Normalization) -> list[int]:
    """The choices from the likeliest to the least likely; of equals, the first one first.

    What is compared is the negative log-likelihood per byte, so that neither a long choice nor one of many tokens is
    at a disadvantage (lm-evaluation-harness: `acc_norm`), per token, or as it is (`acc`).
    """

    def cost(index: int) -> float:
        score = scores[index]
        size = {"byte": score.bytes, "token": score.scored_tokens, "none": 1}[normalization]
        return score.nll / max(size, 1)

    return sorted(range(len(scores)), key=cost)
