"""Calling tools from a chat: what the request allows, and the answer's text as content and calls."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from topkapi.model.conversation.reasoning import ReasoningReader, Thought
from topkapi.model.conversation.tool_call_reader import Event, Said, ToolCallReader
from topkapi.model.conversation.tool_calls import ToolCallForm
from topkapi.model.decoding.parameters import PARAMETERS
from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.errors import InapplicableField
from topkapi.service.api.openai.conversation import NamedTool, Tool, ToolChoice
from topkapi.service.models import LoadedModel

STRUCTURES = tuple(parameter.name for parameter in PARAMETERS if parameter.stage == "grammar")


@dataclass(frozen=True)
class Calling:
    """How answers may call tools: `must` that they do, and nothing but that; `several` calls or one."""

    form: ToolCallForm
    functions: Sequence[dict[str, Any]]
    must: bool
    named: bool
    several: bool

    @property
    def names(self) -> list[str]:
        """The functions that may be called."""
        return [function["name"] for function in self.functions]

    def added_to(self, given: dict[str, Any]) -> dict[str, Any]:
        """The decoding parameters of a request, with those that make it call as it must."""
        if self.must:
            other = next((name for name in STRUCTURES if given.get(name)), None)
            if other is not None:
                message = f"{other} and tool_choice exclude each other: an answer that must be a call has that form"
                raise InvalidRequest(message, field="tool_choice", hint='set tool_choice to "auto"')
            return given | {"grammar": self.form.grammar(self.functions, several=self.several)}
        return given

    def reader(self) -> ToolCallReader:
        """What reads an answer's text and calls."""
        return ToolCallReader(self.form, self.names, several=self.several)

    def about_tools(self, error: InvalidRequest) -> InvalidRequest:
        """`error`, or where it is about the grammar of the calls, which nobody sent, one about the tools instead."""
        if not self.must or error.field != "grammar":
            return error
        place = re.search(r"\bat (\d+)\(\d+\): ", error.message)
        index = None if place is None else self.form.function_of_line(int(place[1]))
        reason = error.message.removeprefix("grammar can't be followed: ")
        if index is None or place is None or not 0 <= index < len(self.functions):
            return InvalidRequest(f"the tools' parameters can't be followed: {reason}", field="tools", hint=error.hint)
        name, reason = self.functions[index]["name"], reason.replace(place[0], "")
        message = f"the parameters of the function {name!r} can't be followed: {reason}"
        hint = error.hint or 'change its schema, or leave tool_choice at "auto", which does not hold calls to schemas'
        return InvalidRequest(message, field="tools", hint=hint)


@contextmanager
def naming(calling: Calling | None) -> Iterator[None]:
    """Errors about the grammar of calls that a request must make name its tools."""
    try:
        yield
    except InvalidRequest as error:
        raise (error if calling is None else calling.about_tools(error)) from None


def calling(
    model: LoadedModel, tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> Calling | None:
    """What a request's fields allow; None where no tool may be called.

    Raises `InvalidRequest` for a choice without tools, a name that is none of theirs or given twice, and for a
    checkpoint whose template knows no tools.
    """
    if not tools:
        pointless = {"tool_choice": choice not in (None, "none", "auto"), "parallel_tool_calls": parallel is not None}
        for name, asked in pointless.items():
            if asked:
                raise InapplicableField(f"{name} goes with tools", field=name, hint="send tools, or leave it out")
        return None
    functions = [tool.function.model_dump(exclude_none=True) for tool in tools]
    named = choice.function.name if isinstance(choice, NamedTool) else None
    choice = "required" if isinstance(choice, NamedTool) else choice or "auto"
    places = ("tools[{}].function.name", "tool_choice.function.name")
    return allowed(model, functions, choice, named, places, several=parallel is not False)


def allowed(
    model: LoadedModel,
    functions: Sequence[dict[str, Any]],
    choice: Literal["none", "auto", "required"],
    named: str | None,
    places: tuple[str, str],
    *,
    several: bool,
) -> Calling | None:
    """How answers may call `functions`, or the `named` one alone. `places` are where a name and the named one stand.

    Raises as `calling` does.
    """
    names = [function["name"] for function in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            field = places[0].format(index)
            raise InvalidRequest(f"{field}: there are two tools named {name!r}", field=field)
    if choice == "none":
        return None
    checkpoint = model.checkpoint
    if checkpoint.chat is None:
        raise InvalidRequest(f"{model.name} is a base checkpoint and takes no tools", field="tools")
    form = ToolCallForm.of(checkpoint.chat, checkpoint.tokenizer)
    if named is not None:
        if named not in names:
            message, hint = (
                f"tool_choice names {named!r}, which is none of the tools",
                f"the tools are: {', '.join(names)}",
            )
            raise InvalidRequest(message, field=places[1], hint=hint)
        functions = [function for function in functions if function["name"] == named]
    several = several and named is None and form.separator is not None
    return Calling(form, functions, must=choice == "required", named=named is not None, several=several)


class ChatWriter:
    """Turns the text of one answer into a message, or piece by piece into the deltas of a stream."""

    def __init__(self, calling: Calling | None, reasoning: ReasoningReader | None = None) -> None:
        self._calling, self._reasoning = calling, reasoning
        self._reader = None if calling is None else calling.reader()

    @property
    def called(self) -> bool:
        """Whether the answer ended by calling tools of its own accord; a named one had no choice."""
        return self._reader is not None and self._reader.calls > 0 and not (self._calling and self._calling.named)

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas of a further piece of text."""
        if self._reasoning is None:
            return self._said(text)
        return self._apart(self._reasoning.feed(text))

    def flush(self) -> list[dict[str, Any]]:
        """The deltas of what was held back, once the answer has ended."""
        deltas = [] if self._reasoning is None else self._apart(self._reasoning.flush())
        return deltas if self._reader is None else deltas + self._deltas(self._reader.flush())

    def _apart(self, events: Iterable[Thought | Said]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for event in events:
            thought = isinstance(event, Thought)
            deltas += [{"reasoning_content": event.text}] if thought else self._said(event.text)
        return deltas

    def _said(self, text: str) -> list[dict[str, Any]]:
        if self._reader is None:
            return [{"content": text}] if text else []
        return self._deltas(self._reader.feed(text))

    def message(self, text: str) -> dict[str, Any]:
        """The whole message that answers with `text`."""
        content: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for delta in [*self.feed(text), *self.flush()]:
            content.append(delta.get("content", ""))
            thoughts.append(delta.get("reasoning_content", ""))
            for call in delta.get("tool_calls", []):
                calls.append({name: value for name, value in call.items() if name != "index"})
        said = "".join(content)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if calls:
            message |= {"content": said or None, "tool_calls": calls}
        if any(thoughts):
            message["reasoning_content"] = "".join(thoughts)
        return message

    def _deltas(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        assert self._reader is not None
        deltas: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, Said):
                deltas.append({"content": event.text})
                continue
            call = {"index": self._reader.calls - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
            call["function"] = {"name": event.name, "arguments": event.arguments}
            deltas.append({"tool_calls": [call]})
        return deltas
