"""`POST /v1/chat/completions`: answer a conversation, with tools where the checkpoint's template knows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field

from topkapi.engine.request import Token
from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.answering import Event
from topkapi.service.api.http.describing import decoding
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.template_variables import TemplateVariables, template_variables
from topkapi.service.api.http.timings import LlamaTimings, Stopwatch
from topkapi.service.api.openai import answers
from topkapi.service.api.openai.conversation import ChatMessage, Tool, ToolChoice, conversation, encoded
from topkapi.service.api.openai.fields import ChunkedFields, CommonFields, ResponseFormat, as_parameters, body
from topkapi.service.api.openai.logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from topkapi.service.api.openai.tgi_client import AsItReads, is_tgi_client
from topkapi.service.api.openai.tools import Calling, ChatWriter, calling, naming
from topkapi.service.generation import CompletionOutput, Delta, Plan
from topkapi.service.limits import MOST_MESSAGES, MOST_TOOLS
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import continued_tokens, reasoning_reader, without_thinking

_NULL = {"type": "null"}
_TOGETHER: dict[str, Any] = {
    "anyOf": [
        {"properties": dict.fromkeys(("top_logprobs", "continue_final_message", "add_generation_prompt"), _NULL)},
        {
            "required": ["logprobs", "top_logprobs"],
            "properties": {
                "logprobs": {"const": True},
                "continue_final_message": _NULL,
                "add_generation_prompt": _NULL,
            },
        },
        {
            "required": ["continue_final_message"],
            "properties": {"add_generation_prompt": {"enum": [False, None]}, "top_logprobs": _NULL},
        },
        {
            "required": ["add_generation_prompt"],
            "properties": {
                "add_generation_prompt": {"const": True},
                "continue_final_message": _NULL,
                "top_logprobs": _NULL,
            },
        },
    ]
}
"""Which fields go together, for the description."""


class ChatFields(ChunkedFields):
    """The fields of `POST /v1/chat/completions` beside the decoding parameters."""

    model_config = ConfigDict(json_schema_extra=_TOGETHER)

    HARMLESS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **CommonFields.HARMLESS,
        "store": (False,), "modalities": (["text"],), "audio": (), "web_search_options": (), "verbosity": ("medium",),
        "functions": (), "function_call": ("none", "auto"), "moderation": (), "include_reasoning": (True,),
        "mm_processor_kwargs": (), "documents": (), "chat_template": (),
    }  # fmt: skip
    REASONS: ClassVar[Mapping[str, str]] = {
        "store": "nothing is stored here", "modalities": "answers are text",
        "audio": "answers are text", "web_search_options": "nothing is looked up",
        "functions": "it was replaced by tools", "function_call": "it was replaced by tool_choice",
        "include_reasoning": "what a checkpoint thinks comes with its answer, as reasoning_content",
        "chat_template": "a checkpoint's own one is used", "documents": "send their text in a message",
    }  # fmt: skip

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, description="The conversation.")
    ]
    chat_template_kwargs: TemplateVariables = None
    reasoning_effort: Annotated[
        str | None, Field(description="For a template that asks for it; `none` switches thinking off.")
    ] = None
    prediction: Annotated[dict[str, Any] | None, Field(description="A guess at the answer; never changes it.")] = None
    logprobs: Annotated[bool | None, Field(description="Report each token's log-probability.")] = None
    top_logprobs: Annotated[
        int | None, decoding("logprobs", description="Report so many most likely tokens at each place too.")
    ] = None
    response_format: Annotated[ResponseFormat, Discriminator("type")] | None = None
    tools: Annotated[
        list[Tool] | None, Field(max_length=MOST_TOOLS, description="Functions that the answer may call.")
    ] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prompt_logprobs: Annotated[int | None, decoding("logprobs", description="As on /v1/completions.")] = None
    continue_final_message: Annotated[
        bool | None, Field(description="As in vLLM: the answer goes on with the assistant's last message.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Field(description="As in vLLM: false where the last message is continued, else true.")
    ] = None
    timings_per_token: Annotated[bool | None, Field(description="As in llama.cpp: tell the timings too.")] = None
    cache_prompt: Annotated[bool | None, Field(description="Reuse of prefixes never changes an answer.")] = None
    id_slot: Annotated[int | None, Field(ge=-1, description="A prefix is reused from whichever slot has it.")] = None


if TYPE_CHECKING:
    ChatRequest = ChatFields
else:
    ChatRequest = body(
        ChatFields, "ChatRequest", "The body of `POST /v1/chat/completions`, with any decoding parameter."
    )


class AnswerFunction(BaseModel):
    """The function that is called, with its arguments as JSON."""

    name: str
    arguments: str


class AnswerCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """The assistant's turn: text, calls, or both; what it thought before is `reasoning_content`."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(BaseModel):
    """One answer. `stop_reason` is the stop text or stop token that ended it, as in vLLM."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """The answer of `POST /v1/chat/completions`; `seed` and `deterministic` say how to get it again."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: answers.CompletionUsage
    system_fingerprint: str
    seed: int
    deterministic: bool
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    timings: LlamaTimings | None = None


class ChatAnswer(answers.ChunkedAnswer):
    """The answers to a conversation. With `continues`, they go on with a last message of the assistant unless told
    otherwise."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: LoadedModel, body: ChatRequest, *, continues: bool = False) -> None:
        plan, tools = checked(model, body, continues)
        super().__init__(body, plan, "chatcmpl", body.prompt_logprobs)
        self._body, self._prompt = body, plan.prompts[0]
        apart = not is_tgi_client(body)
        self._writers = [
            ChatWriter(tools, reasoning_reader(self.model, self._prompt) if apart else None)
            for _ in self.generation.outputs
        ]
        self._stopwatch = Stopwatch(self.generation) if body.timings_per_token else None
        self._as_it_reads = None
        if is_tgi_client(body):
            self._as_it_reads, self.last = AsItReads(), ()

    def whole(self) -> dict[str, Any]:
        told = super().whole() | self._about_prompt()
        if self.scoring is not None:
            told["prompt_logprobs"] = prompt_logprobs(self.model, self._prompt, self.scoring.scores[0])
        if self._stopwatch is not None:
            told["timings"] = self._stopwatch.of(self.generation.outputs[0])
        return told

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        message = self._writers[output.index].message(output.text)
        choice = {"index": output.index, "message": message, "logprobs": None} | self._about(output.tokens)
        return choice | self._how_it_ended(output)

    def opening(self) -> Iterator[Event]:
        """Who speaks."""
        for output in self.generation.outputs:
            choice = self._choice(output, {"role": "assistant", "content": None})
            yield self.chunk(output, choice, **self._about_prompt())

    def added(self, delta: Delta) -> Iterator[dict[str, Any]]:
        tokens = [] if delta.token is None else [delta.token]
        if self._stopwatch is not None:
            self._stopwatch.token(delta.output)
        more = self._about(tokens)
        if not tokens:
            more.pop("logprobs", None)
        deltas = self._writers[delta.output.index].feed(delta.text)
        # What belongs to the token goes with the first piece that it adds, or alone.
        for position, piece in enumerate(deltas or ([{"content": ""}] if more else [])):
            yield self._choice(delta.output, piece) | (more if position == 0 else {})

    def ended(self, output: CompletionOutput) -> Iterator[dict[str, Any]]:
        for piece in self._writers[output.index].flush():
            yield self._choice(output, piece)
        yield self._choice(output, {}) | self._how_it_ended(output)

    def _about(self, tokens: Sequence[Token]) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self._body.logprobs:
            about["logprobs"] = chat_logprobs(self.model, tokens)
        if self._body.return_token_ids:
            about["token_ids"] = [token.token_id for token in tokens]
        return about

    def _about_prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self._prompt)} if self._body.return_token_ids else {}

    def _how_it_ended(self, output: CompletionOutput) -> dict[str, Any]:
        reason = answers.finish_reason(output)
        called = reason == "stop" and self._writers[output.index].called
        stop_reason = answers.stop_reason(self.model, output)
        return {"finish_reason": "tool_calls" if called else reason, "stop_reason": stop_reason}

    def more(self, output: CompletionOutput) -> dict[str, Any]:
        return {} if self._stopwatch is None or not output.tokens else {"timings": self._stopwatch.of(output)}

    def _choice(self, output: CompletionOutput, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": output.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return choice if self._as_it_reads is None else self._as_it_reads.choice(choice)


def checked(model: LoadedModel, body: ChatRequest, continues: bool) -> tuple[Plan, Calling | None]:
    """The plan of a request, and how its answers may call tools."""
    body.refuse_inapplicable()
    if body.top_logprobs and not body.logprobs:
        raise InapplicableField(
            "top_logprobs go with logprobs", field="top_logprobs", hint="set logprobs to true, or leave them out"
        )
    tools = calling(model, body.tools, body.tool_choice, body.parallel_tool_calls)
    given = body.decoding()
    given.pop("logprobs", None)
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    structure = as_parameters(body.response_format)
    if structure and body.structured_outputs is not None:
        raise InvalidRequest("structured_outputs and response_format exclude each other", field="structured_outputs")
    given |= structure
    if tools is not None:
        given = tools.added_to(given)
    prompt = prompt_of(model, body, tools, continues)
    if tools is not None and tools.must:
        prompt = without_thinking(model, prompt)
    with naming(tools):
        return answers.planned(model, [prompt], given, "messages"), tools


def prompt_of(model: LoadedModel, body: ChatRequest, tools: Calling | None, continues: bool) -> list[int]:
    """The token ids of a request's conversation up to where the answer goes on.

    Raises `InvalidRequest` where the template refuses it, or where the assistant has said nothing to go on with.
    """
    turns = conversation(body.messages)
    variables = template_variables(model, body.chat_template_kwargs, body.reasoning_effort)
    asked = body.continue_final_message
    if asked and body.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other"
        raise InvalidRequest(message, field="add_generation_prompt", hint="set it to false")
    if asked is None:
        asked = continues and not body.add_generation_prompt and turns[-1]["role"] == "assistant"
    if not asked:
        if body.add_generation_prompt is False:
            message = "without a generation prompt there is no answer, unless the last message is continued"
            hint = "leave it out, or set continue_final_message to true"
            raise InapplicableField(message, field="add_generation_prompt", hint=hint)
        return encoded(model, turns, body.tools if tools else None, variables)
    last, *before = turns[::-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        message = "the last message is no text of the assistant that the answer could go on with"
        raise InvalidRequest(message, field="messages", hint="leave continue_final_message out")
    if last.get("reasoning_content"):
        message = "an answer can't go on from a message with reasoning_content"
        raise InvalidRequest(message, field="messages", hint="leave it out of the last message")
    if before and before[0]["role"] == "assistant":
        message = "the last two messages are the assistant's, so it is not clear what the answer goes on with"
        raise InvalidRequest(message, field="messages", hint="make them one, or set add_generation_prompt to true")
    before_it = without_thinking(model, encoded(model, turns[:-1], body.tools if tools else None, variables))
    return before_it + continued_tokens(model, last["content"])
