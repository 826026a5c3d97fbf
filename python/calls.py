"""What a caller in Python gives, as the bodies that the routes read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from topkapi.model.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from pydantic import BaseModel

    from topkapi.service.jobs import EngineWork

    Body = TypeVar("Body", bound=BaseModel)

RETRY_SECONDS = 0.05
"""Between two looks at an engine that has no room for more prompts."""

_ELSEWHERE = {
    "model": "a model is what is called here: topkapi.load gives others",
    "stream": "stream() and stream_chat() give the pieces as they come",
    "progress": "without a connection there are no events to tell it by",
    "resumable": "without a connection there is none to be lost",
    "answer_prefix": "an answer that was stopped is gone on with by POST /generate",
    "messages": "chat() takes messages",
    "prompt": "generate() takes a prompt",
}
"""Fields of the route's body that have another form here."""


_CALLS = {"prompt": "generate", "messages": "chat", "text": "score"}


def check_keywords(parameters: Mapping[str, object], source: str) -> None:
    """Raise `InvalidRequest` for what the route would take, but a call for a `source` does not."""
    for name in parameters:
        # What is scored may be choices after a prompt.
        if name in _ELSEWHERE and (source, name) != ("text", "prompt"):
            raise InvalidRequest(f"{name} is not a parameter of {_CALLS[source]}", field=name, hint=_ELSEWHERE[name])


def body_of(schema: type[Body], fields: Mapping[str, Any]) -> Body:
    """The body that the route would read. Raises `InvalidRequest` as the route would answer it."""
    from pydantic import ValidationError

    from topkapi.service.api.http.errors import from_validation

    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        listed = "explained by help(topkapi.DecodingFields)"
        raise from_validation(error.errors(), fields, list(schema.model_fields), listed) from None


def plain(value: Any) -> Any:
    """Tuples, arrays and tensors as the lists that JSON would have."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    return value


def several(prompt: Any) -> bool:
    """Whether what was given are several texts or lists of token ids."""
    prompt = plain(prompt)
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int | float)


def turns(messages: Any, system: str | None) -> Any:
    """A conversation as the route takes it: a text is what a user says."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    elif isinstance(messages, Mapping):
        messages = [messages]
    if system is None:
        return messages
    messages = list(messages)
    if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise InvalidRequest(
            "there is a system message already", field="system", hint="leave out system, or the first message"
        )
    return [{"role": "system", "content": system}, *messages]


def pairs_of(pairs: Any) -> Any:
    """Pairs of a prompt and its completion as the route takes them."""
    if not isinstance(pairs, list):
        return pairs
    return [
        {"prompt": pair[0], "completion": pair[1]} if isinstance(pair, list) and len(pair) == 2 else pair
        for pair in pairs
    ]


@asynccontextmanager
async def running(work: EngineWork[Any]) -> AsyncIterator[None]:
    """`work` begun, and cancelled where the block is left early.

    Where the engine has no room it waits for some: a server refuses then, but these callers have nowhere else to go.
    """
    while True:
        try:
            work.start()
            break
        except Overloaded:
            await asyncio.sleep(RETRY_SECONDS)
    try:
        yield
    finally:
        work.cancel()


async def done(work: EngineWork[Any]) -> None:
    """Have the engine do `work`; cancelled, it ends within a step."""
    async with running(work):
        await work.finish()
