"""Anthropic's messages: `/v1/messages` with its stream events, and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from topkapi.model.conversation.tool_call_reader import Call, Event, Said
from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import Overloaded, TopkapiError
from topkapi.service.api.anthropic import schemas
from topkapi.service.api.anthropic.conversation import Reading, read
from topkapi.service.api.http.answering import answered
from topkapi.service.api.http.apart import apart, unless_disconnected
from topkapi.service.api.http.body import JSONRoute
from topkapi.service.api.http.dialect import Dialect, with_hint
from topkapi.service.api.http.errors import INTERNAL
from topkapi.service.api.http.streaming import STREAM, EventStream
from topkapi.service.api.openai.tools import Calling, naming
from topkapi.service.generation import Generation, Output, Plan, no_answer, plan
from topkapi.service.models import LoadedModel, Models

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 529: "overloaded_error"}  # fmt: skip


def _error(error: TopkapiError) -> tuple[int, dict[str, Any]]:
    # A wrong field is 400 in this dialect, and a full queue has a status of its own.
    status = 529 if isinstance(error, Overloaded) else 400 if error.status == 422 else error.status
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, {"type": "error", "error": {"type": kind, "message": with_hint(error)}}


ANTHROPIC = Dialect("anthropic", _error, prefixes=("/v1/messages",))

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.AnthropicError, "description": meaning}
    for status, meaning in {
        400: "The body is not valid JSON, or a field is wrong",
        404: "The checkpoint is not loaded",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        500: "A step of the engine failed",
        503: "The checkpoint is being unloaded",
        529: "The queue is full; wait Retry-After seconds",
    }.items()
}


def router(models: Models) -> APIRouter:
    """Anthropic's routes over the loaded checkpoints."""
    routes = APIRouter(route_class=JSONRoute, tags=["Anthropic"])

    @routes.post(
        "/v1/messages",
        summary="Anthropic: answer a conversation",
        responses={**ERRORS, 200: {"model": schemas.AnthropicMessage, "content": STREAM}},
        response_model=None,
    )
    async def messages(request: Request, body: schemas.AnthropicRequest) -> Response:
        asked, reading = await apart(request, _plan, models.get(body.model), body)
        generation = Generation(asked)
        answer = _Answer(generation, body, reading.calling)
        if body.stream:
            generation.start()
            return EventStream(generation, answer.events())
        async with generation:
            await unless_disconnected(request, generation.finish())
        return await answered(answer.message)

    @routes.post(
        "/v1/messages/count_tokens",
        summary="Anthropic: how many tokens a conversation has",
        responses={**ERRORS, 200: {"model": schemas.AnthropicCount}},
        response_model=None,
    )
    async def count_tokens(request: Request, body: schemas.AnthropicCountRequest) -> Response:
        reading = await apart(request, read, models.get(body.model), body)
        return JSONResponse({"input_tokens": len(reading.token_ids)})

    return routes


def _plan(model: LoadedModel, body: schemas.AnthropicRequest) -> tuple[Plan, Reading]:
    reading = read(model, body)
    given: dict[str, Any] = {
        "max_tokens": body.max_tokens,
        "stop_sequences": body.stop_sequences or None,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
    }
    if body.output_config is not None and body.output_config.format is not None:
        given["json_schema"] = body.output_config.format.schema_
    with translated(given) as parameters:
        if reading.calling is not None:
            parameters = reading.calling.added_to(parameters)
        with naming(reading.calling):
            return plan(model, [reading.token_ids], parameters, chat=True), reading


class _Answer:
    """The answer of one generation as a message, or as the events of a stream."""

    def __init__(self, generation: Generation, body: schemas.AnthropicRequest, calling: Calling | None) -> None:
        self._generation = generation
        self._body = body
        self._reader = None if calling is None else calling.reader()
        self._blocks = _Blocks()

    def message(self) -> dict[str, Any]:
        """The whole message."""
        (output,) = self._generation.outputs
        for _ in self._blocks.events([*self._feed(output.text), *self._flush()]):
            pass
        return self._envelope() | {"content": self._blocks.content()} | self._ending(output) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream, as they are sent."""
        generation = self._generation
        try:
            begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
            yield _event("message_start", {"message": self._envelope() | begun})
            yield _event("ping", {})
            async for delta in generation.deltas():
                for name, data in self._blocks.events(self._feed(delta.text)):
                    yield _event(name, data)
            (output,) = generation.outputs
            for name, data in [*self._blocks.events(self._flush()), *self._blocks.end()]:
                yield _event(name, data)
            yield _event("message_delta", {"delta": self._ending(output), "usage": self._usage()})
            yield _event("message_stop", {})
        except TopkapiError as error:
            yield _sent("error", _error(error)[1])
        except Exception:
            yield _sent("error", _error(INTERNAL)[1])
            raise

    def _feed(self, text: str) -> Iterable[Event]:
        if self._reader is not None:
            return self._reader.feed(text)
        return [Said(text)] if text else []

    def _flush(self) -> Iterable[Event]:
        return [] if self._reader is None else self._reader.flush()

    def _envelope(self) -> dict[str, Any]:
        name = self._generation.plan.model.name
        return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": name}

    def _ending(self, output: Output) -> dict[str, Any]:
        reason, sequence = "end_turn", None
        if output.finish_reason == "length":
            full = len(output.tokens) < self._body.max_tokens
            reason = "model_context_window_exceeded" if full else "max_tokens"
        elif output.finish_reason != "stop":
            raise no_answer(output)
        elif self._reader is not None and self._reader.calls:
            reason = "tool_use"
        elif isinstance(output.stop_reason, str) and output.stop_reason in (self._body.stop_sequences or ()):
            reason, sequence = "stop_sequence", output.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, int]:
        generation = self._generation
        return {
            "input_tokens": generation.prompt_tokens - generation.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": generation.cached_tokens,
            "output_tokens": generation.completion_tokens,
        }


class _Blocks:
    """What has been said and called so far as content blocks, each opened and closed by events of its own."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._written: list[str] = []
        self._open = False

    def events(self, said: Iterable[Event]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The stream's events for more of an answer."""
        for event in said:
            if isinstance(event, Call):
                identifier = f"toolu_{uuid.uuid4().hex[:24]}"
                yield from self._begin({"type": "tool_use", "id": identifier, "name": event.name, "input": {}})
                self._written[-1] = event.arguments
                delta = {"type": "input_json_delta", "partial_json": event.arguments}
            else:
                if not (self._open and self._blocks[-1]["type"] == "text"):
                    yield from self._begin({"type": "text", "text": ""})
                self._written[-1] += event.text
                delta = {"type": "text_delta", "text": event.text}
            yield "content_block_delta", {"index": len(self._blocks) - 1, "delta": delta}

    def end(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events that close the last block; an answer that says nothing has one without text."""
        if not self._blocks:
            yield from self._begin({"type": "text", "text": ""})
        if self._open:
            self._open = False
            yield "content_block_stop", {"index": len(self._blocks) - 1}

    def content(self) -> list[dict[str, Any]]:
        """The blocks with all that was written."""
        for _ in self.end():
            pass
        return [
            block | ({"text": text} if block["type"] == "text" else {"input": json.loads(text)})
            for block, text in zip(self._blocks, self._written, strict=True)
        ]

    def _begin(self, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._open:
            yield from self.end()
        self._blocks.append(block)
        self._written.append("")
        self._open = True
        yield "content_block_start", {"index": len(self._blocks) - 1, "content_block": block}


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return _sent(name, {"type": name, **data})


def _sent(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()
