"""From what `/generate` is asked to the engine's work, and from that to what it answers.

Nothing here knows how a request came in: the routes call it with bodies of HTTP, the Python API with its callers'
keywords.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict
from typing import Any

from topkapi.engine.request import Token
from topkapi.service.api.native import schemas
from topkapi.service.generation import CompletionOutput, Delta, Generation, plan
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import checked_ids, conversation_tokens, prompt_tokens, require_one
from topkapi.service.scoring import finite


def generation_of(model: LoadedModel, body: schemas.GenerateFields) -> Generation:
    """The work that `body` asks for, checked, and not yet begun. Takes its time: not for an event loop.

    Raises `InvalidRequest` naming the field at fault.
    """
    kind = require_one(schemas.given(body, "prompt", "messages"), "prompt and messages")
    if kind == "messages":
        prompts = [conversation_tokens(model, [message.model_dump() for message in body.messages or []])]
    else:
        prompts = prompt_tokens(model, body.prompt)
    answered = checked_ids(model, body.answer_prefix, "answer_prefix") if body.answer_prefix else []
    planned = plan(model, prompts, body.parameters(), chat=kind == "messages", answered=answered)
    return Generation(planned, body.priority, progress=body.progress)


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
