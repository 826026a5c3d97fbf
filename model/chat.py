"""Conversations to token ids: one renderer for training and for serving.

A chat template places control tokens and the messages' contents. To tell the two apart in the rendered text, each
spelling of a control token inside a content is broken by a private-use character that occurs nowhere else; what is
still whole after rendering was placed by the template. The character is removed before the text is encoded.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from model.chat_templates import BUILT_IN_TEMPLATES
from model.errors import CheckpointError, InvalidRequest, TopkapiError
from model.reading import read_json, read_text
from model.template_bounds import TemplateTooExpensive, bounded
from model.template_environment import SPAN_MARKS, template_environment
from model.tokenizer import Tokenizer

__all__ = ["BUILT_IN_TEMPLATES", "ChatTemplate", "EncodedChat"]

_ROLE = re.compile(r"[A-Za-z0-9_.-]+")
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

_LONGEST_MESSAGE = 500

_ABSENT = {"tools": None, "documents": None}
"""Variables that transformers always defines, so that templates ask whether they are none."""

Message = Mapping[str, Any]
"""`role` and `content`; `tool_calls` of an assistant, `tool_call_id` and `name` of a tool's answer. `tool_calls` hold
`{"type": "function", "id", "function": {"name", "arguments"}}` with the arguments as an object."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids; `trained` marks those of the assistant's contents and of their end tokens."""

    token_ids: list[int]
    trained: list[bool]


class TooExpensive(InvalidRequest):
    """The template takes more time or memory on these messages than it may."""


class ChatTemplate:
    """A Jinja chat template as transformers reads it.

    Raises CheckpointError when `source` is not a valid template.
    """

    def __init__(self, source: str, name: str | None = None) -> None:
        self.source = source
        self.name = name
        try:
            environment = template_environment()
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
            """Whether the template looks at `tools`."""
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from error
        except Exception as error:  # blocks or brackets that lie in each other too deep for Python's own compiler
            problem = f"{type(error).__name__}: {str(error)[:_LONGEST_MESSAGE]}"
            raise CheckpointError(f"the chat template cannot be compiled: {problem}") from error
        self._marks_spans = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    @classmethod
    def built_in(cls, name: str) -> "ChatTemplate":
        """The template of that name in BUILT_IN_TEMPLATES. Raises InvalidRequest for another name."""
        if name not in BUILT_IN_TEMPLATES:
            known = ", ".join(sorted(BUILT_IN_TEMPLATES))
            raise InvalidRequest(f"there is no built-in chat template {name!r}", hint=f"choose one of {known}")
        return cls(BUILT_IN_TEMPLATES[name], name)

    @classmethod
    def from_directory(cls, path: str | Path) -> "ChatTemplate | None":
        """The template of a checkpoint directory, or None where it has none.

        It is `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`: a string, or a list of named
        templates of which `default` is taken.
        """
        directory = Path(path)
        source: object = None
        try:
            if (directory / "chat_template.jinja").is_file():
                source = read_text(directory / "chat_template.jinja")
            else:
                source = read_json(directory / "tokenizer_config.json").get("chat_template")
        except OSError as error:
            raise CheckpointError(f"the chat template of {directory} cannot be read: {error}") from error
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if not isinstance(source, str) or not source:
            return None
        return cls(source, next((name for name, built_in in BUILT_IN_TEMPLATES.items() if built_in == source), None))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object) -> str:
        """The conversation as text. `variables`, `tools` among them, are seen by the template and trusted.

        Raises InvalidRequest when the messages are malformed or the template refuses them.
        """
        _check_messages(messages)
        return self._render(messages, add_generation_prompt, variables)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> EncodedChat:
        """The conversation as token ids, in which only the template can have placed control tokens.

        `tools` are JSON schemas of functions, as in OpenAI's API; other `variables` are trusted. The ids of a
        conversation up to and with the generation prompt begin the ids of the conversation with the answer, so that
        training sees exactly what serving sees. Raises InvalidRequest as `render` does, and
        CheckpointError when `add_generation_prompt` is false and the template does not show what the assistant said.
        """
        _check_messages(messages)
        variables = {**_special_tokens(tokenizer), **variables}
        said = "".join(_texts([*messages, tools]))
        mark, begin, end = _unused_characters(3, said + self.source + "".join(tokenizer.control_tokens))

        def broken(text: str) -> str:
            return _broken(text, tokenizer, mark)

        def broken_in_calls(text: str) -> str:
            # Templates look fields up and compare words like `function`; a word alone spells no control token.
            return text if text.isidentifier() else broken(text)

        marked = [
            {**_mapped(message, broken_in_calls), "role": message["role"], "content": broken(message["content"])}
            for message in messages
        ]
        marked_variables = {**variables, "tools": _mapped(tools, broken_in_calls)}
        text = self._render(marked, add_generation_prompt, {**marked_variables, SPAN_MARKS: (begin, end)})
        if mark in "".join(_texts([*marked, marked_variables["tools"]])):
            plain = self._render(messages, add_generation_prompt, {**variables, "tools": tools})
            if plain != re.sub(f"[{mark}{begin}{end}]", "", text):
                raise InvalidRequest(
                    "a message contains the spelling of a control token where the chat template looks into its text",
                    field="messages",
                    hint="remove the control token's spelling from the message",
                )
        text, spans = self._spans(text, marked, tokenizer, marked_variables, (begin, end), add_generation_prompt)

        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        cuts = list(pairwise(borders))
        parts = [_unmarked(tokenizer.split_control(text[start:stop]), mark) for start, stop in cuts]
        starts = {start for start, stop in spans if start < stop}
        token_ids: list[int] = []
        trained: list[bool] = []
        for (start, _), ids in zip(cuts, tokenizer.encode_parts(parts), strict=True):
            token_ids += ids
            trained += [start in starts] * len(ids)
        return EncodedChat(token_ids, trained)

    def turn_end(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an assistant's turn: the control token this template puts there, else the tokenizer's end.

        Raises CheckpointError for a template that takes too long on two short messages.
        """
        probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
        try:
            with bounded():
                encoded = self.encode(probe, tokenizer, add_generation_prompt=False)
        except TooExpensive as error:
            raise CheckpointError(
                f"the chat template cannot be used: {error.__cause__}", hint="give the checkpoint another chat template"
            ) from error
        except TopkapiError:
            encoded = EncodedChat([], [])
        last = [token_id for token_id, trained in zip(encoded.token_ids, encoded.trained, strict=True) if trained][-1:]
        if last and last[0] in tokenizer.control_tokens.values():
            return (last[0],)
        return () if tokenizer.end_token_id is None else (tokenizer.end_token_id,)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, object]) -> str:
        try:
            with bounded():
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    **{**_ABSENT, **variables},
                )
        except TemplateTooExpensive as error:
            raise TooExpensive(
                f"the chat template cannot be used on these messages: {error.message}", field="messages"
            ) from error
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses the messages: {str(error.message)[:_LONGEST_MESSAGE]}", field="messages"
            ) from error
        except Exception as error:  # a template's expressions can raise whatever Python's operators raise
            problem = f"{type(error).__name__}: {str(error)[:_LONGEST_MESSAGE]}"
            raise InvalidRequest(
                f"the chat template cannot render the messages: {problem}", field="messages"
            ) from error

    def _spans(
        self,
        text: str,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        variables: Mapping[str, object],
        span_marks: tuple[str, str],
        add_generation_prompt: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        """`text` without span marks and where in it the assistant's answers with their end tokens stand."""
        if self._marks_spans:
            text, spans = _marked_spans(text, *span_marks)
            last_is_answer = len(messages) > 1 and messages[-1]["role"] == "assistant"
            if last_is_answer and not add_generation_prompt:
                prompt = _marked_spans(self._render(messages[:-1], True, variables), *span_marks)[0]
                if not spans or spans[-1][0] != len(prompt) or not text.startswith(prompt):
                    raise CheckpointError(
                        "the chat template's generation prompt is not what precedes the last answer, "
                        "so training and serving would differ",
                        hint="make the template start {% generation %} where the generation prompt ends",
                    )
            return text, spans
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._render(messages[:index], True, variables)
                after = self._render(messages[: index + 1], False, variables)
            except InvalidRequest:
                before, after = "", None
            if after is None or not after.startswith(before) or not text.startswith(after):
                if add_generation_prompt:
                    return text, []
                raise CheckpointError(
                    f"the chat template does not show where the answer of messages[{index}] begins and ends",
                    hint="put {% generation %}…{% endgeneration %} around the assistant's answer in the template",
                )
            spans.append((len(before), len(before) + _answer_length(after[len(before) :], tokenizer)))
        return text, spans


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from (str(name), *_texts(each))
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` made to every text in it, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(name)): _mapped(each, change) for name, each in value.items()}
    return [_mapped(each, change) for each in value] if isinstance(value, Sequence) else value


def _answer_length(text: str, tokenizer: Tokenizer) -> int:
    """How much of what follows a generation prompt is the answer: up to and with the last control token, or all."""
    end = 0
    for spelling in tokenizer.control_tokens:
        found = text.rfind(spelling)
        if found >= 0:
            end = max(end, found + len(spelling))
    return end or len(text)


def _marked_spans(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """`text` without the marks of generation blocks, and what the blocks cover; empty ones are left out."""
    pieces = re.split(f"([{begin}{end}])", text)
    spans: list[tuple[int, int]] = []
    plain: list[str] = []
    position = start = 0
    for piece in pieces:
        if piece == begin:
            start = position
        elif piece == end:
            if position > start:
                spans.append((start, position))
        else:
            plain.append(piece)
            position += len(piece)
    return "".join(plain), spans


def _broken(content: str, tokenizer: Tokenizer, mark: str) -> str:
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


def _unmarked(pieces: Iterable[str | int], mark: str) -> list[str | int]:
    plain = (piece if isinstance(piece, int) else piece.replace(mark, "") for piece in pieces)
    return [piece for piece in plain if piece != ""]


def _unused_characters(count: int, text: str) -> list[str]:
    """Private-use characters that do not occur in `text`."""
    used = set(text)
    found = (chr(code) for block in _PRIVATE_USE for code in block if chr(code) not in used)
    return [next(found) for _ in range(count)]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, object]:
    """The begin, end and padding tokens as templates name them; one that is not defined stays undefined."""
    ids = {
        "bos_token": tokenizer.begin_token_id,
        "eos_token": tokenizer.end_token_id,
        "pad_token": tokenizer.pad_token_id,
    }
    return {name: tokenizer.decode([token_id]) for name, token_id in ids.items() if token_id is not None}


def _check_messages(messages: object) -> None:
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
            if key not in ("role", "content", "tool_calls", "tool_call_id", "name"):
                raise InvalidRequest(f"{field} has an unknown key {key!r}", field=f"{field}.{key}", hint=_SHAPE)
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
