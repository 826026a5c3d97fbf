"""`POST /v1/responses`: the part of OpenAI's responses that keeps no state. Text in, text out, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field

from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.service.api.http.answering import Event
from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import decoding
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.harmless import Only
from topkapi.service.api.http.template_variables import template_variables
from topkapi.service.api.native.render import new_id
from topkapi.service.api.openai import answers
from topkapi.service.api.openai.conversation import ChatMessage, Parts, conversation, encoded
from topkapi.service.api.openai.fields import (
    CommonFields,
    FlatFormat,
    TextFormat,
    as_parameters,
    body,
    with_default,
)
from topkapi.service.generation import Delta, Plan
from topkapi.service.limits import MOST_MESSAGES
from topkapi.service.models import LoadedModel

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
    max_output_tokens: Annotated[int | None, decoding("max_tokens", description="Most tokens to generate.")] = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None


if TYPE_CHECKING:
    ResponsesRequest = ResponseFields
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


class ResponsesAnswer(answers.OpenAIAnswer):
    """The answer to an input. The events of its stream are numbered, each with its type as its name."""

    def __init__(self, model: LoadedModel, body: ResponsesRequest) -> None:
        super().__init__(body, _checked(model, body), "resp")
        (self.output,) = self.generation.outputs
        self._body, self._message_id = body, new_id("msg")
        self._place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        self._numbers = count()

    def whole(self) -> dict[str, Any]:
        complete = answers.finish_reason(self.output) == "stop"
        response = self._response("completed" if complete else "incomplete", [self._item()])
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

    def opening(self) -> Iterator[Event]:
        begun = self._response("in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress"))
        yield self._event("response.content_part.added", **self._place, part=self._part(""))

    def told(self, step: Delta) -> Iterator[Event]:
        if step.text:
            yield self._event("response.output_text.delta", **self._place, delta=step.text, logprobs=[])

    def ending(self) -> Iterator[Event]:
        response, text = self.whole(), self.output.text
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item())
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: TopkapiError) -> Event:
        told = self.dialect.render(error)[1]["error"]
        content = {"code": told["code"] or told["type"], "message": told["message"]}
        return self._event("response.failed", response=self._response("failed", []) | {"error": content})

    def _event(self, kind: str, **data: Any) -> Event:
        return kind, {"type": kind, "sequence_number": next(self._numbers), **data}

    def _item(self, status: str | None = None) -> dict[str, Any]:
        """The answer as it is, or as it is about to begin."""
        reason = self.output.finish_reason
        status = status or ("completed" if reason == "stop" else "incomplete")
        content = [] if status == "in_progress" else [self._part(self.output.text)]
        return {"type": "message", "id": self._message_id, "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, parameters = self._body, self.generation.parameters
        form = body.text.format if body.text and body.text.format else TextFormat(type="text")
        return {
            "id": self.identifier,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.model.name,
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
