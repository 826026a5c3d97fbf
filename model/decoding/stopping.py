"""Where an answer ends: what the context has room for, end tokens, and stop strings and expressions in its text.

Text is released only when it can no longer change: a multi-byte character, a stop string, or what a regular expression
may still match, never leaks in halves.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Self

import regex

from topkapi.model.config import ModelConfig
from topkapi.model.decoding.table import DecodingParameters
from topkapi.model.errors import ContextExceeded, InvalidRequest

TokenBytes = Callable[[int], bytes]
SEARCH_SECONDS = 0.1
"""What all searches for one token may take together: they hold the interpreter."""


def check_prompt(prompt: Sequence[int], config: ModelConfig, field: str = "prompt") -> None:
    """Raise `InvalidRequest` for a prompt (in `field`) the network cannot continue."""
    name = f"the {field.replace('_', ' ')}"
    if not prompt:
        raise InvalidRequest(f"{name} is empty", field=field, hint="give at least one token to continue from")
    if len(prompt) >= config.context_length:
        raise ContextExceeded(
            f"{name} has {len(prompt)} tokens, the context holds {config.context_length} and the answer needs room",
            field=field,
            hint=f"shorten the prompt to at most {config.context_length - 1} tokens{config.context_note}",
            tokens=len(prompt),
            context_length=config.context_length,
        )
    wrong = next((token_id for token_id in prompt if not 0 <= token_id < config.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"token id {wrong} is not in the vocabulary (0 to {config.vocab_size - 1})", field=field)


def token_limit(prompt_length: int, parameters: DecodingParameters, config: ModelConfig) -> int:
    """Most tokens that may be generated: `max_tokens`, or what the context has room for."""
    room = config.context_length - prompt_length
    wanted = parameters.max_tokens
    return room if wanted is None else min(wanted, room)


def ends_sequence(token_id: int, parameters: DecodingParameters, config: ModelConfig) -> bool:
    """Whether this token ends the answer."""
    return token_id in ending_tokens(parameters, config)


def ending_tokens(parameters: DecodingParameters, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end the answer."""
    return (*parameters.stop_token_ids, *(() if parameters.ignore_end_token else config.end_token_ids))


class Stopper:
    """Turns the tokens of one sequence into text and watches for stop strings.

    `token_bytes(token_id)` gives a token's bytes (empty for control tokens). Call `feed` for each token in order and
    `flush` once at the end. `stopped` is the stop string that was found, or None; the text ends before it, or with
    it if `include` is set.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = (), *, include: bool = False) -> None:
        self._token_bytes = token_bytes
        self._stops = [(text, text.encode("utf-8")) for text in stop]
        self._include = include
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self.stopped: str | None = None

    @staticmethod
    def of(token_bytes: TokenBytes, parameters: DecodingParameters) -> Stopper:
        """For a request's effective parameters `stop`, `stop_regex` and `include_stop`."""
        stop, patterns, include = parameters.stop, parameters.stop_regex, parameters.include_stop
        if patterns:
            return PatternStopper(token_bytes, stop, patterns, include=include)
        return Stopper(token_bytes, stop, include=include)

    def copy(self) -> Self:
        """The same place in the text, to go on from independently."""
        other = copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        other._decoder.setstate(self._decoder.getstate())
        return other

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; empty once a stop was found."""
        if self.stopped is not None:
            return ""
        if not self._stops:
            return self._decoder.decode(self._token_bytes(token_id))
        self._held += self._token_bytes(token_id)
        found = [(at, text, raw) for text, raw in self._stops if (at := self._held.find(raw)) >= 0]
        if found:
            at, self.stopped, raw = min(found, key=lambda match: (match[0], -len(match[1])))
            released, self._held = self._held[: at + (len(raw) if self._include else 0)], b""
            return self._decoder.decode(released, final=True)
        keep = self._held_back()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._decoder.decode(released)

    def flush(self) -> str:
        """What was held back, once nothing more will come; invalid UTF-8 becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        released, self._held = self._held, b""
        return self._decoder.decode(released, final=True)

    def _held_back(self) -> int:
        """Length of the longest tail that a stop string could begin with."""
        longest = max((len(raw) - 1 for _, raw in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(raw.startswith(tail) for _, raw in self._stops):
                return size
        return 0


class PatternStopper(Stopper):
    """Watches for regular expressions, and stop strings, character by character.

    The text stops at the first character with which one of them matches, however the characters were cut into
    tokens; `stopped` is the expression, or the stop string, as it was given. An expression that takes too long
    raises `InvalidRequest`.
    """

    def __init__(
        self, token_bytes: TokenBytes, stop: Sequence[str], patterns: Sequence[str], *, include: bool = False
    ) -> None:
        super().__init__(token_bytes, (), include=include)
        self._patterns = [(text, regex.compile(regex.escape(text))) for text in stop]
        self._patterns += [(text, regex.compile(text)) for text in patterns]
        self._text = ""
        self._sent = 0
        self._until = 0.0

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; empty once a stop was found."""
        return "" if self.stopped is not None else self._add(self._decoder.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """What was held back, once nothing more will come."""
        if self.stopped is not None:
            return ""
        released = self._add(self._decoder.decode(b"", final=True))
        return released if self.stopped is not None else released + self._release(len(self._text))

    def _add(self, characters: str) -> str:
        self._until = time.monotonic() + SEARCH_SECONDS
        for character in characters:
            self._text += character
            found = [(text, match) for text, pattern in self._patterns if (match := self._search(pattern)) is not None]
            if found:
                self.stopped, match = min(found, key=lambda each: (each[1].start(), -each[1].end()))
                return self._release(match.end() if self._include else match.start())
        partial = [self._search(pattern, partial=True) for _, pattern in self._patterns]
        return self._release(min((match.start() for match in partial if match is not None), default=len(self._text)))

    def _search(self, pattern: Any, partial: bool = False) -> Any:
        """A match in the text not yet sent, which what was sent before may lead up to."""
        try:
            left = max(self._until - time.monotonic(), 0.001)
            return pattern.search(self._text, self._sent, partial=partial, timeout=left)
        except TimeoutError:
            raise InvalidRequest(
                f"stop_regex {pattern.pattern!r} takes too long to search for",
                field="stop_regex",
                hint="avoid nested repetitions such as (a+)+",
            ) from None

    def _release(self, end: int) -> str:
        released, self._sent = self._text[self._sent : end], max(end, self._sent)
        return released
