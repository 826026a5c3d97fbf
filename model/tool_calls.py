"""Calls of tools in an assistant's text: the form that a chat template gives them, as a grammar and as a reader.

No two families write calls alike, and a checkpoint says only by its chat template how it does. So the template is
asked: a conversation with a call is rendered, and what stands around the call's JSON is the form. Known to be read
that way: Hermes and Qwen (`<tool_call>` around `{"name", "arguments"}`), Llama 3 (`{"name", "parameters"}` alone).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.chat import ChatTemplate
from model.errors import InvalidRequest, TopkapiError
from model.tokenizer import Tokenizer

_NAME, _ARGUMENT = "probe_function", "probe_argument"
_PROBE = {"type": "function", "id": "call00000", "function": {"name": _NAME, "arguments": {_ARGUMENT: "probe"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_ARGUMENT: {"type": "string", "description": "A probe."}}},
    },
}
_STRING = r'"(?:[^"\\]|\\.)*"'


@dataclass(frozen=True)
class ToolCallForm:
    """A call is `prefix`, a JSON object of the function's name and of its arguments under `arguments`, and `suffix`.

    `separator` stands between the suffix of one call and the prefix of the next; None where a template has only one.
    """

    prefix: str
    arguments: str
    suffix: str
    separator: str | None

    @staticmethod
    def of(template: ChatTemplate, tokenizer: Tokenizer) -> ToolCallForm:
        """The form that `template` gives calls. Raises `InvalidRequest` for one that takes no tools or hides it."""
        if not template.takes_tools:
            raise InvalidRequest(
                "the checkpoint's chat template takes no tools",
                field="tools",
                hint="choose a checkpoint that was trained on tools",
            )
        one = _answer(template, tokenizer, 1)
        found = _call_in(one, 0)
        if found is None:
            raise InvalidRequest(
                "the checkpoint's chat template writes calls in a form that is not read here: not as JSON with a name",
                field="tools",
            )
        start, end, arguments = found
        prefix, suffix = one[:start], one[end:]
        try:
            two = _answer(template, tokenizer, 2)
        except InvalidRequest:
            return ToolCallForm(prefix, arguments, suffix, None)
        second = _call_in(two, end)
        between = two[end : second[0]] if second is not None else ""
        # What stands before every call: the first one may come after a block of reasoning too.
        size = next(size for size in range(len(between), -1, -1) if prefix.endswith(between[len(between) - size :]))
        common = between[len(between) - size :].lstrip()
        if not between.startswith(suffix) or not common or len(suffix) + len(common) > len(between):
            return ToolCallForm(prefix, arguments, suffix, None)
        return ToolCallForm(common, arguments, suffix, between[len(suffix) : len(between) - len(common)])

    def grammar(self, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        """A grammar, in Lark's notation, of one call of one of the functions `tools`, or of `several` calls."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, self.arguments: parameters_of(tool)},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        guidance = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        schema = json.dumps({"anyOf": calls, "x-guidance": guidance})
        around = [json.dumps(text) for text in (self.prefix, self.suffix) if text]
        parts = [around[0], "call", *around[1:]] if self.prefix else ["call", *around]
        more = f" ({json.dumps(self.separator)} one)*" if self.separator else " one*" if self.separator == "" else ""
        return f"start: one{more if several else ''}\none: {' '.join(parts)}\ncall: %json {schema}"


def parameters_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; without one it takes none."""
    schema = tool.get("parameters")
    return dict(schema) if schema else {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Said:
    """Text of the answer that is no call."""

    text: str


@dataclass(frozen=True)
class CallBegan:
    """A call of function `name`."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """A further piece of the JSON of the arguments of the call that began last."""

    text: str


Event = Said | CallBegan | CallArguments


class ToolCallReader:
    """Reads an answer piece by piece into text and calls of the functions `names`.

    What only looks like a call is text. With a form without prefix the whole answer is one call or none.
    """

    def __init__(self, form: ToolCallForm, names: Sequence[str]) -> None:
        self._form, self._names = form, frozenset(names)
        # White space around a call is no part of it: models are not exact about it.
        self._prefix, self._suffix = form.prefix.strip(), form.suffix.strip()
        self._head = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"{re.escape(form.arguments)}"\s*:\s*(?=\{{)')
        self._state = "text" if self._prefix else "call"
        self._held = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self.calls = 0
        """Calls that have begun."""

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
            yield from self._whole(held)
        elif self._state == "text" and (held := held.rstrip() if self.calls else held):
            yield Said(held)

    def _text(self) -> Iterator[Event]:
        at = self._held.find(self._prefix)
        if at >= 0:
            said, self._held = self._held[:at].rstrip(), self._held[at + len(self._prefix) :]
            self._state = "call"
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

    def _call(self) -> Iterator[Event]:
        head = self._head.match(self._held)
        if head is not None and (name := _unquoted(head[1])) in self._names:
            self._held = self._held[head.end() :]
            self._state, self._depth = "arguments", 0
            self.calls += 1
            yield CallBegan(name)
        elif self._suffix and (at := self._held.find(self._suffix)) >= 0:
            whole, self._held = self._held[:at], self._held[at + len(self._suffix) :]
            self._state = "text"
            yield from self._whole(whole, self._suffix)
        elif not self._prefix and self._held.strip() and not self._held.lstrip().startswith("{"):
            # Without a prefix, only an answer that begins like JSON can be a call.
            said, self._held = self._held, ""
            self._state = "plain"
            yield Said(said)

    def _plain(self) -> Iterator[Event]:
        if self._held:
            said, self._held = self._held, ""
            yield Said(said)

    def _arguments(self) -> Iterator[Event]:
        for position, character in enumerate(self._held):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    written, self._held = self._held[: position + 1], self._held[position + 1 :]
                    self._state = "tail"
                    yield CallArguments(written)
                    return
        if self._held:
            written, self._held = self._held, ""
            yield CallArguments(written)

    def _tail(self) -> Iterator[Event]:
        """What closes a call: its own brace and the suffix."""
        closing = "}" + self._suffix
        rest = self._held
        at = 0
        for character in rest:
            if closing and character == closing[0]:
                closing = closing[1:]
            elif not character.isspace() or not closing:
                break
            at += 1
            if not closing:
                break
        if at == len(rest) and closing:
            return
        self._held = rest[at:]
        self._state = "text" if self._prefix else "plain"
        yield from ()

    def _whole(self, text: str, suffix: str = "") -> Iterator[Event]:
        """A call whose fields come in another order, or text that is none."""
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if (
            isinstance(value, dict)
            and value.get("name") in self._names
            and isinstance(value.get(self._form.arguments), dict)
        ):
            self.calls += 1
            yield CallBegan(value["name"])
            yield CallArguments(json.dumps(value[self._form.arguments], ensure_ascii=False))
        elif self._prefix or text:
            yield Said(self._prefix + text + suffix)


def _answer(template: ChatTemplate, tokenizer: Tokenizer, calls: int) -> str:
    """What the assistant says in a rendered conversation in which it makes `calls` calls, control tokens left out."""
    question = [{"role": "user", "content": "Go."}]
    answer = {"role": "assistant", "content": "", "tool_calls": [_PROBE] * calls}
    try:
        before = template.render(question, tools=[_TOOL])
        whole = template.render([*question, answer], add_generation_prompt=False, tools=[_TOOL])
    except TopkapiError as error:
        raise InvalidRequest(f"the checkpoint's chat template refuses calls: {error.message}", field="tools") from None
    start = whole.rfind(_NAME) if not whole.startswith(before) else len(before)
    if not whole.startswith(before):
        # The generation prompt says more than the turn's beginning: the call's line is what can be known.
        start = whole.rfind("\n", 0, whole.rfind("{", 0, start)) + 1
    pieces = tokenizer.split_control(whole[start:])
    return "".join(piece for piece in pieces if isinstance(piece, str)).rstrip("\n")


def _call_in(text: str, begin: int) -> tuple[int, int, str] | None:
    """Where the first JSON object with the probe's name stands in `text` from `begin` on, and its arguments' field."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text[begin:]):
        start = begin + match.start()
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("name") == _NAME:
            fields = [name for name, each in value.items() if isinstance(each, dict) and _ARGUMENT in each]
            return (start, end, fields[0]) if fields and value.keys() == {"name", fields[0]} else None
    return None


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""
