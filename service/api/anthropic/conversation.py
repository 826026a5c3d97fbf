"""Anthropic's messages and tools as a conversation for the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from topkapi.model.errors import InvalidRequest
from topkapi.service.api.anthropic import schemas
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.http.template_variables import SWITCHES, template_variables
from topkapi.service.api.openai.tools import Calling, allowed
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import continued_tokens, conversation_tokens, thinks, without_thinking


@dataclass(frozen=True)
class Reading:
    """A request as token ids up to where the answer goes on, and how the answer may call tools."""

    token_ids: list[int]
    calling: Calling | None


def read(model: LoadedModel, body: schemas.AnthropicCountRequest) -> Reading:
    """Read a request. Raises `InvalidRequest` where the checkpoint or its template cannot take it."""
    body.refuse_inapplicable()
    messages = _merged([turn for index, each in enumerate(body.messages) for turn in _turns(each, index)])
    if body.system:
        messages.insert(0, {"role": "system", "content": _joined(body.system)})
    chat = model.checkpoint.chat
    used = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
    if used and chat is not None and not chat.takes_tools:
        raise InvalidRequest(
            "messages: the checkpoint's chat template takes no tools, so it can't be shown their calls and results",
            field="messages",
            hint="leave the blocks tool_use and tool_result out",
        )
    calling = _calling(model, body)
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise InvalidRequest("messages: the user has said nothing", field="messages", hint="send a turn of the user")
    if messages[-1].get("tool_calls"):
        raise InvalidRequest("messages end with a call, whose result is missing", field="messages")
    # How the answer begins, said by the caller: the answer goes on from there.
    if messages[-1]["role"] == "assistant" and "reasoning_content" in messages[-1]:
        raise InvalidRequest(
            "messages end with what the assistant thought: an answer can't be begun with thinking", field="messages"
        )
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    effort = body.output_config.effort if body.output_config else None
    # Anthropic's own default effort asks for nothing.
    variables = _thinking(model, body)
    variables |= template_variables(model, None, None if effort == "high" else effort, "output_config.effort")
    functions = [] if calling is None else calling.functions
    tools = [{"type": "function", "function": function} for function in functions]
    token_ids = conversation_tokens(model, messages, tools, variables)
    if (calling is not None and calling.must) or begun:
        token_ids = without_thinking(model, token_ids)
    return Reading(token_ids + continued_tokens(model, begun), calling)


def _thinking(model: LoadedModel, body: schemas.AnthropicCountRequest) -> dict[str, Any]:
    """What the template is told of thinking first. Unless the request says anything, it does as by default."""
    if body.thinking is None:
        return {}
    if body.thinking.type == "disabled":
        return template_variables(model, None, "none")
    if not thinks(model):
        raise InapplicableField(
            f"thinking can't be used: {model.name} has no chat template that knows of thinking",
            field="thinking",
            hint="leave thinking out",
        )
    variables = model.checkpoint.chat.variables if model.checkpoint.chat else frozenset()
    return {name: True for name in SWITCHES if name in variables}


def _calling(model: LoadedModel, body: schemas.AnthropicCountRequest) -> Calling | None:
    choice = body.tool_choice
    if not body.tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise InvalidRequest("tool_choice goes with tools", field="tool_choice", hint="send tools, or leave it out")
        return None
    kind = "auto" if choice is None else choice.type
    named = None if choice is None else choice.name
    if (kind == "tool") != (named is not None):
        raise InvalidRequest("tool_choice.name goes with the type tool", field="tool_choice.name")
    alone = choice is not None and bool(choice.disable_parallel_tool_use)
    must: Literal["none", "auto", "required"] = kind if kind in ("none", "auto") else "required"
    places = ("tools[{}].name", "tool_choice.name")
    return allowed(model, list(map(_function, body.tools)), must, named, places, several=not alone)


def _function(tool: schemas.AnthropicTool) -> dict[str, Any]:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {name: value for name, value in described.items() if value is not None}


def _turns(turn: schemas.AnthropicTurn, index: int) -> list[dict[str, Any]]:
    """A turn as the template's messages: what tools answered comes before what the user says with it."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    field = f"messages[{index}].content"
    if not turn.content:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send a text, or at least one block")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for position, block in enumerate(turn.content):
        place = f"{field}[{position}]"
        if isinstance(block, schemas.AnthropicText):
            texts.append(block.text)
        elif isinstance(block, schemas.AnthropicThinking):
            if turn.role != "assistant":
                raise InvalidRequest(f"{place}: a block thinking belongs to the assistant", field=place)
            thoughts.append(block.thinking)
        elif isinstance(block, schemas.AnthropicToolUse):
            if turn.role != "assistant":
                raise InvalidRequest(f"{place}: a block tool_use belongs to the assistant", field=place)
            calls.append(
                {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
            )
        else:
            if turn.role != "user":
                raise InvalidRequest(f"{place}: a block tool_result belongs to the user", field=place)
            said = "Error: " * bool(block.is_error) + _joined(block.content or "")
            results.append({"role": "tool", "content": said, "tool_call_id": block.tool_use_id})
    own: dict[str, Any] = {"role": turn.role, "content": "\n".join(texts)}
    if thoughts:
        own["reasoning_content"] = "\n".join(thoughts)
    if calls:
        own["tool_calls"] = calls
    return [*results, *([own] if texts or calls or thoughts else [])]


def _merged(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns of one role in a row as one."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        last = merged[-1] if merged else {}
        if message["role"] == last.get("role") != "tool" and "tool_calls" not in last:
            last["content"] = "\n".join(text for text in (last["content"], message["content"]) if text)
            if "tool_calls" in message:
                last["tool_calls"] = message["tool_calls"]
            thoughts = [each["reasoning_content"] for each in (last, message) if "reasoning_content" in each]
            if thoughts:
                last["reasoning_content"] = "\n".join(thoughts)
        else:
            merged.append(dict(message))
    return merged


def _joined(content: str | Sequence[schemas.AnthropicText]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
