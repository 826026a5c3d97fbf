"""`POST /v1/chat/completions`: answer a conversation, with tools where the checkpoint's template knows them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field

from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.answering import answered
from topkapi.service.api.http.apart import apart, on_thread, unless_disconnected
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.streaming import STREAM, EventStream
from topkapi.service.api.http.template_variables import TemplateVariables, template_variables
from topkapi.service.api.http.timings import LlamaTimings, Stopwatch
from topkapi.service.api.native import render
from topkapi.service.api.openai import answers
from topkapi.service.api.openai.conversation import ChatMessage, Tool, ToolChoice, conversation, encoded
from topkapi.service.api.openai.errors import ERRORS
from topkapi.service.api.openai.fields import CommonFields, StreamOptions, body
from topkapi.service.api.openai.formats import ResponseFormat, as_parameters
from topkapi.service.api.openai.logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from topkapi.service.api.openai.tgi_client import as_it_reads, chosen, is_tgi_client
from topkapi.service.api.openai.tools import Calling, ChatWriter, calling, naming
from topkapi.service.generation import Generation, Output, Plan
from topkapi.service.limits import MOST_MESSAGES, MOST_TOOLS
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import continued_tokens

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


class ChatFields(CommonFields):
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
        "include_reasoning": "what a checkpoint thinks is part of its answer",
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
    stream_options: StreamOptions | None = None
    logprobs: Annotated[bool | None, Field(description="Report each token's log-probability.")] = None
    top_logprobs: Annotated[
        int | None, Field(ge=0, le=1000, description="Report so many most likely tokens at each place too.")
    ] = None
    response_format: Annotated[ResponseFormat, Discriminator("type")] | None = None
    tools: Annotated[
        list[Tool] | None, Field(max_length=MOST_TOOLS, description="Functions that the answer may call.")
    ] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=1000, description="As on /v1/completions.")] = None
    return_token_ids: Annotated[bool | None, Field(description="As in vLLM: tell the token ids too.")] = None
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

    class ChatRequest(ChatFields):
        """The body of `POST /v1/chat/completions`."""

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
    """The assistant's turn: text, calls, or both."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
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
    usage: answers.Usage
    system_fingerprint: str
    seed: int
    deterministic: bool
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    timings: LlamaTimings | None = None


def add_routes(routes: APIRouter, models: Models, *, continues: bool = False) -> None:
    """Add the route. With `continues`, an answer goes on with a last message of the assistant unless told otherwise."""

    @routes.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        responses={**ERRORS, 200: {"model": ChatResponse, "content": STREAM, "description": "The answer"}},
        response_model=None,
    )
    async def chat(request: Request, body: ChatRequest) -> Response:
        model = chosen(models, body.model)
        plan, tools = await apart(request, checked, model, body, continues)
        identifier, created = render.new_id("chatcmpl"), render.timestamp()
        told: dict[str, Any] = {"prompt_token_ids": list(plan.prompts[0])} if body.return_token_ids else {}
        if body.prompt_logprobs is not None:
            work = answers.scored(body, model, plan.prompts, body.prompt_logprobs)
            (scores,) = await unless_disconnected(request, work)
            told["prompt_logprobs"] = await on_thread(lambda: prompt_logprobs(model, plan.prompts[0], scores))
        generation = answers.started(body, plan)
        stopwatch = Stopwatch(generation) if body.timings_per_token else None
        if body.stream:
            generation.start()
            chunks = _chunks(body, tools, generation, identifier, created, told, stopwatch)
            if is_tgi_client(body):
                return EventStream(generation, answers.chunk_events(as_it_reads(chunks), done=False))
            return EventStream(generation, answers.chunk_events(chunks))
        async with generation:
            await unless_disconnected(request, generation.finish())
        if stopwatch is not None:
            told["timings"] = stopwatch.of(generation.outputs[0])
        return await answered(lambda: _response(body, tools, generation, identifier, created) | told)


def checked(model: LoadedModel, body: ChatRequest, continues: bool) -> tuple[Plan, Calling | None]:
    """The plan of a request, and how its answers may call tools."""
    body.refuse_inapplicable()
    if body.stream_options is not None and not body.stream:
        raise InapplicableField("stream_options go with stream", field="stream_options", hint="set stream to true")
    if body.top_logprobs and not body.logprobs:
        raise InapplicableField(
            "top_logprobs go with logprobs", field="top_logprobs", hint="set logprobs to true, or leave them out"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs can't be streamed", field="prompt_logprobs", hint="leave out stream")
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
    before_it = encoded(model, turns[:-1], body.tools if tools else None, variables)
    return before_it + continued_tokens(model, last["content"])


def _finish_reason(output: Output, writer: ChatWriter) -> str:
    reason = answers.finish_reason(output)
    return "tool_calls" if reason == "stop" and writer.called else reason


def _response(
    body: ChatRequest, tools: Calling | None, generation: Generation, identifier: str, created: int
) -> dict[str, Any]:
    model = generation.plan.model
    choices = []
    for output in generation.outputs:
        writer = ChatWriter(tools)
        choice = {
            "index": output.index,
            "message": writer.message(output.text),
            "logprobs": chat_logprobs(model, output.tokens) if body.logprobs else None,
            "finish_reason": _finish_reason(output, writer),
            "stop_reason": answers.stop_reason(model, output),
        }
        if body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in output.tokens]
        choices.append(choice)
    head = {"id": identifier, "object": "chat.completion", "created": created, "model": model.name}
    return head | {"choices": choices, "usage": answers.usage(generation)} | answers.reproducible(generation)


async def _chunks(
    body: ChatRequest,
    tools: Calling | None,
    generation: Generation,
    identifier: str,
    created: int,
    told: dict[str, Any],
    stopwatch: Stopwatch | None,
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream: who speaks, what each step adds, how each answer ended, and the counts."""
    model = generation.plan.model
    count_tokens = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = {
        "id": identifier, "object": "chat.completion.chunk", "created": created, "model": model.name,
        "system_fingerprint": answers.FINGERPRINT,
    }  # fmt: skip
    writers = [ChatWriter(tools) for _ in generation.outputs]
    ended: set[int] = set()

    def chunk(output: Output, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": output.index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return head | {"choices": [choice]} | ({"usage": None} if count_tokens else {}) | timings(output)

    def timings(output: Output) -> dict[str, Any]:
        return {} if stopwatch is None or not output.tokens else {"timings": stopwatch.of(output)}

    def endings() -> list[dict[str, Any]]:
        chunks = []
        for output in generation.outputs:
            if output.finish_reason is None or output.index in ended:
                continue
            ended.add(output.index)
            writer = writers[output.index]
            chunks += [chunk(output, delta) for delta in writer.flush()]
            reason = _finish_reason(output, writer)
            chunks.append(chunk(output, {}, finish_reason=reason, stop_reason=answers.stop_reason(model, output)))
        return chunks

    for output in generation.outputs:
        yield chunk(output, {"role": "assistant", "content": None}) | told
    async for delta in generation.deltas():
        more: dict[str, Any] = {}
        tokens = [] if delta.token is None else [delta.token]
        if stopwatch is not None:
            stopwatch.token(delta.output)
        if body.logprobs and tokens:
            more["logprobs"] = chat_logprobs(model, tokens)
        if body.return_token_ids:
            more["token_ids"] = [token.token_id for token in tokens]
        deltas = writers[delta.output.index].feed(delta.text)
        # What belongs to the token goes with the first piece that it adds, or alone.
        for position, piece in enumerate(deltas or ([{"content": ""}] if more else [])):
            yield chunk(delta.output, piece, **(more if position == 0 else {}))
        for ending in endings():
            yield ending
    for ending in endings():
        yield ending
    if count_tokens:
        last = {"choices": [], "usage": answers.usage(generation)} | timings(generation.outputs[0])
        yield head | last | answers.reproducible(generation)
