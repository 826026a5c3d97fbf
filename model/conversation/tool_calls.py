"""Calls of tools in an assistant's text: the form that a chat template gives them, and that form as a grammar.

No two families write calls alike, and a checkpoint says only by its chat template how it does. So the template is
asked: a conversation with a call is rendered, and what stands around the call's JSON is the form. Known to be read
that way: Hermes and Qwen (`<tool_call>` around `{"name", "arguments"}`), Llama 3 (`{"name", "parameters"}` alone),
Mistral (`[TOOL_CALLS]` before a list of calls). Some templates take tools and show no calls of earlier answers (Granite
3, Phi-4 mini): what they call the beginning of a call tells their form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.model.text.tokenizer import Tokenizer

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


@dataclass(frozen=True)
class ToolCallForm:
    """A call is `prefix`, a JSON object of the function's name and of its arguments under `arguments`, and `suffix`.

    `separator` stands between the suffix of one call and the prefix of the next; None where a template has only one.
    With `listed` all calls of an answer are one list: it stands between them alone.
    """

    prefix: str
    arguments: str
    suffix: str
    separator: str | None
    listed: bool = False

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
            known = _known(template, tokenizer)
            if known is not None:
                return known
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
        in_a_list = prefix.rstrip().endswith("[") and suffix.lstrip().startswith("]")
        if in_a_list and second is not None and between.strip() == "," and two[second[1] :] == suffix:
            return ToolCallForm(prefix, arguments, suffix, between, listed=True)
        # What stands before every call: the first one may come after a block of reasoning too.
        size = next(size for size in range(len(between), -1, -1) if prefix.endswith(between[len(between) - size :]))
        common = between[len(between) - size :].lstrip()
        if not between.startswith(suffix) or not common or len(suffix) + len(common) > len(between):
            return ToolCallForm(prefix, arguments, suffix, None)
        return ToolCallForm(common, arguments, suffix, between[len(suffix) : len(between) - len(common)])

    def grammar(self, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        """A grammar, in Lark's notation, of one call of one of the functions `tools`, or of `several` calls."""
        guidance = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        before, after = ([json.dumps(text)] if text else [] for text in (self.prefix, self.suffix))
        more = f" ({json.dumps(self.separator)} one)*" if self.separator else " one*" if self.separator == "" else ""
        every = f"one{more if several else ''}"
        if self.listed:
            lines = [f"start: {' '.join([*before, every, *after])}", "one: call"]
        else:
            lines = [f"start: {every}", f"one: {' '.join([*before, 'call', *after])}"]
        # Each schema is a document of its own: what refers to its root, by whichever keyword, stays true there.
        for index, tool in enumerate(tools):
            schema = json.dumps(parameters_of(tool) | {"x-guidance": guidance})
            lines.append(f"arguments_{index}: %json {schema}")
        for index, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool["name"])}, {json.dumps(self.arguments)}: '
            lines.append(f'call_{index}: {json.dumps(head)} arguments_{index} "}}"')
        lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
        return "\n".join(lines)

    def function_of_line(self, line: int) -> int:
        """Which function's schema stands in this line, counted from 1, of `grammar`."""
        return line - 3


# What stands around the list of calls in templates that show none; Granite writes the first alone, Phi both.
_BEGIN, _END = "<|tool_call|>", "<|/tool_call|>"


def _known(template: ChatTemplate, tokenizer: Tokenizer) -> ToolCallForm | None:
    """The form of a template that says how a call begins, but shows none. Control tokens are no part of an answer."""

    def said(text: str) -> bool:
        return text in template.source or text in tokenizer.control_tokens

    if not said(_BEGIN):
        return None
    prefix, suffix = ("" if text in tokenizer.control_tokens or not said(text) else text for text in (_BEGIN, _END))
    return ToolCallForm(f"{prefix}[", "arguments", f"]{suffix}", ", ", listed=True)


def parameters_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object whatever it leaves out; without one it takes none.

    Raises `InvalidRequest` for one of something else than objects.
    """
    schema = tool.get("parameters")
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise InvalidRequest(
            f"the parameters of the function {tool.get('name')!r} are of type {json.dumps(kinds)}, and arguments are "
            "always an object",
            field="tools",
            hint='describe them as {"type": "object", "properties": {…}}',
        )
    return {**schema, "type": "object"}


def _answer(template: ChatTemplate, tokenizer: Tokenizer, calls: int) -> str:
    """What the assistant says in a rendered conversation in which it makes `calls` calls, control tokens left out."""
    question = [{"role": "user", "content": "Go."}]
    answer = {"role": "assistant", "content": "", "tool_calls": [_PROBE] * calls}
    variables: dict[str, Any] = {**tokenizer.special_tokens, "tools": [_TOOL]}
    try:
        before = template.render(question, **variables)
        whole = template.render([*question, answer], add_generation_prompt=False, **variables)
    except TopkapiError as error:
        raise InvalidRequest(f"the checkpoint's chat template refuses calls: {error.message}", field="tools") from None
    if not whole.startswith(before):
        # A prompt that opens a block of reasoning, which an earlier answer is shown without.
        before = re.sub(r"<think>\s*$", "", before)
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
            further = value.keys() - {"name", *fields[:1]}
            # Mistral's calls have the id by which the result is told.
            return (start, end, fields[0]) if fields and further <= {"id"} else None
    return None
