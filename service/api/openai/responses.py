"""`POST /v1/responses`: the part of OpenAI's responses that keeps no state. Text in, text out, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Discriminator, Field

from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.service.api.http.answering import answered
from topkapi.service.api.http.apart import apart, unless_disconnected
from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.errors import INTERNAL, InapplicableField
from topkapi.service.api.http.harmless import Only
from topkapi.service.api.http.streaming import STREAM, EventStream
from topkapi.service.api.http.template_variables import template_variables
from topkapi.service.api.native import render
from topkapi.service.api.openai import answers
from topkapi.service.api.openai.conversation import ChatMessage, Parts, conversation, encoded
from topkapi.service.api.openai.errors import ERRORS
from topkapi.service.api.openai.errors import render as render_error
from topkapi.service.api.openai.fields import CommonFields, StreamOptions, body, with_default
from topkapi.service.api.openai.formats import FlatFormat, TextFormat, as_parameters
from topkapi.service.generation import Generation, Output, Plan
from topkapi.service.limits import MOST_MESSAGES
from topkapi.service.models import LoadedModel, Models

NOT_APART = "what a checkpoint thinks is part of its answer"


class InputMessage(Strict):
    """One item of the input: a turn of the conversation.

    `id`, `status` and `phase` of earlier answers are not looked at.
    """

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts
    id: str | None = None
    status: str | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class TextOptions(Strict):
    """The form of the answer."""

    format: Annotated[FlatFormat, Discriminator("type")] | None = None
    verbosity: Annotated[Any, Only("medium", why="/v1/responses answers as the checkpoint does")] = None


class Reasoning(Strict):
    """How much to think before an answer, for a template that asks for it; `none` switches thinking off."""

    effort: str | None = None
    summary: Annotated[Any, Only(why=NOT_APART)] = None
    generate_summary: Annotated[Any, Only(why=NOT_APART)] = None
    context: Annotated[Any, Only("auto", why="the input's reasoning is not kept apart")] = None
    mode: Annotated[Any, Only("standard")] = None


class ResponseFields(CommonFields):
    """The fields of `POST /v1/responses` beside the decoding parameters."""

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **CommonFields.HARMLESS,
        "store": (False,), "background": (False,), "truncation": ("disabled",), "tools": ([],),
        "tool_choice": ("auto", "none"), "parallel_tool_calls": (True, False),
        "include": ([], ["reasoning.encrypted_content"]),
        "previous_response_id": (), "conversation": (), "prompt": (), "max_tool_calls": (), "top_logprobs": (0,),
        "context_management": ([],), "moderation": (),
    }  # fmt: skip
    REASONS: ClassVar[Mapping[str, str]] = {
        "store": "nothing is stored here", "background": "nothing is stored here",
        "previous_response_id": "nothing is stored here; send the whole conversation as input",
        "conversation": "nothing is stored here; send the whole conversation as input",
        "prompt": "nothing is stored here", "tools": "/v1/chat/completions has tools",
        "truncation": "an input that is too long is refused",
        "top_logprobs": "/v1/chat/completions has log-probabilities",
    }  # fmt: skip

    input: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES)],
        Field(description="A text, or a conversation."),
    ]
    instructions: Annotated[str | None, Field(description="A system message before the input.")] = None
    max_output_tokens: Annotated[int | None, Field(ge=0, description="Most tokens to generate.")] = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream_options: StreamOptions | None = None


if TYPE_CHECKING:

    class ResponsesRequest(ResponseFields):
        """The body of `POST /v1/responses`."""

else:
    ResponsesRequest = body(
        ResponseFields, "ResponsesRequest", "The body of `POST /v1/responses`, with any decoding parameter.",
        leave_out=("logprobs", "n"),
    )  # fmt: skip


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    """The answer."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ResponsesResponse(BaseModel):
    """The answer of `POST /v1/responses`, of which these fields depend on the answer; the others repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage]
    usage: dict[str, Any] | None


def add_routes(routes: APIRouter, models: Models) -> None:
    """Add the route."""

    @routes.post(
        "/v1/responses",
        summary="Answer an input, keeping no state",
        responses={**ERRORS, 200: {"model": ResponsesResponse, "content": STREAM, "description": "The answer"}},
        response_model=None,
    )
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        plan = await apart(request, _checked, models.get(body.model), body)
        generation = answers.started(body, plan)
        writer = ResponseWriter(body, generation)
        if body.stream:
            generation.start()
            return EventStream(generation, _events(writer))
        async with generation:
            await unless_disconnected(request, generation.finish())
        return await answered(writer.ended)


def _checked(model: LoadedModel, body: ResponsesRequest) -> Plan:
    body.refuse_inapplicable()
    given = body.decoding()
    if body.max_output_tokens is not None:
        given = with_default(given, "max_tokens", body.max_output_tokens)
    structure = as_parameters(body.text.format if body.text else None)
    if structure and body.structured_outputs is not None:
        raise InvalidRequest("structured_outputs and text.format exclude each other", field="structured_outputs")
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    turns = conversation([ChatMessage(role=item.role, content=item.content) for item in items], "input")
    if body.instructions is not None:
        turns.insert(0, {"role": "system", "content": body.instructions})
    try:
        effort = body.reasoning.effort if body.reasoning else None
        prompt = encoded(model, turns, variables=template_variables(model, None, effort, "reasoning.effort"))
    except InapplicableField:
        raise
    except InvalidRequest as error:
        error.field, error.message = "input", error.message.replace("messages", "input", 1)
        raise
    return answers.planned(model, [prompt], given | structure, "input")


class ResponseWriter:
    """The response object at every stage of an answer."""

    def __init__(self, body: ResponsesRequest, generation: Generation) -> None:
        self.generation = generation
        self.message_id = render.new_id("msg")
        self._body = body
        self._id, self._created = render.new_id("resp"), render.timestamp()

    @property
    def output(self) -> Output:
        """The one answer."""
        return self.generation.outputs[0]

    def begun(self) -> dict[str, Any]:
        """The response before anything was written."""
        return self._response("in_progress", [])

    def ended(self) -> dict[str, Any]:
        """The response at its end. Raises `EngineError` if it was broken off."""
        complete = answers.finish_reason(self.output) == "stop"
        response = self._response("completed" if complete else "incomplete", [self.item()])
        if not complete:
            deadline = self.output.finish_reason == "deadline"
            response["incomplete_details"] = {"reason": "deadline" if deadline else "max_output_tokens"}
        tokens = answers.usage(self.generation)
        response["usage"] = {
            "input_tokens": tokens["prompt_tokens"],
            "input_tokens_details": tokens["prompt_tokens_details"],
            "output_tokens": tokens["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens["total_tokens"],
        }
        return response | answers.reproducible(self.generation)

    def failed(self, error: TopkapiError) -> dict[str, Any]:
        """The response that an error ended."""
        told = render_error(error)[1]["error"]
        content = {"code": told["code"] or told["type"], "message": told["message"]}
        return self._response("failed", []) | {"error": content}

    def item(self, status: str | None = None) -> dict[str, Any]:
        """The answer as it is, or as it is about to begin."""
        reason = self.output.finish_reason
        status = status or ("completed" if reason == "stop" else "incomplete")
        content = [] if status == "in_progress" else [self.part(self.output.text)]
        return {"type": "message", "id": self.message_id, "role": "assistant", "status": status, "content": content}

    def part(self, text: str) -> dict[str, Any]:
        """The answer's text."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, parameters = self._body, self.generation.parameters
        form = body.text.format if body.text and body.text.format else TextFormat(type="text")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.generation.plan.model.name,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": parameters.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": parameters.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }


async def _events(writer: ResponseWriter) -> AsyncIterator[bytes]:
    """The events of a stream, numbered, each with its type as its name."""
    number = 0

    async def event(kind: str, **data: Any) -> bytes:
        nonlocal number
        number += 1
        return await answers.data_event({"type": kind, "sequence_number": number - 1, **data}, kind)

    at = {"item_id": writer.message_id, "output_index": 0, "content_index": 0}
    try:
        yield await event("response.created", response=writer.begun())
        yield await event("response.in_progress", response=writer.begun())
        yield await event("response.output_item.added", output_index=0, item=writer.item("in_progress"))
        yield await event("response.content_part.added", **at, part=writer.part(""))
        async for delta in writer.generation.deltas():
            if delta.text:
                yield await event("response.output_text.delta", **at, delta=delta.text, logprobs=[])
        response = writer.ended()
        yield await event("response.output_text.done", **at, text=writer.output.text, logprobs=[])
        yield await event("response.content_part.done", **at, part=writer.part(writer.output.text))
        yield await event("response.output_item.done", output_index=0, item=writer.item())
        yield await event(f"response.{response['status']}", response=response)
    except TopkapiError as error:
        yield await event("response.failed", response=writer.failed(error))
    except Exception:
        # The response has begun, so the error handler can't answer any more.
        yield await event("response.failed", response=writer.failed(INTERNAL))
        raise
