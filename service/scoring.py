"""One `/score` request: texts or completions as jobs, and the engine's log-probabilities as scores of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.errors import EngineError, InvalidRequest
from model.scoring import Scores, check_text, windows
from service.engine.request import Completed, ScoreJob, ScoreProgress
from service.jobs import JobGroup
from service.models import LoadedModel

IMPOSSIBLE = -9999.0
"""What stands for a log-probability of minus infinity, which JSON cannot hold (vLLM sends the same)."""

Progress = Callable[[int, int], None]


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


async def score_items(
    model: LoadedModel,
    items: Sequence[Item],
    window: int | None = None,
    stride: int | None = None,
    top: int = 0,
    progress: Progress | None = None,
) -> list[Scores]:
    """The log-probabilities of each item's tokens but the first, in order.

    `progress(scored, total)` is told how many tokens of all items are done.
    """
    jobs = [ScoreJob(item.token_ids, window, stride, top) for item in items]
    found: dict[int, Scores] = {}
    scored = [0] * len(items)
    total = sum(len(item.token_ids) - 1 for item in items)
    async with JobGroup(model, jobs) as group:
        async for number, event in group.events():
            if isinstance(event, ScoreProgress) and progress is not None:
                scored[number] = event.scored
                progress(sum(scored), total)
            elif isinstance(event, Completed):
                if event.scores is None:
                    raise EngineError("scoring was cancelled: the server is stopping", hint="try again in a moment")
                found[number] = event.scores
    return [found[number] for number in range(len(items))]


def summarise(model: LoadedModel, item: Item, scores: Scores) -> TextScore:
    """Total, perplexity and bits per byte of an item.

    `bytes` are those of the text, or of the completion alone. Raises `EngineError` where the network gave no number.
    """
    logprobs = [finite(logprob) for logprob in scores.logprobs[item.first - 1 :]]
    nll = 0.0 - math.fsum(logprobs)
    own_tokens = item.token_ids[item.first :] if item.is_completion else item.token_ids
    size = sum(len(model.checkpoint.tokenizer.token_bytes(token_id)) for token_id in own_tokens)
    mean = nll / len(logprobs) if logprobs else None
    return TextScore(
        tokens=len(item.token_ids),
        scored_tokens=len(logprobs),
        bytes=size,
        nll=nll,
        # Beyond this, exp overflows: the text is impossible under the network.
        perplexity=math.exp(mean) if mean is not None and mean < 700 else None,
        bits_per_byte=nll / math.log(2) / size if logprobs and size else None,
        greedy_match=all(rank == 1 for rank in scores.ranks[item.first - 1 :]),
    )


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold. Raises `EngineError` for NaN."""
    if math.isnan(logprob):
        raise EngineError("the network produced NaN", hint="the checkpoint is damaged or overflows in its dtype")
    return max(logprob, IMPOSSIBLE)


def best_choice(scores: Sequence[TextScore]) -> int:
    """The choice with the lowest negative log-likelihood per byte; the first of equals.

    Per byte, so that neither a long choice nor one of many tokens is at a disadvantage (lm-evaluation-harness calls
    the same ranking `acc_norm`).
    """
    return min(range(len(scores)), key=lambda index: scores[index].nll / max(scores[index].bytes, 1))


def require_one(given: Sequence[str], allowed: str) -> str:
    """The one field of `given`. Raises `InvalidRequest` where there are none or several."""
    if len(given) == 1:
        return given[0]
    if not given:
        raise InvalidRequest(f"send one of {allowed}")
    raise InvalidRequest(f"{' and '.join(given)} exclude each other", field=given[1], hint=f"send one of {allowed}")
