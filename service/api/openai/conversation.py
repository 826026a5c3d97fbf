"""OpenAI's messages and tools as a conversation for the checkpoint's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from model.errors import InvalidRequest
from service.api.errors import InapplicableField
from service.api.schemas import Strict
from service.limits import MOST_PARTS
from service.models import LoadedModel
from service.prompting import conversation_tokens


class TextPart(Strict):
    """A piece of a message. Only text can be read."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Parts = Annotated[list[TextPart], Field(max_length=MOST_PARTS)]


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
_MESSAGES: dict[str, Any] = {
    "anyOf": [
        {
            "required": ["content"],
            "properties": {
                "role": {"enum": ["system", "developer", "user"]},
                **dict.fromkeys(("tool_calls", "tool_call_id", "name"), _NOTHING),
                "content": _SAID,
            },
        },
        {
            "required": ["content"],
            "properties": {"role": {"const": "tool"}, "tool_calls": _NOTHING, "content": _SAID},
        },
        {
            "properties": {"role": {"const": "assistant"}, "name": _NOTHING, "tool_call_id": _NOTHING},
            "anyOf": [
                {"required": ["content"], "properties": {"content": _SAID}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
            ],
        },
    ]
}
"""What each role may say, for the description."""


class ChatMessage(Strict):
    """One turn. `developer` is another word for `system`; several text parts are joined by line breaks."""

    model_config = ConfigDict(json_schema_extra=_MESSAGES)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=MOST_PARTS)] = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


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


def encoded(model: LoadedModel, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] | None = None) -> list[int]:
    """The token ids of a conversation up to where the answer begins. Raises `InvalidRequest` as the template does."""
    described = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    return conversation_tokens(model, messages, described)


def _turn(message: ChatMessage, field: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"{field}.content is missing", field=f"{field}.content")
    turn: dict[str, Any] = {"role": role, "content": _text(message.content, f"{field}.content")}
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
        if role != "tool":
            raise InapplicableField(
                f"{field}.name can't be used: chat templates have no place for it", field=f"{field}.name"
            )
        turn["name"] = message.name
    if message.tool_call_id is not None:
        if role != "tool":
            raise InvalidRequest(f"{field}.tool_call_id belongs to a tool's answer", field=f"{field}.tool_call_id")
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _text(content: str | Sequence[TextPart] | None, field: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not content:
        raise InvalidRequest(f"{field} is empty", field=field, hint='send a text, or parts {"type": "text", "text"}')
    return "\n".join(part.text for part in content)


def _arguments(text: str, field: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidRequest(f"{field} is not valid JSON: {error}", field=field) from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field} must be a JSON object", field=field)
    return arguments
