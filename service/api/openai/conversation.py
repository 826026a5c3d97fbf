"""OpenAI's messages and tools as a conversation for the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.body import Strict, json_in
from topkapi.service.api.http.harmless import CacheBreakpoint, CacheControl, Only
from topkapi.service.limits import MOST_PARTS
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import conversation_tokens


class TextPart(Strict):
    """A piece of a message. Only text can be read; what else an earlier answer told of its text is not looked at."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class RefusalPart(Strict):
    """What the assistant said where it would not answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


Parts = Annotated[list[Part], Field(max_length=MOST_PARTS)]


class CalledFunction(Strict):
    """A function that was called, with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


_NOTHING = {"type": "null"}
_SAID = {"not": _NOTHING}
_OF_THE_ASSISTANT = ("reasoning_content", "reasoning", "refusal")
_MESSAGES: dict[str, Any] = {
    "anyOf": [
        {
            "required": ["content"],
            "properties": {
                "role": {"enum": ["system", "developer", "user"]},
                **dict.fromkeys(("tool_calls", "tool_call_id", *_OF_THE_ASSISTANT), _NOTHING),
                "content": _SAID,
            },
        },
        {
            "required": ["content"],
            "properties": {
                "role": {"const": "tool"},
                **dict.fromkeys(("tool_calls", *_OF_THE_ASSISTANT), _NOTHING),
                "content": _SAID,
            },
        },
        {
            "properties": {"role": {"const": "assistant"}, "tool_call_id": _NOTHING, "reasoning": _NOTHING},
            "anyOf": [
                {"required": ["content"], "properties": {"content": _SAID}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
            ],
        },
    ]
}
"""What each role may say, for the description."""


class ChatMessage(Strict):
    """One turn. `developer` is another word for `system`; several text parts are joined by line breaks.

    The template is given `name` and `reasoning_content` (or `reasoning`, as vLLM calls it now) to do with as it does.
    """

    model_config = ConfigDict(json_schema_extra=_MESSAGES)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=MOST_PARTS)] = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: Annotated[Any, Only(why="answers are text")] = None
    function_call: Annotated[Any, Only(why="it was replaced by tool_calls")] = None
    annotations: list[Any] | None = None
    cache_control: CacheControl | None = None


class FunctionDefinition(Strict):
    """A function that may be called; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool. Only functions can be called."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def conversation(messages: Sequence[ChatMessage], field: str = "messages") -> list[dict[str, Any]]:
    """The messages of `field` as chat templates know them. Raises `InvalidRequest` naming one that says nothing."""
    return [_turn(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def encoded(
    model: LoadedModel,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a conversation up to where the answer begins. Raises `InvalidRequest` as the template does.

    `variables` are what else the request says to the template.
    """
    described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    return conversation_tokens(model, messages, described, variables)


def _turn(message: ChatMessage, field: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    said = [_text(message.content, f"{field}.content")] if message.content is not None else []
    for name in _OF_THE_ASSISTANT:
        if getattr(message, name) is not None and role != "assistant":
            raise InvalidRequest(f"{field}.{name} belongs to the assistant", field=f"{field}.{name}")
    if message.refusal is not None:
        said.append(message.refusal)
    if not said and not message.tool_calls:
        raise InvalidRequest(f"{field}.content is missing", field=f"{field}.content")
    turn: dict[str, Any] = {"role": role, "content": "\n".join(text for text in said if text)}
    thought = [each for each in (message.reasoning_content, message.reasoning) if each is not None]
    if thought:
        if thought[0] != thought[-1]:
            raise InvalidRequest(
                f"{field}.reasoning and reasoning_content are two names of one field", field=f"{field}.reasoning"
            )
        turn["reasoning_content"] = thought[0]
    if message.tool_calls:
        if role != "assistant":
            raise InvalidRequest(f"{field}.tool_calls belong to the assistant", field=f"{field}.tool_calls")
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{field}.tool_calls[{index}].function.arguments"),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        if role != "tool":
            raise InvalidRequest(f"{field}.tool_call_id belongs to a tool's answer", field=f"{field}.tool_call_id")
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _text(content: str | Sequence[TextPart | RefusalPart] | None, field: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not content:
        raise InvalidRequest(f"{field} is empty", field=field, hint='send a text, or parts {"type": "text", "text"}')
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _arguments(text: str, field: str) -> dict[str, Any]:
    arguments = json_in(text or "{}", field)
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field} must be a JSON object", field=field)
    return arguments
