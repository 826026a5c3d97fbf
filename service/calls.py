"""What is known of the request that is being worked on, wherever that is: on the event loop, on a thread, in a stream's
own task.

It is set once, before anything is done for a request, and read where work begins (on whose behalf, until when) and
where something is told of it (logs, metrics). Work that came by no request, as from Python, has none.
"""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from topkapi.engine.request import NOBODY, Caller
from topkapi.service.keys import Key
from topkapi.service.quotas import Quota

MOST_PARTS = 64
"""Jobs of one request that are told of one by one."""


@dataclass(frozen=True)
class Part:
    """One job of a request's: when it `ended` (`time.monotonic()`), how long it took, and the tokens of it."""

    ended: float
    queue_s: float
    prefill_s: float
    decode_s: float
    read: int
    cached: int
    generated: int


@dataclass(eq=False)
class Call:
    """One request: its name, whose it is, by when it must be done (`time.monotonic()`), and what became of it."""

    identifier: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    key: Key | None = None
    quota: Quota | None = None
    deadline: float | None = None
    timeout_s: float | None = None
    """How long it gave itself when it came in, if it did."""
    model: str | None = None
    refusal: str | None = None
    """The kind of the error that it was answered with, if it was."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    queue_s: float | None = None
    first_token_s: float | None = None
    trace: dict[str, str] | None = None
    """The headers that name its span (`traceparent`), where requests are traced."""
    parts: list[Part] = field(default_factory=list)
    """Its first jobs, where requests are traced."""

    @property
    def caller(self) -> Caller:
        """On whose behalf the engine works for it."""
        return NOBODY if self.key is None else Caller(self.key.name, self.key.priority)


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call | None:
    """The request that is being worked on here."""
    return _current.get()


def enter(call: Call) -> None:
    """From here on, and in whatever begins here, `call` is being worked on."""
    _current.set(call)
