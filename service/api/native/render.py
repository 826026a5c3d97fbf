"""Results as the JSON of the native routes."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict
from typing import Any

from topkapi.engine.request import Token
from topkapi.model.scoring import Scores
from topkapi.service.generation import CompletionOutput, Delta, Generation
from topkapi.service.models import LoadedModel
from topkapi.service.scoring import Item, TextScore, finite, most_surprising, stretches


def new_id(kind: str) -> str:
    """A fresh identifier for a response."""
    return f"{kind}-{uuid.uuid4().hex}"


def token_event(generation: Generation, delta: Delta) -> dict[str, Any]:
    """What a `token` event says: new text (which may be empty, or come without a token at the end) of one output."""
    output, token = delta.output, delta.token
    data: dict[str, Any] = {
        "index": output.index,
        "prompt_index": output.prompt_index,
        "text": delta.text,
        "token_ids": [] if token is None else [token.token_id],
    }
    if generation.parameters.logprobs is not None:
        data["logprobs"] = [] if token is None else [token_logprobs(generation.plan.model, token)]
    if generation.parameters.trace:
        data["trace"] = [] if token is None else [token_trace(generation.plan.model, token)]
    return data


def generate_response(generation: Generation, identifier: str, created: int) -> dict[str, Any]:
    """The whole answer of `/generate`, also the last event of a stream."""
    timings, tokens_per_s, latencies = generation.timings, generation.tokens_per_s, generation.latencies
    return {
        "id": identifier,
        "model": generation.plan.model.name,
        "created": created,
        "outputs": [_output(generation, output) for output in generation.outputs],
        "usage": usage(generation.prompt_tokens, generation.cached_tokens, generation.completion_tokens)
        | {"guessed_tokens": generation.guessed_tokens, "accepted_tokens": generation.accepted_tokens},
        "timings": {
            "queue_s": round(timings.queue_s, 6),
            "prefill_s": round(timings.prefill_s, 6),
            "decode_s": round(timings.decode_s, 6),
            "tokens_per_s": None if tokens_per_s is None else round(tokens_per_s, 3),
            "first_token_s": None if generation.first_token_s is None else round(generation.first_token_s, 6),
            "token_s": None if latencies is None else {name: round(s, 6) for name, s in asdict(latencies).items()},
        },
        "parameters": generation.parameters.as_dict(),
        "order": list(generation.order),
        "deterministic": generation.deterministic,
    }


def usage(prompt: int, cached: int = 0, completion: int = 0) -> dict[str, int]:
    """Token counts."""
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def token_logprobs(model: LoadedModel, token: Token) -> dict[str, Any]:
    """One generated token with its log-probabilities."""
    return piece(model, token.token_id) | {
        "logprob": None if token.logprob is None else finite(token.logprob),
        "raw_logprob": None if token.raw_logprob is None else finite(token.raw_logprob),
        "rank": token.rank,
        "top": [candidate(model, each.token_id, each.logprob) for each in token.top],
    }


def piece(model: LoadedModel, token_id: int) -> dict[str, Any]:
    """One token as id, text and bytes."""
    raw = model.checkpoint.tokenizer.token_bytes(token_id)
    return {"token_id": token_id, "text": raw.decode("utf-8", "replace"), "bytes": list(raw)}


def candidate(model: LoadedModel, token_id: int, logprob: float) -> dict[str, Any]:
    """A token that could have been chosen."""
    return piece(model, token_id) | {"logprob": finite(logprob)}


def token_trace(model: LoadedModel, token: Token) -> dict[str, Any]:
    """How one token was decided."""
    assert token.trace is not None
    trace = token.trace.as_dict()
    for other in (*trace["runners_up"], *trace["contenders"]):
        other |= piece(model, other["token_id"])
    for stage in trace["stages"]:
        stage["probabilities"] = list(stage["probabilities"])
    return {"token_id": token.token_id, "text": model.token_text(token.token_id), **trace}


def score_result(
    model: LoadedModel,
    item: Item,
    scores: Scores,
    score: TextScore,
    per_token: bool,
    top: int,
    segments: int = 0,
    surprising: int = 0,
) -> dict[str, Any]:
    """The scores of one text or completion, with its tokens, stretches and surprises if asked for."""
    result: dict[str, Any] = {
        "tokens": score.tokens,
        "scored_tokens": score.scored_tokens,
        "bytes": score.bytes,
        "nll": score.nll,
        "nll_per_token": score.nll_per_token,
        "nll_per_byte": score.nll_per_byte,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    if item.is_completion:
        result["greedy_match"] = score.greedy_match
    begin = item.first if item.is_completion else 0
    if per_token:
        positions = range(begin, score.tokens)
        # One by one as they are written: those of a book would fill the memory.
        result["per_token"] = (_scored(model, item, scores, position, top) for position in positions)
    if segments:
        result["segments"] = [asdict(each) for each in stretches(model, item, scores, segments)]
    if surprising:
        result["surprising"] = [
            _scored(model, item, scores, begin + position, top) | {"position": position, "start_byte": start}
            for position, start in most_surprising(model, item, scores, surprising)
        ]
    return result


def timestamp() -> int:
    """Seconds since 1970."""
    return int(time.time())


def _output(generation: Generation, output: CompletionOutput) -> dict[str, Any]:
    result: dict[str, Any] = {
        "index": output.index,
        "prompt_index": output.prompt_index,
        "text": output.text,
        "token_ids": [token.token_id for token in output.tokens],
        "finish_reason": output.finish_reason,
    }
    if output.stop_reason is not None:
        result["stop_reason"] = output.stop_reason
    if output.score is not None:
        result["score"] = output.score
    if generation.parameters.logprobs is not None:
        result["logprobs"] = [token_logprobs(generation.plan.model, token) for token in output.tokens]
    if generation.parameters.trace:
        result["trace"] = [token_trace(generation.plan.model, token) for token in output.tokens]
    return result


def _scored(model: LoadedModel, item: Item, scores: Scores, position: int, top: int) -> dict[str, Any]:
    known, at = position >= item.first, position - item.first
    result = piece(model, item.token_ids[position]) | {
        "logprob": finite(scores.logprobs[at]) if known else None,
        "rank": scores.ranks[at] if known else None,
        "entropy": scores.entropies[at] if known else None,
    }
    if top:
        tops = scores.tops[at] if known else []
        result["top"] = [candidate(model, token_id, logprob) for token_id, logprob in tops]
    return result
