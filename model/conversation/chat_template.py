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

from topkapi.model.conversation.template_bounds import TemplateTooExpensive, bounded
from topkapi.model.conversation.template_environment import SPAN_MARKS, template_environment
from topkapi.model.conversation.template_files import BUILT_IN_TEMPLATES, stored_templates
from topkapi.model.errors import CheckpointError, InvalidRequest, TopkapiError
from topkapi.model.text.tokenizer import Tokenizer

__all__ = ["BUILT_IN_TEMPLATES", "ChatTemplate", "EncodedChat"]

Message = Mapping[str, Any]
"""`role` and `content`; `tool_calls` and `reasoning_content` of an assistant, `tool_call_id` and `name` of a tool's
answer. `tool_calls` hold `{"type": "function", "id", "function": {"name", "arguments"}}` with the arguments as an
object. `thinking` and `reasoning` are other names of `reasoning_content`. What is None is left out."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field that holds what an assistant thought."""

_ROLE = re.compile(r"[A-Za-z0-9_.-]+")
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

_SHAPE = 'a message is {"role": "user", "content": "…"}; the roles are system, user and assistant'
_LONGEST_MESSAGE = 500

_ABSENT = {"tools": None, "documents": None}
"""Variables that transformers always defines, so that templates ask whether they are none."""

_OWN = {"messages", "tools", "add_generation_prompt", SPAN_MARKS}
"""Variables that a conversation itself is."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids; `trained` marks those of the assistant's contents and of their end tokens."""

    token_ids: list[int]
    trained: list[bool]

    def end(self, tokenizer: Tokenizer) -> int | None:
        """The control token that ends the last answer, None without one. White space may follow, and further ones."""
        control = set(tokenizer.control_tokens.values())
        end = None
        for token_id, trained in zip(reversed(self.token_ids), reversed(self.trained), strict=True):
            if trained and token_id in control:
                end = token_id
            elif trained and not tokenizer.token_bytes(token_id).isspace():
                break
        return end


class TooExpensive(InvalidRequest):
    """The template takes more time or memory on these messages than it may."""


class ChatTemplate:
    """A Jinja chat template as transformers reads it.

    `others` are further templates of the checkpoint by their names. The one called `tool_use` takes this one's place
    where tools are given, as in transformers; the rest is kept for `stored`.
    Raises CheckpointError when `source` or the template for tools is not a valid template.
    """

    def __init__(self, source: str, name: str | None = None, others: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.name = name
        self.others = dict(others or {})
        self._for_tools = ChatTemplate(self.others["tool_use"]) if "tool_use" in self.others else None
        try:
            environment = template_environment()
            self._template = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self.takes_tools = "tools" in variables or self._for_tools is not None
            """Whether the template looks at `tools`, or another takes its place for them."""
            self.variables = frozenset(
                name for name in variables - _OWN - environment.globals.keys() if not name.endswith("_token")
            )
            """What else the template looks at: what a caller may tell it, such as `enable_thinking`."""
            if self._for_tools is not None:
                self.variables |= self._for_tools.variables
        except jinja2.TemplateError as error:
            problem = str(error)[:_LONGEST_MESSAGE]
            raise CheckpointError(f"the chat template is not valid Jinja: {problem}") from error
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

        `stored_templates` says where they lie.
        """
        return cls.of(stored_templates(Path(path)))

    @classmethod
    def of(cls, templates: Mapping[str, str]) -> "ChatTemplate | None":
        """The template called `default` with the others beside it, or None where there is none at all.

        Without a default, conversations that no other template is for are refused when they are rendered.
        """
        if not templates:
            return None
        others = {name: source for name, source in templates.items() if name != "default"}
        names = ", ".join(sorted(others))
        missing = f"the checkpoint has the chat templates {names}, and none is called default"
        source = templates.get("default", f"{{{{ raise_exception({missing!r}) }}}}")
        return cls(source, next((name for name, each in BUILT_IN_TEMPLATES.items() if each == source), None), others)

    @property
    def stored(self) -> str | list[dict[str, str]]:
        """As `tokenizer_config.json` and GGUF hold it: the source, or a list of named ones."""
        if not self.others:
            return self.source
        return [{"name": name, "template": each} for name, each in {"default": self.source, **self.others}.items()]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object) -> str:
        """The conversation as text. `variables`, `tools` among them, are seen by the template and trusted.

        Raises InvalidRequest when the messages are malformed or the template refuses them.
        """
        check_messages(messages)
        if self._for_tools is not None and variables.get("tools") is not None:
            return self._for_tools.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self._render(messages, add_generation_prompt, variables)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        given: Mapping[str, Any] | None = None,
        **variables: object,
    ) -> EncodedChat:
        """The conversation as token ids, in which only the template can have placed control tokens.

        `tools` are JSON schemas of functions, as in OpenAI's API; `given` are further variables, of JSON, whose texts
        can place control tokens as little as the messages can; other `variables` are trusted. The ids of a
        conversation up to and with the generation prompt begin the ids of the conversation with the answer, so that
        training sees exactly what serving sees. Raises InvalidRequest as `render` does, and
        CheckpointError when `add_generation_prompt` is false and the template does not show what the assistant said.
        """
        variables = {**variables, "tools": tools, "given": given}
        encoded, hidden = self._encode(messages, tokenizer, add_generation_prompt, variables)
        if hidden and not add_generation_prompt:
            raise _hides_answer(hidden[0])
        return encoded

    def encode_answers(
        self, messages: Sequence[Message], tokenizer: Tokenizer, **variables: object
    ) -> list[EncodedChat]:
        """What training sees of a conversation: one text with all its answers, or one per answer.

        Templates may show an answer otherwise once more was said, without its reasoning say. Each answer is then the
        last of a text of its own and trained in that alone, as it is where it's given. `variables` are what `encode`
        takes, `tools` and `given` among them. Raises as `encode` does.
        """
        whole, hidden = self._encode(messages, tokenizer, False, variables)
        if not hidden:
            return [whole]
        answers = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prefix, hidden = self._encode(messages[: index + 1], tokenizer, False, variables, last_alone=True)
                if index in hidden:
                    raise _hides_answer(index)
                answers.append(prefix)
        return answers

    def _encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        last_alone: bool = False,
    ) -> tuple[EncodedChat, list[int]]:
        """The conversation, and the indices of the answers that it does not show as they were when they were last."""
        check_messages(messages)
        tools = variables.get("tools")
        if self._for_tools is not None and tools is not None:
            return self._for_tools._encode(messages, tokenizer, add_generation_prompt, variables, last_alone)
        given = variables.get("given") or {}
        told = {name: value for name, value in variables.items() if name != "given"}
        variables = {**tokenizer.special_tokens, **told}
        said = "".join(texts([*messages, tools, given]))
        mark, begin, end = unused_characters(3, said + self.source + "".join(tokenizer.control_tokens))

        def broken(text: str) -> str:
            return broken_by(text, tokenizer, mark)

        def broken_in_calls(text: str) -> str:
            # Templates look fields up and compare words like `function`; a word alone spells no control token.
            return text if text.isidentifier() else broken(text)

        marked = [
            {
                **mapped(message, broken_in_calls),
                **{name: broken(message[name]) for name in ("content", *REASONING) if message.get(name) is not None},
                "role": message["role"],
            }
            for message in messages
        ]
        marked_given = {name: mapped(value, broken_in_calls) for name, value in given.items()}
        marked_variables = {**variables, **marked_given, "tools": mapped(tools, broken_in_calls)}
        text = self._render(marked, add_generation_prompt, {**marked_variables, SPAN_MARKS: (begin, end)})
        if mark in "".join(texts([*marked, marked_given, marked_variables["tools"]])):
            plain = self._render(messages, add_generation_prompt, {**variables, **given, "tools": tools})
            if plain != re.sub(f"[{mark}{begin}{end}]", "", text):
                raise InvalidRequest(
                    "a message contains the spelling of a control token where the chat template looks into its text",
                    field="messages",
                    hint="remove the control token's spelling from the message",
                )
        text, spans, hidden = self._spans(
            text, marked, tokenizer, marked_variables, (begin, end), add_generation_prompt
        )

        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        cuts = list(pairwise(borders))
        parts = [unmarked(tokenizer.split_control(text[start:stop]), mark) for start, stop in cuts]
        starts = {start for start, stop in (spans[-1:] if last_alone else spans) if start < stop}
        token_ids: list[int] = []
        trained: list[bool] = []
        for (start, _), ids in zip(cuts, tokenizer.encode_parts(parts), strict=True):
            token_ids += ids
            trained += [start in starts] * len(ids)
        return EncodedChat(token_ids, trained), hidden

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
        end = encoded.end(tokenizer)
        if end is None:
            end = tokenizer.end_token_id
        return () if end is None else (end,)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, object]) -> str:
        try:
            with bounded():
                return self._template.render(
                    messages=[as_templates_read_it(message) for message in messages],
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
    ) -> tuple[str, list[tuple[int, int]], list[int]]:
        """`text` without span marks, where in it the answers with their end tokens stand, and which it does not show.

        An answer is shown where the text begins as the one that ended with it.
        """
        if self._marks_spans:
            text, spans = _marked_spans(text, *span_marks)
            last_is_answer = len(messages) > 1 and messages[-1]["role"] == "assistant"
            if last_is_answer and not add_generation_prompt:
                prompt = _marked_spans(self._render(messages[:-1], True, variables), *span_marks)[0]
                around = [span for span in spans if span[0] <= len(prompt) < span[1]]
                if not around or not text.startswith(prompt):
                    raise CheckpointError(
                        "the chat template's generation prompt is not what precedes the last answer, "
                        "so training and serving would differ",
                        hint="make the template start {% generation %} where the generation prompt ends",
                    )
                # A block may begin inside of the prompt, whose part is then no answer: the server writes it.
                lead = text[around[0][0] : len(prompt)]
                spans = [
                    (start + len(lead) if text.startswith(lead, start, stop) else start, stop) for start, stop in spans
                ]
            return text, spans, []
        spans, hidden = [], []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._render(messages[:index], True, variables)
                after = self._render(messages[: index + 1], False, variables)
            except InvalidRequest:
                before, after = "", None
            if after is None or not after.startswith(before) or not text.startswith(after):
                hidden.append(index)
            else:
                spans.append((len(before), len(before) + _answer_length(after[len(before) :], tokenizer)))
        return text, spans, hidden


def _hides_answer(index: int) -> CheckpointError:
    return CheckpointError(
        f"the chat template does not show where the answer of messages[{index}] begins and ends",
        hint="put {% generation %}…{% endgeneration %} around the assistant's answer in the template",
    )


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
