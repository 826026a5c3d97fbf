"""Anthropic's messages: `/v1/messages` with its stream events, and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from topkapi.model.conversation.reasoning import Thought
from topkapi.model.conversation.tool_call_reader import Call, Said
from topkapi.model.conversation.tool_call_reader import Event as ToolCallEvent
from topkapi.model.decoding.aliases import translated
from topkapi.model.errors import InvalidRequest, Overloaded, TopkapiError
from topkapi.service.api.anthropic import schemas
from topkapi.service.api.anthropic.conversation import Reading, read
from topkapi.service.api.http.answering import Answer, Event, apart, respond
from topkapi.service.api.http.describing import STREAM, errors_of
from topkapi.service.api.http.dialect import Dialect, with_hint
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.openai.tools import naming
from topkapi.service.calls import current_call
from topkapi.service.generation import CompletionOutput, Delta, Generation, Plan, no_answer, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import reasoning_reader

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}  # fmt: skip


def _error(error: TopkapiError) -> tuple[int, dict[str, Any]]:
    # A wrong field is 400 in this dialect, and a full queue has a status of its own.
    status = 529 if isinstance(error, Overloaded) else 400 if error.status == 422 else error.status
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, {"type": "error", "error": {"type": kind, "message": with_hint(error)}}


NAME_HEADER = "request-id"
"""Where Anthropic's clients look for a request's name."""

ANTHROPIC = Dialect("anthropic", _error, prefixes=("/v1/messages",), error_event="error", name_header=NAME_HEADER)

ERRORS = errors_of(schemas.AnthropicError, 404, 408, 413, 415, 500, more={
    400: "The body is not valid JSON, or a field is wrong",
    503: "The checkpoint is being unloaded",
    529: "The queue is full; wait Retry-After seconds",
})  # fmt: skip


def router(models: Models) -> Routes:
    """Anthropic's routes over the loaded checkpoints."""
    routes = Routes(ERRORS, tags=["Anthropic"])

    @routes.answering("/v1/messages", "Anthropic: answer a conversation", schemas.AnthropicMessage, stream=STREAM)
    async def messages(request: Request, body: schemas.AnthropicRequest) -> Response:
        return _named(await respond(request, _Answer, models.get(body.model), body))

    @routes.answering(
        "/v1/messages/count_tokens", "Anthropic: how many tokens a conversation has", schemas.AnthropicCount
    )
    async def count_tokens(request: Request, body: schemas.AnthropicCountRequest) -> Response:
        reading = await apart(request, read, models.get(body.model), body)
        return _named(JSONResponse({"input_tokens": len(reading.token_ids)}))

    return routes


def _named(response: Response) -> Response:
    call = current_call()
    if call is not None:
        response.headers[NAME_HEADER] = call.identifier
    return response


def _plan(model: LoadedModel, body: schemas.AnthropicRequest) -> tuple[Plan, Reading]:
    reading = read(model, body)
    given = {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_k", "top_p")}
    given["stop_sequences"] = body.stop_sequences or None
    if body.output_config is not None and body.output_config.format is not None:
        given["json_schema"] = body.output_config.format.schema_
    formed = body.output_config is not None and body.output_config.format is not None
    if isinstance(body.thinking, schemas.AnthropicThinkingOn):
        if body.thinking.budget_tokens >= body.max_tokens:
            message = "thinking.budget_tokens must be below max_tokens, which counts what is thought, too"
            raise InvalidRequest(message, field="thinking.budget_tokens", hint="lower it, or raise max_tokens")
        # An answer of a given form, or one that must be a call, is not thought about at all.
        if not formed and not (reading.calling is not None and reading.calling.must):
            given["thinking_budget"] = body.thinking.budget_tokens
    with translated(given) as parameters:
        if reading.calling is not None:
            parameters = reading.calling.added_to(parameters)
        with naming(reading.calling):
            return plan(model, [reading.token_ids], parameters, chat=True), reading


class _Answer(Answer[Delta]):
    dialect = ANTHROPIC

    def __init__(self, model: LoadedModel, body: schemas.AnthropicRequest) -> None:
        plan, reading = _plan(model, body)
        self._generation, self._body = Generation(plan), body
        self._reader = None if reading.calling is None else reading.calling.reader()
        self._thoughts = reasoning_reader(model, plan.prompts[0])
        self._shown = getattr(body.thinking, "display", None) != "omitted"
        self._blocks = _Blocks()
        super().__init__(self._generation, stream=body.stream)

    def whole(self) -> dict[str, Any]:
        (output,) = self._generation.outputs
        for _ in self._blocks.events([*self._feed(output.text), *self._flush()]):
            pass
        return self._envelope() | {"content": self._blocks.content()} | self._ended(output) | {"usage": self._usage()}

    def opening(self) -> Iterator[Event]:
        begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
        yield _event("message_start", message=self._envelope() | begun)
        yield _event("ping")

    def told(self, step: Delta) -> Iterator[Event]:
        return self._blocks.events(self._feed(step.text))

    def ending(self) -> Iterator[Event]:
        (output,) = self._generation.outputs
        yield from self._blocks.events(self._flush())
        yield from self._blocks.end()
        yield _event("message_delta", delta=self._ended(output), usage=self._usage())
        yield _event("message_stop")

    def _feed(self, text: str) -> Iterator[ToolCallEvent | Thought]:
        if self._thoughts is None:
            yield from self._said(text)
        else:
            yield from self._apart(self._thoughts.feed(text))

    def _flush(self) -> Iterator[ToolCallEvent | Thought]:
        if self._thoughts is not None:
            yield from self._apart(self._thoughts.flush())
        if self._reader is not None:
            yield from self._reader.flush()

    def _apart(self, events: Iterable[Thought | Said]) -> Iterator[ToolCallEvent | Thought]:
        for event in events:
            if isinstance(event, Said):
                yield from self._said(event.text)
            elif self._shown:
                yield event

    def _said(self, text: str) -> Iterable[ToolCallEvent]:
        if self._reader is not None:
            return self._reader.feed(text)
        return [Said(text)] if text else []

    def _envelope(self) -> dict[str, Any]:
        name = self._generation.plan.model.name
        return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": name}

    def _ended(self, output: CompletionOutput) -> dict[str, Any]:
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


_UNSIGNED = {"thinking": {"signature": ""}}
"""Clients expect a signature of what was thought."""


class _Blocks:
    """What has been said and called so far as content blocks, each opened and closed by events of its own."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._written: list[str] = []
        self._open = False

    def events(self, said: Iterable[ToolCallEvent | Thought]) -> Iterator[Event]:
        """The stream's events for more of an answer."""
        for event in said:
            if isinstance(event, Call):
                identifier = f"toolu_{uuid.uuid4().hex[:24]}"
                yield from self._begin({"type": "tool_use", "id": identifier, "name": event.name, "input": {}})
                self._written[-1] = event.arguments
                delta = {"type": "input_json_delta", "partial_json": event.arguments}
            else:
                kind = "thinking" if isinstance(event, Thought) else "text"
                if not (self._open and self._blocks[-1]["type"] == kind):
                    yield from self._begin({"type": kind, kind: ""} | _UNSIGNED.get(kind, {}))
                self._written[-1] += event.text
                delta = {"type": f"{kind}_delta", kind: event.text}
            yield _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def end(self) -> Iterator[Event]:
        """The events that close the last block; an answer that says nothing has one without text."""
        if not self._blocks:
            yield from self._begin({"type": "text", "text": ""})
        if self._open:
            self._open = False
            yield _event("content_block_stop", index=len(self._blocks) - 1)

    def content(self) -> list[dict[str, Any]]:
        """The blocks with all that was written."""
        for _ in self.end():
            pass
        return [
            block | ({"input": json.loads(text)} if block["type"] == "tool_use" else {block["type"]: text})
            for block, text in zip(self._blocks, self._written, strict=True)
        ]

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        if self._open:
            yield from self.end()
        self._blocks.append(block)
        self._written.append("")
        self._open = True
        yield _event("content_block_start", index=len(self._blocks) - 1, content_block=block)


def _event(name: str, **data: Any) -> Event:
    return name, {"type": name, **data}
