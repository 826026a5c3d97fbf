"""Prompts in every form that llama.cpp reads: texts, token ids, both mixed, objects, and lists of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topkapi.model.errors import InvalidRequest
from topkapi.service import limits
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.models import LoadedModel
from topkapi.service.prompting import check_count, check_size, checked_ids, raw_tokens


def read_prompts(model: LoadedModel, prompt: Any, field: str = "prompt") -> list[list[int]]:
    """The token ids of each prompt: a list is several, unless it holds a token id itself."""
    if isinstance(prompt, list) and not any(_is_id(part) for part in prompt):
        if not prompt:
            raise InvalidRequest(f"{field} is empty", field=field, hint="send a text or at least one token id")
        check_count(prompt, field)
        return [_one(model, part, f"{field}[{position}]") for position, part in enumerate(prompt)]
    return [_one(model, prompt, field)]


def _one(model: LoadedModel, prompt: Any, field: str) -> list[int]:
    if isinstance(prompt, dict):
        return _of_object(model, prompt, field)
    if isinstance(prompt, str):
        return raw_tokens(model, prompt, field)
    if not isinstance(prompt, list):
        raise InvalidRequest(
            f"{field} must be a text, a list of token ids and texts, or an object with prompt_string", field=field
        )
    if not any(isinstance(part, str) for part in prompt):
        return checked_ids(model, prompt, field)
    return _mixed(model, prompt, field)


def _mixed(model: LoadedModel, parts: Sequence[Any], field: str) -> list[int]:
    token_ids: list[int] = []
    check_size(model, [part for part in parts if isinstance(part, str)], field)
    check_count(parts, field, limits.MOST_TOKENS)
    for position, part in enumerate(parts):
        place = f"{field}[{position}]"
        if isinstance(part, str) and position == 0:
            token_ids += raw_tokens(model, part, place)
        elif isinstance(part, str):
            token_ids += model.checkpoint.tokenizer.encode_with_control(part)
        else:
            try:
                token_ids += checked_ids(model, [part], field)
            except InvalidRequest as error:
                error.message = error.message.replace(f"{field}[0]", place, 1)
                error.field = place
                raise
    return token_ids


def _of_object(model: LoadedModel, prompt: dict[str, Any], field: str) -> list[int]:
    for name in prompt:
        if name != "prompt_string":
            message = (
                f"{field}.{name}: only text is read here" if name == "multimodal_data" else f"unknown field {name}"
            )
            raise InapplicableField(message, field=f"{field}.{name}", hint="send prompt_string alone")
    return raw_tokens(model, prompt.get("prompt_string"), f"{field}.prompt_string")


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
