"""Modelfiles: what ollama has to be told about a GGUF file, its conversations as a Go template among it.

ollama does not read the chat template in the file. Its own is written from what the checkpoint's does: how each turn
begins and ends is found by rendering, and that turns in a row are no more than that is tried on several conversations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.decoding.parameters import BY_NAME, PARAMETERS, DecodingParameters, decoding_defaults, resolve
from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.storage.checkpoint import Checkpoint

_MARKS = {"system": "Mark the system", "user": "Mark the user", "assistant": "Mark the assistant"}
Turn = tuple[str, str]
"""A role and what is said."""

_TRIED: tuple[tuple[Turn, ...], ...] = (
    (("user", "One."),),
    (("user", "One."), ("assistant", "Two."), ("user", "Three.")),
    (("user", "One."), ("assistant", "Two."), ("user", "Three."), ("assistant", "Four."), ("user", "Five.")),
    (("system", "Zero."), ("user", "One.")),
    (("system", "Zero."), ("user", "One."), ("assistant", "Two."), ("user", "Three.")),
    (("system", "Zero."), ("user", "One."), ("assistant", "Two."), ("user", "Three."), ("assistant", "Four."),
     ("user", "Five.")),
)  # fmt: skip


@dataclass(frozen=True)
class TurnForms:
    """A chat template as what stands around each role's turns.

    `unsaid` comes first where nobody has said what the system is (some templates have a system message of their own);
    `answer` is where the assistant begins.
    """

    around: dict[str, tuple[str, str]]
    unsaid: str
    answer: str

    @classmethod
    def of(cls, chat: ChatTemplate, begin: str = "") -> TurnForms:
        """Those of a checkpoint's template, less `begin`, which the reader of the prompt puts before it by itself.

        Raises `CheckpointError` for a template that does more than this says, naming a conversation.
        """

        def rendered(turns: Sequence[Turn], answer: bool) -> str:
            messages = [{"role": role, "content": content} for role, content in turns]
            try:
                text = chat.render(messages, add_generation_prompt=answer)
            except InvalidRequest as error:
                raise _inexpressible(turns, f"the chat template refuses it: {error.message}") from None
            return text.removeprefix(begin)

        system, user, assistant = _MARKS.items()
        alone, answered = rendered([user], False), rendered([user], True)
        with_system = rendered([system, user], False)
        with_assistant = rendered([user, assistant, user], False)
        if not answered.startswith(alone) or alone.count(user[1]) != 1:
            raise _inexpressible([user], "the text before an answer depends on what follows")
        if with_system.count(system[1]) != 1 or with_assistant.count(assistant[1]) != 1:
            raise _inexpressible([system, user, assistant], "a turn is not shown once")
        before_user, after_user = alone.split(user[1])
        before, between = with_system.split(system[1])
        between = between.split(user[1])[0]
        # What both end in begins a user's turn, less what ended the one before it.
        opening = _common_end(before_user, between).removeprefix(after_user)
        unsaid = before_user.removesuffix(opening)
        middle = with_assistant[len(alone) :].split(assistant[1])
        answer = answered[len(alone) :]
        after_assistant = middle[1].split(user[1])[0].removesuffix(opening)
        around = {
            "system": (before, between.removesuffix(opening)),
            "user": (opening, after_user),
            "assistant": (middle[0], after_assistant),
        }
        forms = cls(around, unsaid, answer)
        for turns in _TRIED:
            if rendered(turns, True) != forms.rendered(turns):
                raise _inexpressible(turns, "the chat template does more than put something around each turn")
        return forms

    def rendered(self, turns: Sequence[Turn]) -> str:
        """A conversation that is to be answered, as the Go template would render it."""
        parts = [self.unsaid] if all(role != "system" for role, _ in turns) else []
        parts += (f"{self.around[role][0]}{content}{self.around[role][1]}" for role, content in turns)
        return "".join([*parts, self.answer])

    def go_template(self) -> str:
        """The same in Go's form, every text as a quoted one, so that no space between them counts.

        An answer that is begun, the last turn being the assistant's, is gone on with.
        """
        lines = [f"{{{{- if not .System }}}}{_said(self.unsaid)}{{{{ end }}}}"] if self.unsaid else []
        lines.append("{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}")
        for number, role in enumerate(("system", "user", "assistant")):
            before, after = self.around[role]
            end = f"{{{{ if not $last }}}}{_said(after)}{{{{ end }}}}" if role == "assistant" else _said(after)
            word = "if" if number == 0 else "else if"
            lines.append(f'{{{{- {word} eq .Role "{role}" }}}}{_said(before)}{{{{ .Content }}}}{end}')
        lines.append("{{- end }}")
        lines.append(f'{{{{- if and $last (ne .Role "assistant") }}}}{_said(self.answer)}{{{{ end }}}}')
        return "\n".join([*lines, "{{- end }}"])


def modelfile(checkpoint: Checkpoint, file: str) -> str:
    """The Modelfile beside the GGUF `file` of a checkpoint: its template, its parameters and what ends an answer.

    Raises `CheckpointError` for a chat template that has no form there, and for a stored decoding default that ollama
    has no parameter for.
    """
    chat, tokenizer = checkpoint.chat, checkpoint.tokenizer
    effective = resolve({"seed": 0}, decoding_defaults(checkpoint.generation, chat=chat is not None),
                        vocab_size=checkpoint.config.vocab_size, vocabulary=tokenizer)  # fmt: skip
    lines = [f"FROM ./{file}", ""]
    if chat is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        begin = tokenizer.begin_token_id if tokenizer.adds_begin_token else None
        forms = TurnForms.of(chat, "" if begin is None else tokenizer.token_bytes(begin).decode("utf-8", "replace"))
        lines.append(f'TEMPLATE """{forms.go_template()}"""')
    lines += ["", *_parameters(effective, checkpoint.config.context_length)]
    ends = dict.fromkeys((*checkpoint.config.end_token_ids, *(chat.turn_end(tokenizer) if chat else ())))
    for token_id in ends:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.token_bytes(token_id).decode('utf-8', 'replace'))}")
    return "\n".join([*lines, ""])


_NAMES = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "mirostat": "mirostat", "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}  # fmt: skip
"""What ollama calls decoding parameters."""

_ALWAYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Those whose defaults are others there."""

_ELSEWHERE = {"max_tokens": "num_predict", "repetition_range": "repeat_last_n"}
_NOT_SAID = {"seed", "order", *_NAMES, *_ELSEWHERE}


def _parameters(effective: DecodingParameters, context_length: int) -> list[str]:
    wrong = [row.name for row in PARAMETERS
             if row.name not in _NOT_SAID and getattr(effective, row.name) != row.default]  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"ollama has no parameter for the checkpoint's default {wrong[0]}",
            field=wrong[0],
            hint="take it out of generation_config.json, or export the GGUF file alone: topkapi export gguf",
        )
    said = {theirs: getattr(effective, ours) for ours, theirs in _NAMES.items()
            if ours in _ALWAYS or getattr(effective, ours) != BY_NAME[ours].default}  # fmt: skip
    if effective.repetition_penalty != 1:
        # Nothing said means all tokens here, and the last 64 there.
        said["repeat_last_n"] = effective.repetition_range or -1
    if effective.max_tokens is not None:
        said["num_predict"] = effective.max_tokens
    said["num_ctx"] = context_length
    return [f"PARAMETER {name} {value:g}" for name, value in said.items()]


def _said(text: str) -> str:
    """A text as a Go template says it: nothing for none."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _common_end(first: str, second: str) -> str:
    """The longest text that both end in."""
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]


def _inexpressible(turns: Sequence[Turn], why: str) -> CheckpointError:
    said = ", ".join(role for role, _ in turns)
    return CheckpointError(
        f"the chat template has no form that ollama reads (a conversation of {said}): {why}",
        field="chat_template",
        hint="export the GGUF file alone and write its Modelfile by hand: topkapi export gguf",
    )
