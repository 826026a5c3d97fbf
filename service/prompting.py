"""What a caller sends as a prompt, a text or a conversation, as token ids.

No token is added to a text: it is continued, or scored, as it is. A conversation goes through the checkpoint's own
chat template, the one it was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import InvalidRequest
from service.models import LoadedModel

Message = Mapping[str, Any]


def prompt_tokens(model: LoadedModel, prompt: object, field: str = "prompt") -> list[list[int]]:
    """The token ids of each prompt in `prompt`: a text, a list of token ids, or a list of either.

    Raises `InvalidRequest` naming the position for anything else, for an empty prompt and for an id outside the
    vocabulary.
    """
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_number(prompt[0])):
        return [tokens_of(model, prompt, field)]
    if not isinstance(prompt, list):
        expected = "a text, a list of token ids, or a list of either"
        raise InvalidRequest(f"{field} must be {expected}, not {_kind(prompt)}", field=field)
    if not prompt:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send a text or at least one token id")
    return [tokens_of(model, entry, f"{field}[{position}]") for position, entry in enumerate(prompt)]


def tokens_of(model: LoadedModel, source: object, field: str) -> list[int]:
    """The token ids of one text, or one list of ids after checking it. Raises `InvalidRequest` naming `field`."""
    if isinstance(source, str):
        return text_tokens(model, source, field)
    if isinstance(source, list):
        return checked_ids(model, source, field)
    raise InvalidRequest(f"{field} must be a text or a list of token ids, not {_kind(source)}", field=field)


def text_tokens(model: LoadedModel, text: object, field: str) -> list[int]:
    """The token ids of one text. Raises `InvalidRequest` naming `field` where it is empty or no text."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a text, not {_kind(text)}", field=field)
    if not text:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send a text of at least one character")
    return model.checkpoint.tokenizer.encode(text)


def raw_tokens(model: LoadedModel, text: object, field: str) -> list[int]:
    """The token ids of a text whose author places control tokens, as TGI and llama.cpp read their prompts.

    A control token spelled out in it is that token, and the checkpoint's begin token comes first where its own tools
    put one. Raises `InvalidRequest` naming `field` where it is empty or no text.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a text, not {_kind(text)}", field=field)
    if not text:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send a text of at least one character")
    tokenizer = model.checkpoint.tokenizer
    token_ids = tokenizer.encode_with_control(text)
    begin = tokenizer.begin_token_id
    if begin is not None and tokenizer.adds_begin_token and token_ids[:1] != [begin]:
        return [begin, *token_ids]
    return token_ids


def checked_ids(model: LoadedModel, token_ids: object, field: str) -> list[int]:
    """`token_ids` if it is a list of the vocabulary's ids. Raises `InvalidRequest` naming the position otherwise."""
    if not isinstance(token_ids, list):
        raise InvalidRequest(f"{field} must be a list of token ids, not {_kind(token_ids)}", field=field)
    if not token_ids:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send at least one token id")
    size = model.checkpoint.tokenizer.vocab_size
    token_ids = [int(each) if isinstance(each, float) and each.is_integer() else each for each in token_ids]
    for position, token_id in enumerate(token_ids):
        at = f"{field}[{position}]"
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise InvalidRequest(f"{at} must be a token id (a whole number), not {_kind(token_id)}", field=at)
        if not 0 <= token_id < size:
            raise InvalidRequest(
                f"{at} is {token_id}, but {model.name} has the token ids 0 to {size - 1}",
                field=at,
                hint="token ids belong to one checkpoint's vocabulary: get them from its /tokenize",
            )
    return token_ids


def conversation_tokens(
    model: LoadedModel,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a conversation up to where the assistant's answer begins.

    The template is also given `tools`, where there are any, and `variables`, whose texts are no more trusted than those
    of messages.
    Raises `InvalidRequest` where the checkpoint has no chat template or its template refuses the conversation.
    """
    if not messages:
        raise InvalidRequest("messages is empty", field="messages", hint='send at least one {"role", "content"}')
    checkpoint = model.checkpoint
    if checkpoint.chat is None:
        raise InvalidRequest(
            f"{model.name} is a base checkpoint without a chat template, so it cannot take messages",
            field="messages",
            hint="send prompt for it to continue, or choose a chat checkpoint with model",
        )
    if "tool_calls" not in checkpoint.chat.source and any(message.get("tool_calls") for message in messages):
        raise InvalidRequest(
            "the checkpoint's chat template has no place for tool_calls, so it can't be shown them",
            field="messages",
            hint="leave the calls and their answers out, or choose a checkpoint whose template takes tools",
        )
    turns = [dict(message) for message in messages]
    return checkpoint.chat.encode(turns, checkpoint.tokenizer, tools=tools or None, given=variables).token_ids


def continued_tokens(model: LoadedModel, begun: str) -> list[int]:
    """The token ids of an answer's beginning that the caller says, to follow those of its conversation."""
    # Encoded as the middle of a text, where no vocabulary puts a space before it.
    return model.checkpoint.tokenizer.encode_parts([["\n"], [begun] if begun else []])[1]


def fit_conversation(model: LoadedModel, messages: Sequence[Message], answer_tokens: int) -> tuple[list[Message], int]:
    """The newest part of a conversation that leaves room for an answer, and how many older messages it lost.

    A leading system message stays; the rest loses whole exchanges, oldest first, and always keeps the last message.
    """
    kept = list(messages)
    head = 1 if kept and kept[0]["role"] == "system" else 0
    room = model.context_length - min(answer_tokens, model.context_length // 4)
    while len(kept) > head + 1 and len(conversation_tokens(model, kept)) > room:
        del kept[head]
        while len(kept) > head + 1 and kept[head]["role"] != "user":
            del kept[head]
    return kept, len(messages) - len(kept)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _kind(value: object) -> str:
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
