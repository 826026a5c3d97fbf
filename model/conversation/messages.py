"""Messages of a conversation: whether they are well formed, and how they keep from forging control tokens.

Each spelling of a control token inside a content is broken by a private-use character that occurs nowhere else.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from topkapi.model.errors import InvalidRequest
from topkapi.model.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`role` and `content`; `tool_calls` and `reasoning_content` of an assistant, `tool_call_id` and `name` of a tool's
answer. `tool_calls` hold `{"type": "function", "id", "function": {"name", "arguments"}}` with the arguments as an
object. `thinking` and `reasoning` are other names of `reasoning_content`. What is None is left out."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field that holds what an assistant thought."""

_ROLE = re.compile(r"[A-Za-z0-9_.-]+")
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def check_messages(messages: object) -> None:
    """Raise InvalidRequest naming what is malformed in `messages`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequest("messages must be a list", field="messages", hint=_SHAPE)
    if not messages:
        raise InvalidRequest("messages is empty", field="messages", hint=_SHAPE)
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{field} must be an object", field=field, hint=_SHAPE)
        for key in ("role", "content"):
            if key not in message:
                raise InvalidRequest(f"{field} has no {key}", field=f"{field}.{key}", hint=_SHAPE)
            if not isinstance(message[key], str):
                kind = type(message[key]).__name__
                raise InvalidRequest(f"{field}.{key} must be a string, not {kind}", field=f"{field}.{key}", hint=_SHAPE)
        for key in message:
            if key not in ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING):
                raise InvalidRequest(f"{field} has an unknown key {key!r}", field=f"{field}.{key}", hint=_SHAPE)
            if key in REASONING and not isinstance(message[key], str | None):
                raise InvalidRequest(f"{field}.{key} must be a string", field=f"{field}.{key}", hint=_SHAPE)
        if not _ROLE.fullmatch(message["role"]):
            raise InvalidRequest(
                f"{field}.role must be a name of letters, digits, '_', '.' or '-'", field=f"{field}.role", hint=_SHAPE
            )
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest(
                f"{field}.content holds a lone surrogate", field=f"{field}.content", hint="send valid Unicode"
            ) from None


_SHAPE = 'a message is {"role": "user", "content": "…"}; the roles are system, user and assistant'


def as_templates_read_it(message: Message) -> dict[str, Any]:
    """`message` without what is None, and with its reasoning under the names that transformers gives it."""
    said = {name: value for name, value in message.items() if value is not None}
    reasoning = next((said[name] for name in REASONING if name in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def texts(value: object) -> Iterator[str]:
    """Every text in a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from (str(name), *texts(each))
    elif isinstance(value, Sequence):
        for each in value:
            yield from texts(each)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` made to every text in it, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(name)): mapped(each, change) for name, each in value.items()}
    return [mapped(each, change) for each in value] if isinstance(value, Sequence) else value


def broken_by(content: str, tokenizer: Tokenizer, mark: str) -> str:
    """`content` with `mark` inside each control token's spelling, also inside one that its borders may cut."""
    spellings = list(tokenizer.control_tokens)
    for spelling in spellings:
        if len(spelling) == 1 and spelling in content:
            raise InvalidRequest(
                f"a message contains {spelling!r}, which is a control token of this checkpoint",
                field="messages",
                hint="remove that character from the message",
            )
    places: set[int] = set()
    for spelling in spellings:
        found = content.find(spelling)
        while found >= 0:
            places.add(found + 1)
            found = content.find(spelling, found + 1)
    # What a template places next to the content could complete a spelling, with or without trimming the content.
    longest = max(map(len, spellings), default=0)
    for end in {len(content), len(content.rstrip())}:
        for size in range(1, min(longest, end + 1)):
            tail = content[end - size : end]
            if any(len(spelling) > size and spelling.startswith(tail) for spelling in spellings):
                places.add(end - size + 1)
    for start in {0, len(content) - len(content.lstrip())}:
        for size in range(1, min(longest, len(content) - start + 1)):
            head = content[start : start + size]
            if any(len(spelling) > size and spelling.endswith(head) for spelling in spellings):
                places.add(start)
    core = content.strip()
    if core and any(core in spelling for spelling in spellings):
        places.add(content.index(core))
    cuts = [0, *sorted(places), len(content)]
    return mark.join(content[a:b] for a, b in pairwise(cuts)) if places else content


def unmarked(pieces: Iterable[str | int], mark: str) -> list[str | int]:
    """`pieces` without `mark` in their texts, and without empty texts."""
    plain = (piece if isinstance(piece, int) else piece.replace(mark, "") for piece in pieces)
    return [piece for piece in plain if piece != ""]


def unused_characters(count: int, text: str) -> list[str]:
    """Private-use characters that do not occur in `text`."""
    used = set(text)
    found = (chr(code) for block in _PRIVATE_USE for code in block if chr(code) not in used)
    return [next(found) for _ in range(count)]
