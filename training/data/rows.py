"""What a row of instructions or preferences says, field by field: used, refused by name, or named as left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.training.data.turns import Message, empty, message_of, parsed

FORMATS = (
    "rows are {instruction, input?, output}, {prompt, completion}, {question, answer}, "
    "{messages: [{role, content}, …]}, {conversations: [{from, value}, …]} or "
    "{instruction, instances: [{input, output}, …]}; --map FIELD=NAME reads a field under another name"
)
ANSWERS = {
    "instruction": ("output", "response", "completion", "answer"),
    "prompt": ("completion", "response", "output", "answer"),
    "question": ("answer", "response", "output", "completion"),
    "query": ("response", "answer", "output", "completion"),
}
"""What a row asks under, and the names of its answer, of which the first that is there counts."""

TURNS = ("messages", "conversations", "conversation")
"""Fields that hold a whole conversation, the second ShareGPT's."""

BESIDE = ("input", "context")
"""What is asked about, below the question."""

SYSTEM = ("system", "system_prompt")
COMMON = (*SYSTEM, "history", "tools", "chat_template_kwargs")

REFUSED = {
    "functions": "write them as tools", "function_call": "write it as a message with tool_calls",
    "documents": "write their text in a message", "images": "only text is trained on",
    "image": "only text is trained on", "videos": "only text is trained on", "audio": "only text is trained on",
    "choices": "write them in the question", "options": "write them in the question",
    "label": "topkapi kto trains on answers labelled good or bad; to train on all as good ones, keep the rows that are",
    "weight": "rows weigh the same; repeat a row, or mix files by weights (--data FILE=3)",
}  # fmt: skip
"""Fields of a row that say what it means in a way that isn't done here, and what to do instead."""


@dataclass(frozen=True)
class Told:
    """A conversation of a row. `untrained` are the places of answers that are shown and not trained; the template is
    given `tools` (JSON schemas of functions) and `variables` too."""

    messages: list[Message]
    untrained: frozenset[int] = frozenset()
    tools: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether roles and contents are all of it."""
        keys = {key for message in self.messages for key in message}
        return not (self.untrained or self.tools or self.variables or keys - {"role", "content"})


# What `topkapi instructions make` writes beside the messages, for evaluate: nothing that a user left out.
_EXERCISE = {"kind", "wording", "checks"}


class Row:
    """Reads a row and keeps account of which fields were."""

    def __init__(self, row: Mapping[str, Any], origin: str, formats: str = FORMATS) -> None:
        self.row, self.origin, self._formats = row, origin, formats
        self._used: set[str] = set()
        self._unused_in_messages: set[str] = set()

    def error(self, message: str, hint: str | None = None) -> DataError:
        """The error for what is wrong with it."""
        return DataError(f"{self.origin}: {message}", field="data", hint=hint or self._formats)

    def get(self, name: str) -> Any:
        """A field's value, None where it says nothing."""
        self._used.add(name)
        value = self.row.get(name)
        return None if empty(value) else value

    def text(self, *names: str) -> str:
        """The text of the first of these fields that there is."""
        name = next((name for name in names if name in self.row), names[0])
        self._used.add(name)
        value = self.row.get(name)
        if not isinstance(value, str):
            raise self.error(f"no text in the field {name!r}")
        return value

    def common(self, messages: list[Message], untrained: frozenset[int] = frozenset()) -> Told:
        """The conversation of `messages` with what rows of every form may have beside: a system message, turns before,
        tools, and variables of the template."""
        before = self._history()
        said = {name: value for name in SYSTEM if (value := self.get(name)) is not None}
        for name, value in said.items():
            if not isinstance(value, str):
                raise self.error(f"{name!r} must be text")
        systems = list(dict.fromkeys(said.values()))
        if len(systems) > 1:
            raise self.error("system and system_prompt say different things", "keep one of them")
        if systems and messages[:1] and messages[0]["role"] == "system":
            if messages[0]["content"] != systems[0]:
                raise self.error(f"{next(iter(said))} and the first message are two system messages", "keep one")
            systems = []
        head = [{"role": "system", "content": text} for text in systems]
        if before and messages[:1] and messages[0]["role"] == "system":
            raise self.error("history and messages that begin with a system message", "write history in messages")
        start = len(head) + len(before)
        moved = frozenset(index + start for index in untrained)
        return Told([*head, *before, *messages], moved, self._tools(), self._variables())

    def asked(self, name: str, input_heading: bool, instance: Mapping[str, Any] | None = None) -> str:
        """What is asked under `name`, with what it is asked about."""
        question = self.text(name)
        about = instance if instance is not None else self.row
        if instance is None:
            self._used.update(BESIDE)
        given = [value for each in BESIDE if not empty(value := about.get(each))]
        if len(given) > 1 and given[0] != given[1]:
            raise self.error("both input and context say what is asked about", "join them in input")
        if not given:
            return question
        if not isinstance(given[0], str):
            raise self.error(f"{next(each for each in BESIDE if not empty(about.get(each)))!r} must be text")
        return f"{question}\n\n### Input:\n{given[0]}" if input_heading else f"{question}\n\n{given[0]}"

    def turns(self, name: str, role: str) -> tuple[list[Message], frozenset[int]]:
        """The messages of a field, with the places of those that are not trained; a text is one of `role`."""
        self._used.add(name)
        value = self.row.get(name)
        if isinstance(value, str) and name in TURNS:
            # As the columns of tables hold them.
            value = parsed(self, value, repr(name))
        if isinstance(value, str):
            return [{"role": role, "content": value}], frozenset()
        if not isinstance(value, list) or not value:
            raise self.error(f"{name!r} is neither a text nor a list of messages")
        messages, untrained = [], set()
        for index, each in enumerate(value):
            message, trained = message_of(self, each, f"{name}[{index}]", self._unused_in_messages)
            messages.append(message)
            if not trained:
                untrained.add(index)
        return messages, frozenset(untrained)

    def close(self, left_out: set[str] | None) -> None:
        """Refuse fields that mean something and were not read; the others are added to `left_out`."""
        own = _EXERCISE if self.row.keys() >= _EXERCISE else set()
        for name in self.row.keys() - self._used - own:
            value = self.row[name]
            # A label that is no verdict on the answer means nothing here, and neither does the weight that all have.
            harmless = (name == "weight" and value == 1) or (name == "label" and not self._is_verdict(value))
            if name in REFUSED and not empty(value) and not harmless:
                raise self.error(f"{name!r} can't be used", REFUSED[name])
            if left_out is not None and not empty(value):
                left_out.add(str(name))
        if left_out is not None:
            left_out |= self._unused_in_messages

    def _is_verdict(self, value: Any) -> bool:
        """Whether a label says that the answer is good or bad, as rows of KTO do."""
        return isinstance(value, bool) or (value in (0, 1) and {"prompt", "completion"} <= self.row.keys())

    def _history(self) -> list[Message]:
        """Turns before what is asked: pairs of question and answer, or messages."""
        value = self.get("history")
        if value is None:
            return []
        if isinstance(value, list) and all(isinstance(each, dict) for each in value):
            messages, untrained = self.turns("history", "user")
            if untrained:
                raise self.error("an answer in 'history' has the weight 0", "write the row as messages")
            return messages
        turns: list[Message] = []
        for pair in value if isinstance(value, list) else [None]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise self.error("'history' must be a list of [question, answer]")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        return turns

    def _tools(self) -> list[dict[str, Any]]:
        tools = self.get("tools")
        tools = parsed(self, tools, "tools") if tools is not None else []
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise self.error("'tools' must be a list of JSON schemas of functions")
        return tools

    def _variables(self) -> dict[str, Any]:
        variables = self.get("chat_template_kwargs")
        variables = parsed(self, variables, "chat_template_kwargs") if variables is not None else {}
        if not isinstance(variables, dict):
            raise self.error("'chat_template_kwargs' must be an object")
        return {name: value for name, value in variables.items() if value is not None}


def conversations_of(row: object, origin: str, input_heading: bool, left_out: set[str] | None = None) -> Iterator[Told]:
    """The conversations of one row, whichever form it has; fields that say nothing here are added to `left_out`.

    Raises `DataError` naming `origin` for rows of no known form and for what can't be done.
    """
    if not isinstance(row, dict):
        raise DataError(f"{origin}: not an object", field="data", hint=FORMATS)
    reader = Row(row, origin)
    turns = next((name for name in TURNS if isinstance(row.get(name), list | str)), None)
    if turns is not None:
        told = [reader.common(*reader.turns(turns, "user"))] if row[turns] else [Told([])]
    elif isinstance(row.get("instances"), list):
        told = [_instance(reader, instance, input_heading) for instance in reader.get("instances") or []]
    elif {"chosen", "rejected"} <= row.keys():
        raise reader.error(
            "a preference, chosen and rejected, where answers are needed",
            "topkapi dpo trains on preferences (topkapi plan: --run dpo); finetune and pick take answers",
        )
    else:
        name = next((name for name in ANSWERS if name in row), None)
        if name is None:
            hint = "topkapi pretrain, with --checkpoint, goes on with texts" if row.keys() == {"text"} else None
            raise reader.error(f"unknown fields {', '.join(row) or '(none)'}", hint)
        told = [_single(reader, name, input_heading)]
    reader.close(left_out)
    yield from told


def _single(reader: Row, name: str, input_heading: bool) -> Told:
    names = [each for each in ANSWERS[name] if each in reader.row] or ANSWERS[name][:1]
    if isinstance(reader.row[name], list):
        before, _ = reader.turns(name, "user")
        if any(not empty(reader.row.get(each)) for each in BESIDE):
            raise reader.error(f"input or context beside a {name} of messages", "write it in a message")
    else:
        before = [{"role": "user", "content": reader.asked(name, input_heading)}]
    if isinstance(reader.row.get(names[0]), list):
        answer, untrained = reader.turns(names[0], "assistant")
    else:
        answer, untrained = [{"role": "assistant", "content": reader.text(names[0])}], frozenset()
    # As in TRL, of a prompt and its completion only the completion is trained.
    earlier = {index for index, message in enumerate(before) if message["role"] == "assistant"}
    return reader.common([*before, *answer], frozenset(earlier | {index + len(before) for index in untrained}))


def _instance(reader: Row, instance: Any, input_heading: bool) -> Told:
    inside = instance if isinstance(instance, dict) else {}
    question = reader.asked("instruction", input_heading, inside)
    answer = Row(inside, reader.origin)
    said = answer.text("output")
    answer.close(None)
    return reader.common([{"role": "user", "content": question}, {"role": "assistant", "content": said}])


_SPEAKERS = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def spoken(text: str) -> list[Message] | None:
    """The turns of a text in which `Human:` and `Assistant:` speak, as Anthropic's preferences have them; None for any
    other. An answer that is not said yet is no turn."""
    text = text.lstrip("\n")
    if not text.startswith("Human:") or "\n\nAssistant:" not in text:
        return None
    _, *pieces = _SPEAKERS.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def check_template(told: Told, chat: ChatTemplate, origin: str) -> None:
    """Raise `DataError` for what a conversation has and the chat template would leave out."""

    def refused(what: str) -> DataError:
        return DataError(
            f"{origin}: the chat template has no place for {what}, so it would not be trained",
            field="chat_template",
            hint="choose a checkpoint or --chat-template that has, or take the field out",
        )

    if told.tools and not chat.takes_tools:
        raise refused("tools")
    for name in ("tool_calls", "reasoning_content"):
        if name not in chat.source and any(name in message for message in told.messages):
            raise refused(name)
    for name, value in told.variables.items():
        if name not in chat.variables and value is not False:
            raise refused(f"chat_template_kwargs.{name}")
    named = [index for index, each in enumerate(told.messages) if "name" in each and each["role"] != "tool"]
    if named and all(_renders_alike(told.messages, index, chat) for index in named):
        raise refused("name")


def _renders_alike(messages: Sequence[Message], index: int, chat: ChatTemplate) -> bool:
    """Whether the name of a message makes no difference."""
    bare = [dict(message) for message in messages]
    del bare[index]["name"]
    tokens = {"bos_token": "", "eos_token": ""}
    with_name, without = (chat.render(each, add_generation_prompt=False, **tokens) for each in (messages, bare))
    return with_name == without
