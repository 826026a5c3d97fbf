"""What becomes of the simplest conversations by a chat template: told when it's loaded, not at each request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topkapi.model.conversation.chat_template import ChatTemplate, Message, TooExpensive
from topkapi.model.conversation.template_bounds import bounded
from topkapi.model.errors import CheckpointError, TopkapiError
from topkapi.model.text.tokenizer import Tokenizer

_WORD = "probe"
_SYSTEM, _USER, _ASSISTANT = ({"role": role, "content": _WORD} for role in ("system", "user", "assistant"))


def try_template(chat: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What is wrong with a template, in words for whoever loads it.

    Raises `CheckpointError` for one that fails on every conversation. One that may need variables, or has others by its
    side, may do for some requests.
    """
    with bounded():
        first = _problem(chat, tokenizer, [_USER])
        if first is not None and _problem(chat, tokenizer, [_SYSTEM, _USER]) is not None:
            if not chat.variables and not chat.others:
                raise CheckpointError(
                    f"the chat template cannot be used, whatever the conversation: {first}",
                    hint="give the checkpoint another chat template, or take it out to serve the checkpoint as a base",
                )
            return [f"without further variables or tools, the chat template cannot be used: {first}"]
        if first is not None:
            return [f"without a system message, the chat template cannot be used: {first}"]
        further = _problem(chat, tokenizer, [_USER, _ASSISTANT, _USER])
        if further is not None:
            return [f"the chat template cannot be used after a first answer: {further}"]
        variables: dict[str, Any] = dict(tokenizer.special_tokens)
        shown = chat.render([_USER, _ASSISTANT, _USER], **variables)
    return [] if shown.lower().count(_WORD) > 1 else ["the chat template does not show what the user says"]


def _problem(chat: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> str | None:
    """Why a conversation cannot be answered, if so."""
    try:
        return None if chat.encode(messages, tokenizer).token_ids else "it renders nothing"
    except TooExpensive as error:
        raise CheckpointError(f"the chat template cannot be used: {error.__cause__}") from error
    except TopkapiError as error:
        return error.message
