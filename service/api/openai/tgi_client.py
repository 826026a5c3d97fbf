"""What the client `text-generation` expects of OpenAI's chat: TGI's name for any checkpoint, and stricter chunks."""

from __future__ import annotations

from typing import Any

from topkapi.model.errors import UnknownModel
from topkapi.service.api.openai.fields import CommonFields
from topkapi.service.models import LoadedModel, Models

TGI, HUB = "tgi", "dummy"
"""What `text-generation` and `huggingface_hub` call whatever checkpoint is served."""

_FIELDS = {
    "model", "messages", "repetition_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs",
    "max_tokens", "n", "presence_penalty", "stream", "seed", "temperature", "top_p", "tools", "tool_choice",
}  # fmt: skip
"""What the client sends, all of it, with nulls for what is not set."""


def chosen(models: Models, name: str | None) -> LoadedModel:
    """The checkpoint of that name; for a name of TGI's clients that none has, the default. Raises `UnknownModel`."""
    try:
        return models.get(name)
    except UnknownModel:
        if name in (TGI, HUB):
            return models.get()
        raise


def is_tgi_client(body: CommonFields) -> bool:
    """Whether a body is that client's: no other one spells out all of these fields, and that name."""
    return body.model == TGI and body.model_fields_set == _FIELDS


class AsItReads:
    """The chunks of a stream with what it demands of each: the role, and tool calls one at a time, or none."""

    def __init__(self) -> None:
        self._identifiers: dict[tuple[int, int], str] = {}

    def choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice as it reads it."""
        delta = choice["delta"]
        read: dict[str, Any] = {"role": "assistant", "content": delta.get("content"), "tool_calls": None}
        for call in delta.get("tool_calls", []):
            identifier = self._identifiers.setdefault((choice["index"], call["index"]), call.get("id", ""))
            function = {"name": call["function"].get("name"), "arguments": call["function"]["arguments"]}
            read["tool_calls"] = {"index": call["index"], "id": identifier, "type": "function", "function": function}
        return choice | {"delta": read}
