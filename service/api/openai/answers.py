"""What OpenAI's answers have in common: plans, ends, counts, and streams of chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.model.scoring import Scores
from topkapi.service.api.http.answering import event_data
from topkapi.service.api.http.errors import INTERNAL
from topkapi.service.api.openai.errors import render
from topkapi.service.api.openai.fields import CommonFields
from topkapi.service.generation import Generation, Output, Plan, no_answer, plan
from topkapi.service.models import LoadedModel
from topkapi.service.scoring import Item, Scoring
from topkapi.service.version import VERSION

FINGERPRINT = f"topkapi-{VERSION}"
DONE = b"data: [DONE]\n\n"


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


def planned(model: LoadedModel, prompts: Sequence[list[int]], given: Mapping[str, Any], source: str = "prompt") -> Plan:
    """A checked request of parameters under any of their names, and of prompts made from the field `source`: unless
    that is `prompt`, they are conversations.

    Raises `InvalidRequest` in those names.
    """
    try:
        with translated(given) as parameters:
            return plan(model, prompts, parameters, chat=source != "prompt")
    except InvalidRequest as error:
        if error.field == "prompt":
            error.field = source
        raise


def started(body: CommonFields, plan: Plan) -> Generation:
    """The generation of a plan, not yet started."""
    return Generation(plan, priority=_priority(body))


async def scored(body: CommonFields, model: LoadedModel, prompts: Sequence[list[int]], top: int) -> list[Scores]:
    """The log-probabilities of prompts, with so many most likely tokens at each place."""
    async with Scoring(model, [Item(token_ids) for token_ids in prompts], top=top, priority=_priority(body)) as scoring:
        return await scoring.finish()


def _priority(body: CommonFields) -> int:
    """vLLM's priorities count downwards, the engine's upwards."""
    return -(body.priority or 0)


def finish_reason(output: Output) -> str:
    """Why an output ended, in OpenAI's words. Raises `EngineError` for one that was broken off."""
    if output.finish_reason in ("cancelled", "error"):
        raise no_answer(output)
    return "stop" if output.finish_reason == "stop" else "length"


def stop_reason(model: LoadedModel, output: Output) -> str | int | None:
    """As in vLLM: the stop text or stop token that ended an output, nothing for one that ended by itself."""
    reason = output.stop_reason
    return None if reason in model.checkpoint.config.end_token_ids else reason


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts of a generation so far."""
    return counts(generation.prompt_tokens, generation.completion_tokens, generation.cached_tokens)


def counts(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def reproducible(generation: Generation) -> dict[str, Any]:
    """What it takes to get the same answer again: the seed, drawn or given, and whether it is enough."""
    return {
        "system_fingerprint": FINGERPRINT,
        "seed": generation.parameters.seed,
        "deterministic": generation.deterministic,
    }


async def data_event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event. JSON escapes line breaks, so the data is always a single line."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {await event_data(data)}\n\n".encode()


async def chunk_events(chunks: AsyncIterator[dict[str, Any]], done: bool = True) -> AsyncIterator[bytes]:
    """Chunks as events, up to `[DONE]` unless it is not wanted; an error in mid-stream is the last event instead."""
    try:
        async for chunk in chunks:
            yield await data_event(chunk)
        if done:
            yield DONE
    except TopkapiError as error:
        yield await data_event(render(error)[1])
    except Exception:
        # The response has begun, so the error handler can't answer any more.
        yield await data_event(render(INTERNAL)[1])
        raise
