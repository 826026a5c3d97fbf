"""`POST /v1/responses`: the part of OpenAI's responses that keeps no state. Text in, text out, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from topkapi.model.conversation.reasoning import Thought
from topkapi.model.conversation.tool_call_reader import Said
from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.service.api.http.answering import Event
from topkapi.service.api.http.body import Strict
from topkapi.service.api.http.describing import decoding
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.harmless import Only
from topkapi.service.api.http.template_variables import template_variables
from topkapi.service.api.native.generate import new_id
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
from topkapi.service.limits import MOST_MESSAGES, MOST_PARTS
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import reasoning_reader

AS_IT_IS = "what a checkpoint thinks is told as it is"


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


class ReasoningText(Strict):
    """What was thought."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """What the assistant thought before the message that follows, as an earlier answer told it."""

    type: Literal["reasoning"]
    id: str | None = None
    status: str | None = None
    content: Annotated[list[ReasoningText] | None, Field(max_length=MOST_PARTS)] = None
    summary: Annotated[Any, Only([], why="nothing is summarised here")] = None
    encrypted_content: Annotated[Any, Only("", why="nothing is encrypted here")] = None


def _kind(item: Any) -> str:
    """What an item says that it is; what says nothing is a message."""
    kind = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return "reasoning" if kind == "reasoning" else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[InputReasoning, Tag("reasoning")], Discriminator(_kind)
]


class TextOptions(Strict):
    """The form of the answer."""

    format: Annotated[FlatFormat, Discriminator("type")] | None = None
    verbosity: Annotated[Any, Only("medium", why="/v1/responses answers as the checkpoint does")] = None


class Reasoning(Strict):
    """How much to think before an answer, for a template that asks for it; `none` switches thinking off."""

    effort: str | None = None
    summary: Annotated[Any, Only(why=AS_IT_IS)] = None
    generate_summary: Annotated[Any, Only(why=AS_IT_IS)] = None
    context: Annotated[Any, Only("auto", why="the template decides what is shown of it")] = None
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
        Annotated[str, Field(min_length=1)] | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)],
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


class OutputReasoning(BaseModel):
    """What was thought before the answer."""

    type: Literal["reasoning"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[Any]
    content: list[ReasoningText]


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
    output: list[OutputReasoning | OutputMessage]
    usage: dict[str, Any] | None


def _messages(given: str | list[InputItem]) -> list[ChatMessage]:
    """The input as messages; what was thought belongs to the message that follows it."""
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    messages: list[ChatMessage] = []
    thought: str | None = None
    for index, item in enumerate(given):
        if isinstance(item, InputReasoning):
            thought = "\n".join([thought or "", *(part.text for part in item.content or ())]).strip() or None
            followed = given[index + 1] if index + 1 < len(given) else None
            if not isinstance(followed, InputReasoning) and (followed is None or followed.role != "assistant"):
                message = f"input[{index}]: what was thought has to stand before the assistant's message that it led to"
                raise InvalidRequest(message, field=f"input[{index}]", hint="leave it out")
        else:
            messages.append(ChatMessage(role=item.role, content=item.content, reasoning_content=thought))
            thought = None
    return messages


def _checked(model: LoadedModel, body: ResponsesRequest) -> Plan:
    body.refuse_inapplicable()
    given = body.decoding()
    if body.max_output_tokens is not None:
        given = with_default(given, "max_tokens", body.max_output_tokens)
    structure = as_parameters(body.text.format if body.text else None)
    if structure and body.structured_outputs is not None:
        raise InvalidRequest("structured_outputs and text.format exclude each other", field="structured_outputs")
    turns = conversation(_messages(body.input), "input")
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
        self._body = body
        self._reader = reasoning_reader(model, self.generation.plan.prompts[0])
        self._items: list[_Item] = []
        self._numbers = count()

    def whole(self) -> dict[str, Any]:
        for _ in (*self._pieces(self.output.text), *self._flushed()):
            pass
        return self._completed()

    def opening(self) -> Iterator[Event]:
        begun = self._response("in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)

    def told(self, step: Delta) -> Iterator[Event]:
        return self._pieces(step.text)

    def ending(self) -> Iterator[Event]:
        yield from self._flushed()
        response = self._completed()
        yield from self._closed()
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: TopkapiError) -> Event:
        told = self.dialect.render(error)[1]["error"]
        content = {"code": told["code"] or told["type"], "message": told["message"]}
        return self._event("response.failed", response=self._response("failed", []) | {"error": content})

    def _pieces(self, text: str) -> Iterator[Event]:
        """The events of a further piece of the answer's text."""
        if self._reader is not None:
            yield from self._apart(self._reader.feed(text))
        elif text:
            yield from self._added(False, text)

    def _flushed(self) -> Iterator[Event]:
        """Those of what was held back; an answer without a word still has a message."""
        if self._reader is not None:
            yield from self._apart(self._reader.flush())
        if not self._items or self._items[-1].thought:
            yield from self._begun(False)

    def _apart(self, events: Iterable[Thought | Said]) -> Iterator[Event]:
        for event in events:
            yield from self._added(isinstance(event, Thought), event.text)

    def _added(self, thought: bool, text: str) -> Iterator[Event]:
        if not self._items or self._items[-1].thought != thought:
            yield from self._begun(thought)
        item = self._items[-1]
        item.pieces.append(text)
        more: dict[str, Any] = {} if thought else {"logprobs": []}
        yield self._event(f"response.{item.text_type}.delta", **self._place(), delta=text, **more)

    def _begun(self, thought: bool) -> Iterator[Event]:
        yield from self._closed()
        self._items.append(item := _Item(thought))
        index = len(self._items) - 1
        yield self._event("response.output_item.added", output_index=index, item=item.told("in_progress"))
        yield self._event("response.content_part.added", **self._place(), part=item.part(""))

    def _closed(self) -> Iterator[Event]:
        """The events that end the last item."""
        if not self._items:
            return
        item, text = self._items[-1], self._items[-1].text
        more: dict[str, Any] = {} if item.thought else {"logprobs": []}
        yield self._event(f"response.{item.text_type}.done", **self._place(), text=text, **more)
        yield self._event("response.content_part.done", **self._place(), part=item.part(text))
        done = item.told(self._status(item))
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=done)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1].identifier, "output_index": len(self._items) - 1, "content_index": 0}

    def _status(self, item: _Item) -> str:
        """What was thought is complete once something else has begun."""
        complete = item is not self._items[-1] or self.output.finish_reason in (None, "stop")
        return "completed" if complete else "incomplete"

    def _event(self, kind: str, **data: Any) -> Event:
        return kind, {"type": kind, "sequence_number": next(self._numbers), **data}

    def _completed(self) -> dict[str, Any]:
        complete = answers.finish_reason(self.output) == "stop"
        output = [item.told(self._status(item)) for item in self._items]
        response = self._response("completed" if complete else "incomplete", output)
        if not complete:
            deadline = self.output.finish_reason == "deadline"
            response["incomplete_details"] = {"reason": "deadline" if deadline else "max_output_tokens"}
        tokens = answers.usage(self.generation)
        response["usage"] = {
            "input_tokens": tokens["prompt_tokens"],
            "input_tokens_details": tokens["prompt_tokens_details"],
            "output_tokens": tokens["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": answers.reasoning_tokens(self.generation)},
            "total_tokens": tokens["total_tokens"],
        }
        return response | answers.reproducible(self.generation)

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


class _Item:
    """What was thought, or said, so far."""

    def __init__(self, thought: bool) -> None:
        self.thought, self.identifier = thought, new_id("rs" if thought else "msg")
        self.text_type = "reasoning_text" if thought else "output_text"
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def told(self, status: str) -> dict[str, Any]:
        """The item with its text, or as it is about to begin."""
        content = [] if status == "in_progress" else [self.part(self.text)]
        about: dict[str, Any] = {"type": "reasoning", "summary": []} if self.thought else {"type": "message"}
        about |= {"id": self.identifier, "status": status, "content": content}
        return about if self.thought else about | {"role": "assistant"}

    def part(self, text: str) -> dict[str, Any]:
        """The text as a part of the item's content."""
        part = {"type": self.text_type, "text": text}
        return part if self.thought else part | {"annotations": [], "logprobs": []}
