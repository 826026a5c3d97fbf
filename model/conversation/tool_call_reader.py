"""Reads an assistant's answer, as it comes, into text and calls of tools.

A call is found by reading JSON, not by looking for the text that closes it: its fields may come in any order, further
ones may stand among them, and their texts may hold anything, the closing text too. Every character is read once and in
order, so an answer is read alike however it is cut. A call is told of once it is whole: what the end of the answer cut
off (its most tokens, a stop text) could be taken for one and carried out, so it stays text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from topkapi.model.conversation.tool_calls import ToolCallForm


@dataclass(frozen=True)
class Said:
    """Text of the answer that is no call."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call of function `name` with `arguments`, the JSON of an object."""

    name: str
    arguments: str


Event = Said | Call


class ToolCallReader:
    """Reads an answer piece by piece into text and calls of the functions `names`.

    What only looks like a call is text. With a form without prefix the whole answer is one call or none. White space
    around a call is no part of the text, nor of the call: models are not exact about it. Without `several` the answer
    ends with its first call, and what follows is dropped.
    """

    def __init__(self, form: ToolCallForm, names: Sequence[str], *, several: bool = True) -> None:
        self._form, self._names, self._several = form, frozenset(names), several
        self._prefix, self._suffix = form.prefix.strip(), form.suffix.strip()
        self._state = "text" if self._prefix else "call"
        self._held = ""
        self._opening = self._prefix
        """What the call that is being read began with."""
        self._space = ""
        """White space before a call, which is text after all where it is none."""
        self._object = _CallObject()
        self.calls = 0
        """Calls so far."""

    def feed(self, text: str) -> Iterator[Event]:
        """What a further piece of the answer adds."""
        self._held += text
        while True:
            before = (self._state, self._held)
            yield from getattr(self, f"_{self._state}")()
            if (self._state, self._held) == before:
                return

    def flush(self) -> Iterator[Event]:
        """What was held back, once the answer has ended."""
        held, self._held = self._held, ""
        if self._state == "call":
            held = self._not_a_call()
        elif self._state in ("tail", "ended"):
            held = ""
        elif self.calls:
            held = held.rstrip()
        if held:
            yield Said(held)

    def _text(self) -> Iterator[Event]:
        at = self._held.find(self._prefix)
        if at >= 0:
            said = self._held[:at].rstrip()
            self._space, self._held = self._held[len(said) : at], self._held[at + len(self._prefix) :]
            self._state, self._object, self._opening = "call", _CallObject(), self._prefix
        else:
            keep = next(
                (n for n in range(min(len(self._prefix) - 1, len(self._held)), 0, -1)
                 if self._prefix.startswith(self._held[-n:])),
                0,
            )  # fmt: skip
            # White space before a call goes with it, so it waits until text follows.
            said = self._held[: len(self._held) - keep].rstrip()
            self._held = self._held[len(said) :]
        if said:
            yield Said(said)

    def _plain(self) -> Iterator[Event]:
        """Text that no call can follow; white space at the end of an answer with a call waits."""
        said = self._held.rstrip() if self.calls else self._held
        if said:
            self._held = self._held[len(said) :]
            yield Said(said)

    def _not_a_call(self) -> str:
        """What was read as a call's beginning and is text."""
        return self._space + self._opening + self._object.text

    def _call(self) -> Iterator[Event]:
        call = self._object
        while self._held and not call.failed and not call.done:
            self._held = self._held[call.read(self._held) :]
        if not call.done and not call.failed:
            return
        arguments = self._arguments() if call.done else None
        if arguments is not None:
            self._state = "tail" if self._several else "ended"
            self.calls += 1
            yield Call(str(call.fields["name"]), arguments)
        else:
            self._state = "text" if self._prefix else "plain"
            yield Said(self._not_a_call())

    def _arguments(self) -> str | None:
        """The JSON of the arguments of the object that was read; None where it is no call."""
        call = self._object
        if call.fields.get("name") not in self._names:
            return None
        if self._form.arguments not in call.fields:
            return "{}" if self._prefix else None
        value, written = call.fields[self._form.arguments], call.written[self._form.arguments]
        return "{}" if value is None else _object(value if isinstance(value, str) else written)

    def _tail(self) -> Iterator[Event]:
        """What closes a call, if it does."""
        rest = self._held.lstrip()
        if self._suffix.startswith(rest) and rest != self._suffix:
            return
        if self._form.listed and rest.startswith(","):
            self._space, self._held = "", rest[1:]
            self._state, self._object, self._opening = "call", _CallObject(), ","
            return
        if self._suffix and rest.startswith(self._suffix):
            self._held = rest[len(self._suffix) :]
        self._state = "text" if self._prefix else "plain"
        yield from ()

    def _ended(self) -> Iterator[Event]:
        """After the only call."""
        self._held = ""
        yield from ()


class _CallObject:
    """A JSON object as far as it has been read: its own fields, each once its value is whole."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.written: dict[str, str] = {}
        """The fields' values as they were written."""
        self.key = ""
        """The field whose value is being read, or was the last one read."""
        self._opens = ""  # the first character of that value
        self.done = self.failed = False
        self._expected = "{"  # what may come next: { "key" or } "key" : value , (or what closes the object)
        self._read: list[str] = []
        self._value: list[str] = []
        self._begin = 0
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def text(self) -> str:
        """All that was read; in a failed object up to what can't stand in one."""
        return "".join(self._read)

    def read(self, text: str) -> int:
        """Read up to where a value ends or `text` does, and return how many characters that was."""
        self._begin = 0
        stop = len(text)
        for position, character in enumerate(text):
            if self._expected == "value":
                ended = self._value_end(position, character)
                if ended is not None:
                    stop = ended
                    self._end_value(text[self._begin : stop])
                    break
            else:
                self._between(character, position)
                if self.failed or self.done:
                    stop = position + self.done
                    break
        if self._expected == "value" and self._opens:
            self._value.append(text[self._begin : stop])
        self._read.append(text[:stop])
        return stop

    def _value_end(self, position: int, character: str) -> int | None:
        """Where the value ends, if `character` is the last of it or stands right behind it."""
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
            return position + 1 if not self._in_string and self._depth == 0 else None
        if not self._opens:
            if character in _SPACE:
                return None
            self._opens, self._begin = character, position
        elif self._depth == 0 and (character in _SPACE or character in ",}"):  # after a number or a word
            return position
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return position + 1 if self._depth <= 0 else None
        return None

    def _end_value(self, piece: str) -> None:
        self._value.append(piece)
        written = "".join(self._value)
        value = _parsed(written)
        self.failed = value is _INVALID
        self.fields[self.key], self.written[self.key] = value, written
        self._expected = ","

    def _between(self, character: str, position: int) -> None:
        expected = self._expected
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
            self._value.append(character)
            if not self._in_string:
                self.key = str(_parsed("".join(self._value)))
                self._expected = ":"
                self.failed = self.key in self.fields
        elif character in _SPACE:
            return
        elif expected == "{" and character == "{":
            self._expected = '"key" or }'
        elif expected in ('"key"', '"key" or }') and character == '"':
            self._expected, self._in_string, self._value = '"key"', True, [character]
        elif expected == ":" and character == ":":
            self._expected, self._value, self._opens, self._begin, self._depth = "value", [], "", position + 1, 0
        elif expected == "," and character == ",":
            self._expected = '"key"'
        elif expected in (",", '"key" or }') and character == "}":
            self.done = True
        else:
            self.failed = True


_SPACE = " \t\r\n"
_INVALID = object()


def _parsed(text: str) -> Any:
    try:
        # Models break lines inside of texts.
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return _INVALID


def _object(text: str) -> str | None:
    """`text` as JSON that any client can read, if it is an object that can be written so."""
    value = _parsed(text)
    if not isinstance(value, dict):
        return None
    try:
        again = json.dumps(value, ensure_ascii=False, allow_nan=False)
        again.encode()  # halves of characters can be escaped, but not sent
    except (ValueError, RecursionError):
        return None
    try:
        json.loads(text)
    except ValueError:  # for the broken lines
        return again
    return text
