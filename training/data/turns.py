"""What a message of a row says, field by field, in OpenAI's form or ShareGPT's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from topkapi.model.errors import DataError

Message = dict[str, Any]

REFUSED_OF_MESSAGES = {
    "function_call": "write it as tool_calls", "thinking": "call it reasoning_content",
    "reasoning": "call it reasoning_content", "refusal": "write it as content", "audio": "only text is trained on",
    "images": "only text is trained on",
    **dict.fromkeys(
        ("train", "training", "trained", "loss", "loss_mask", "loss_weight", "mask", "masked"),
        "an answer that is not trained has the weight 0",
    ),
}  # fmt: skip

THROUGH_TEMPLATE = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""Fields of a message that the chat template is given beside `role` and `content`."""

_SHAREGPT = {
    "human": "user", "user": "user", "system": "system", "developer": "system",
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "claude", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
}  # fmt: skip
"""Who speaks in ShareGPT's `from`, and the role that this is. What a `function_call` says is a call, in JSON."""


class Place(Protocol):
    """Where something stands that may be wrong."""

    def error(self, message: str, hint: str | None = None) -> DataError:
        """The error for what is wrong there."""
        ...


def empty(value: Any) -> bool:
    """Whether a field says nothing."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def parsed(row: Place, value: Any, place: str) -> Any:
    """JSON as it is, or as the text that columns of one type hold it in."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise row.error(f"{place} is not valid JSON: {error}") from None


def message_of(row: Place, value: Any, place: str, unused: set[str]) -> tuple[Message, bool]:
    """The message at `place` of a row, and whether it is trained, if it is an answer; names of fields that say nothing
    here are added to `unused`. Raises `DataError` for what can't be done."""
    if not isinstance(value, dict):
        raise row.error(f"{place} is no message")
    if value.get("role") is None and value.get("content") is None and isinstance(value.get("from"), str):
        value = _of_sharegpt(row, value, place)
    for name in ("role", "content"):
        if name == "content" and value.get(name) is None and value.get("tool_calls"):
            continue
        if name == "role" and not isinstance(value.get(name), str):
            raise row.error(f"no text in the field 'role' of {place}")
    role = "system" if value["role"] == "developer" else value["role"]
    message: Message = {"role": role, "content": _content(row, value, place)}
    for name, hint in REFUSED_OF_MESSAGES.items():
        if not empty(value.get(name)) or isinstance(value.get(name), bool):
            raise row.error(f"{place}.{name} can't be used", hint)
    for name in THROUGH_TEMPLATE:
        if not empty(value.get(name)):
            message[name] = value[name]
    if "tool_calls" in message:
        message["tool_calls"] = _calls(row, message["tool_calls"], role, f"{place}.tool_calls")
    if "reasoning_content" in message and role != "assistant":
        raise row.error(f"{place}.reasoning_content belongs to the assistant")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(name, ""), str):
            raise row.error(f"{place}.{name} must be text")
    known = {"role", "content", "weight", *THROUGH_TEMPLATE, *REFUSED_OF_MESSAGES}
    unused |= {f"messages[].{key}" for key in value.keys() - known if not empty(value[key])}
    return message, _trained(row, value.get("weight"), role, f"{place}.weight")


def _of_sharegpt(row: Place, value: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message of `from` and `value` as one of `role` and `content`."""
    who = value["from"]
    if who not in _SHAREGPT:
        raise row.error(f"{place}.from is {who!r}", f"it must be one of {', '.join(_SHAREGPT)}")
    rest = {name: each for name, each in value.items() if name not in ("from", "value", "role", "content")}
    if who != "function_call":
        return {"role": _SHAREGPT[who], "content": value.get("value"), **rest}
    calls = parsed(row, value.get("value"), f"{place}.value")
    calls = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": "assistant", "content": None, "tool_calls": calls, **rest}


def _content(row: Place, message: Mapping[str, Any], place: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if content and all(isinstance(text, str) for text in texts):
            return "\n".join(str(text) for text in texts)
    if not isinstance(content, str):
        raise row.error(f"no text in the field 'content' of {place}")
    return content


def _trained(row: Place, weight: Any, role: str, place: str) -> bool:
    if weight is None or (weight == 1 and role == "assistant"):
        return True
    if weight != 0:
        hint = "an answer is trained (1, or no weight) or not (0); other messages are never trained"
        raise row.error(f"{place} is {weight!r}", hint)
    return role != "assistant"


def _calls(row: Place, calls: Any, role: str, place: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise row.error(f"{place} belong to the assistant")
    found = []
    for index, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.error(f"{place} must be a list of {{function: {{name, arguments}}}}")
        arguments = parsed(row, function.get("arguments") or {}, f"{place}[{index}].function.arguments")
        if not isinstance(arguments, dict):
            raise row.error(f"{place}[{index}].function.arguments must be an object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        called = {"name": function["name"], "arguments": arguments}
        found.append({**named, "type": "function", "function": called})
    return found
