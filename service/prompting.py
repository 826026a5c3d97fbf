"""What a caller sends as a prompt, a text or a conversation, as token ids.

No token is added to a text: it is continued, or scored, as it is. A conversation goes through the checkpoint's own
chat template, the one it was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from topkapi.model.conversation.reasoning import ReasoningReader, opened_by, reasons
from topkapi.model.decoding.thinking import CLOSE, marks_of, thought_tokens
from topkapi.model.errors import ContextExceeded, InvalidRequest, TextTooLong
from topkapi.model.interruption import between_pieces
from topkapi.service import limits
from topkapi.service.models import LoadedModel

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
    check_count(prompt, field)
    return [tokens_of(model, entry, f"{field}[{position}]") for position, entry in enumerate(prompt)]


def require_one(given: Sequence[str], allowed: str) -> str:
    """The one field of `given`. Raises `InvalidRequest` where there are none or several."""
    if len(given) == 1:
        return given[0]
    if not given:
        raise InvalidRequest(f"send one of {allowed}")
    raise InvalidRequest(f"{' and '.join(given)} exclude each other", field=given[1], hint=f"send one of {allowed}")


def check_count(entries: Sequence[object], field: str, most: int = limits.MOST_PROMPTS) -> None:
    """Raise `InvalidRequest` naming `field` where a list has more entries than a request may."""
    if len(entries) > most:
        message = f"{field} has {len(entries):,} entries, and {most:,} is the most"
        raise InvalidRequest(message, field=field, hint="send several requests")


def tokens_of(model: LoadedModel, source: object, field: str, *, fits: bool = True) -> list[int]:
    """The token ids of one text, or one list of ids after checking it. Raises as `text_tokens` and `checked_ids`."""
    if isinstance(source, str):
        return text_tokens(model, source, field, fits=fits)
    if isinstance(source, list):
        return checked_ids(model, source, field, fits=fits)
    raise InvalidRequest(f"{field} must be a text or a list of token ids, not {_kind(source)}", field=field)


def text_tokens(model: LoadedModel, text: object, field: str, *, fits: bool = True) -> list[int]:
    """The token ids of one text, which `fits` says must fit into the context.

    Raises `InvalidRequest` naming `field` where it is empty, no text, or too long to be looked at.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a text, not {_kind(text)}", field=field)
    if not text:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send a text of at least one character")
    check_size(model, [text], field, fits=fits)
    return model.checkpoint.tokenizer.encode(text)


def check_size(model: LoadedModel, texts: Sequence[str], field: str, *, fits: bool = True) -> None:
    """Refuse, before anything is done with them, texts that are too long together, naming `field`.

    Those that must fit into the context (`fits`) are so long as its tokens are at most; others have a limit of their
    own. Raises `TextTooLong` and `InvalidRequest`.
    """
    between_pieces()
    tokenizer, context = model.checkpoint.tokenizer, model.context_length
    most = context * tokenizer.longest_token if fits else limits.LONGEST_TEXT
    size = 0
    for text in texts:
        # Characters have at most four bytes, so most texts need not be measured.
        size += len(text) if size + 4 * len(text) <= most else len(text.encode("utf-8", "replace"))
    if size > most and fits:
        raise TextTooLong(
            f"{field} has {size:,} bytes of text, but the context holds {context:,} tokens, which are {most:,} at most",
            field=field,
            hint="shorten it",
            tokens=-(-size // tokenizer.longest_token),
            context_length=context,
        )
    if size > most:
        raise InvalidRequest(
            f"{field} has {size:,} bytes of text, and {most:,} is the most", field=field, hint="send it in parts"
        )
    for text in texts:
        if len(text) > limits.MOST_UNCUT and any(len(each) > limits.MOST_UNCUT for each in tokenizer.pieces(text)):
            raise InvalidRequest(
                f"{field} has more than {limits.MOST_UNCUT:,} characters without a space between words or a new line",
                field=field,
                hint="send it in parts",
            )


def raw_tokens(model: LoadedModel, text: object, field: str, *, fits: bool = True) -> list[int]:
    """The token ids of a text whose author places control tokens, as TGI and llama.cpp read their prompts.

    A control token spelled out in it is that token, and the checkpoint's begin token comes first where its own tools
    put one. Raises `InvalidRequest` naming `field` where it is empty or no text.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a text, not {_kind(text)}", field=field)
    if not text:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send a text of at least one character")
    check_size(model, [text], field, fits=fits)
    tokenizer = model.checkpoint.tokenizer
    token_ids = tokenizer.encode_with_control(text)
    begin = tokenizer.begin_token_id
    if begin is not None and tokenizer.adds_begin_token and token_ids[:1] != [begin]:
        return [begin, *token_ids]
    return token_ids


def checked_ids(model: LoadedModel, token_ids: object, field: str, *, fits: bool = True) -> list[int]:
    """`token_ids` if it is a list of the vocabulary's ids. Raises `InvalidRequest` naming the position otherwise.

    Of those that must fit into the context (`fits`), more are not looked at.
    """
    if not isinstance(token_ids, list):
        raise InvalidRequest(f"{field} must be a list of token ids, not {_kind(token_ids)}", field=field)
    if not token_ids:
        raise InvalidRequest(f"{field} is empty", field=field, hint="send at least one token id")
    if fits and len(token_ids) > model.context_length:
        raise ContextExceeded(
            f"{field} has {len(token_ids):,} tokens, and the context holds {model.context_length:,}",
            field=field,
            hint="shorten it",
            tokens=len(token_ids),
            context_length=model.context_length,
        )
    check_count(token_ids, field, limits.MOST_TOKENS)
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
    Raises `InvalidRequest` where the checkpoint has no chat template, its template refuses the conversation, or this is
    too long to fit into the context.
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
    check_conversation(model, messages, tools, variables)
    turns = [dict(message) for message in messages]
    return checkpoint.chat.encode(turns, checkpoint.tokenizer, tools=tools or None, given=variables).token_ids


def check_conversation(
    model: LoadedModel,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Raise `InvalidRequest` for a conversation that is too long, or whose tools are, to be made a prompt of.

    And for calls that the checkpoint's template would not show.
    """
    chat = model.checkpoint.chat
    if chat is not None and "tool_calls" not in chat.source and any(message.get("tool_calls") for message in messages):
        raise InvalidRequest(
            "the checkpoint's chat template has no place for tool_calls, so it can't be shown them",
            field="messages",
            hint="leave the calls and their answers out, or choose a checkpoint whose template takes tools",
        )
    check_count(messages, "messages", limits.MOST_MESSAGES)
    check_size(model, list(_texts(messages)), "messages")
    check_size(model, list(_texts(tools)), "tools")
    check_size(model, list(_texts(variables)), "chat_template_kwargs")


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield str(name)
            yield from _texts(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each)


def continued_tokens(model: LoadedModel, begun: str) -> list[int]:
    """The token ids of an answer's beginning that the caller says, to follow those of its conversation."""
    check_size(model, [begun], "messages")
    # Encoded as the middle of a text, where no vocabulary puts a space before it.
    return model.checkpoint.tokenizer.encode_parts([["\n"], [begun] if begun else []])[1]


def thinks(model: LoadedModel) -> bool:
    """Whether the checkpoint's chat template knows of thinking before an answer."""
    chat = model.checkpoint.chat
    return chat is not None and reasons(chat.source)


def reasoning_reader(model: LoadedModel, prompt: Sequence[int]) -> ReasoningReader | None:
    """What keeps the reasoning of an answer to `prompt` apart, where the checkpoint's template knows of any."""
    return ReasoningReader(opened=_opened(model, prompt)) if thinks(model) else None


def without_thinking(model: LoadedModel, prompt: list[int]) -> list[int]:
    """`prompt`, and where the template has begun to think, the end of that, as templates write it for no thinking."""
    if not (thinks(model) and _opened(model, prompt)):
        return prompt
    return prompt + model.checkpoint.tokenizer.encode_with_control(f"\n{CLOSE}\n\n")


def thinking_tokens(model: LoadedModel, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """How many tokens of an answer to `prompt` are thought."""
    if not thinks(model):
        return 0
    return thought_tokens([*prompt, *answer], len(prompt), marks_of(model.checkpoint.tokenizer))


def _opened(model: LoadedModel, prompt: Sequence[int]) -> bool:
    return opened_by(model.checkpoint.tokenizer.decode(prompt[-16:]))


def fit_conversation(model: LoadedModel, messages: Sequence[Message], answer_tokens: int) -> tuple[list[Message], int]:
    """The newest part of a conversation that leaves room for an answer, and how many older messages it lost.

    A leading system message stays; the rest loses whole exchanges, oldest first, and always keeps the last message.
    """
    kept = list(messages)
    head = 1 if kept and kept[0]["role"] == "system" else 0
    room = model.context_length - min(answer_tokens, model.context_length // 4)
    # What can't fit by its size alone is not rendered again and again to find that out.
    most = model.context_length * model.checkpoint.tokenizer.longest_token
    sizes = [len(message["content"].encode("utf-8", "replace")) for message in kept]
    while len(kept) > head + 1 and (
        sum(sizes) > most or len(kept) > limits.MOST_MESSAGES or len(conversation_tokens(model, kept)) > room
    ):
        del kept[head], sizes[head]
        while len(kept) > head + 1 and kept[head]["role"] != "user":
            del kept[head], sizes[head]
    return kept, len(messages) - len(kept)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _kind(value: object) -> str:
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
