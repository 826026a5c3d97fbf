"""The chat tab: a conversation with a checkpoint, or texts for a base checkpoint to continue."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from gradio.components.chatbot import ExampleMessage

from topkapi.model.errors import TopkapiError
from topkapi.service.generation import Generation, Plan, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.prompting import Message, conversation_tokens, fit_conversation, prompt_tokens
from topkapi.service.ui.controls import Controls

Turn = dict[str, Any]

CHAT_EXAMPLES = (
    "Hello! What can you do?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse.",
)
BASE_EXAMPLES = ("Once upon a time, there was", "The city lies on the river and", "It was late in the evening when")
CHAT_PLACEHOLDER = "## Ask something\nThe answer appears as it is written; the square button stops it."
BASE_PLACEHOLDER = (
    "## Begin a text\nThis is a base checkpoint: it knows no conversation. It continues what you write, each text on "
    "its own."
)
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
SECONDS_BETWEEN_UPDATES = 0.08
CHARACTERS_PER_SECOND = 50_000
REASONS = {
    "stop": "ended by itself",
    "length": "cut off at the token limit",
    "deadline": "out of time",
    "cancelled": "stopped",
}


def chat_tab(models: Models, page: gr.Blocks) -> None:
    """Render the tab inside the surrounding `page`."""
    first = models.get()
    with gr.Row(elem_id="chat", equal_height=False):
        with gr.Column(scale=3, min_width=320, elem_id="talk"):
            conversation = gr.Chatbot(
                show_label=False,
                placeholder=_placeholder(first),
                examples=_examples(first),
                height="100%",
                scale=1,
                buttons=["copy", "copy_all"],
                # An answer of a small model is text, not markup: nothing of it is to be hidden or interpreted.
                render_markdown=False,
                feedback_options=None,
                elem_id="conversation",
            )
            message = gr.Textbox(
                placeholder="Write here; Enter sends",
                label="Message",
                show_label=False,
                container=False,
                autofocus=True,
                submit_btn=True,
                elem_id="message",
            )
            status = gr.Markdown(_invitation(first), elem_id="status")
        with gr.Column(scale=1, min_width=300, elem_id="settings"):
            choice = gr.Dropdown(models.names, value=first.name, label="Checkpoint", elem_id="checkpoint")
            system = gr.Textbox(
                "", label="System message", lines=2, placeholder="none", visible=_talks(first), elem_id="system"
            )
            controls = Controls(first)

    # The first event of each chain shows the message at once and swaps the send button for a stop button.
    inputs = [conversation, choice, system, *controls.components]
    answers = [
        begin.then(_answer(models, controls), inputs, [conversation, message, status], concurrency_limit=None, **QUIET)
        for begin in (
            message.submit(_send, [message, conversation], [message, conversation], queue=False, **QUIET),
            conversation.example_select(_send_example, conversation, [message, conversation], queue=False, **QUIET),
            conversation.retry(_send_again, conversation, [message, conversation], queue=False, **QUIET),
        )
    ]
    # The conversation lives in the browser: it survives a reload and a restart of the server, and nobody else sees it.
    stored = gr.BrowserState([], storage_key="topkapi-conversation", secret="topkapi")
    changes = [
        *(answer.then(_ready, None, message, queue=False, **QUIET) for answer in answers),
        message.stop(_ready, None, message, queue=False, cancels=answers, **QUIET).then(
            _stopped, status, status, queue=False, **QUIET
        ),
        conversation.undo(_take_back, conversation, [message, conversation], queue=False, **QUIET),
        conversation.clear(lambda: "", None, status, queue=False, **QUIET),
    ]
    for change in changes:
        change.then(None, conversation, stored, js="(turns) => [turns]")
    page.load(lambda turns: turns or [], stored, conversation, queue=False, **QUIET)

    built = models.names

    def begin() -> tuple[Any, list[str]]:
        names = models.names
        return (gr.update(choices=names, value=next(iter(names), None)) if names != built else gr.skip()), names

    def offer(before: list[str]) -> tuple[Any, list[str]]:
        # An open list that shrinks breaks Gradio's page: what was unloaded stays until the page is loaded again.
        names = list(dict.fromkeys([*before, *models.names]))
        return (gr.update(choices=names) if names != before else gr.skip()), names

    def choose(name: str | None, before: str) -> list[Any]:
        # What was unloaded since is told in the answer to the next message. What was chosen before keeps its controls:
        # a page that has just been loaded may say again what it shows, and must not undo what was typed meanwhile.
        if name not in models.names or name == before:
            return [gr.skip()] * (4 + len(controls.components))
        model = models.get(name)
        return [
            name,
            gr.update(visible=_talks(model)),
            gr.Chatbot(examples=_examples(model), placeholder=_placeholder(model)),
            _invitation(model),
            *controls.defaults(model),
        ]

    def reset(name: str | None) -> list[Any]:
        if name not in models.names:
            return [gr.skip()] * len(controls.components)
        return controls.defaults(models.get(name))

    # Checkpoints come and go while the studio is open.
    offered, chosen = gr.State(built), gr.State(first.name)
    page.load(begin, None, [choice, offered], queue=False, **QUIET)
    choice.focus(offer, offered, [choice, offered], queue=False, **QUIET)
    choice.change(
        choose,
        [choice, chosen],
        [chosen, system, conversation, status, *controls.components],
        queue=False,
        **QUIET,
    )
    controls.reset.click(reset, choice, controls.components, queue=False, **QUIET)


def _send(text: str, turns: list[Turn]) -> tuple[Any, list[Turn]]:
    if not text.strip():
        return gr.skip(), turns
    return gr.Textbox("", submit_btn=False, stop_btn=True), [*turns, _turn("user", text)]


def _send_example(turns: list[Turn], chosen: gr.SelectData) -> tuple[Any, list[Turn]]:
    return _send(chosen.value["text"], turns)


def _send_again(turns: list[Turn], chosen: gr.RetryData) -> tuple[Any, list[Turn]]:
    asked = _last_question(turns)
    return _send(_text(turns[asked]), turns[:asked])


def _take_back(turns: list[Turn], chosen: gr.UndoData) -> tuple[Any, list[Turn]]:
    asked = _last_question(turns)
    return gr.Textbox(_text(turns[asked])), turns[:asked]


def _last_question(turns: list[Turn]) -> int:
    return max(position for position, turn in enumerate(turns) if turn["role"] == "user")


def _ready() -> Any:
    return gr.Textbox(submit_btn=True, stop_btn=False)


def _stopped(facts: str) -> str:
    return f"{facts} · {REASONS['cancelled']}"


def _answer(models: Models, controls: Controls) -> Callable[..., AsyncIterator[tuple[Any, ...]]]:
    async def answer(turns: list[Turn], name: str, system: str, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        if not turns or turns[-1]["role"] != "user":
            return
        try:
            model = models.get(name)
            prepared = await asyncio.to_thread(_prepare, model, turns, system, controls.parameters(model, values))
            async with Generation(prepared) as generation:
                output = generation.outputs[0]
                shown = time.monotonic()
                async for _ in generation.steps():
                    # The page draws the whole conversation anew each time: a token at a time would choke it.
                    if time.monotonic() - shown > SECONDS_BETWEEN_UPDATES + len(output.text) / CHARACTERS_PER_SECOND:
                        shown = time.monotonic()
                        yield [*turns, _turn("assistant", output.text)], gr.skip(), _facts(generation)
                yield [*turns, _turn("assistant", output.text)], gr.skip(), _facts(generation)
        except TopkapiError as error:
            # The message goes back to where it can be changed and sent again.
            yield turns[:-1], gr.Textbox(_text(turns[-1])), ""
            notice = f"{error.message} ({error.hint})" if error.hint else error.message
            raise gr.Error(notice, title="That did not work", print_exception=False) from None

    return answer


def _prepare(model: LoadedModel, turns: list[Turn], system: str, parameters: dict[str, Any]) -> Plan:
    if not _talks(model):
        return plan(model, prompt_tokens(model, _text(turns[-1])), parameters)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    messages = [*head, *({"role": turn["role"], "content": _text(turn)} for turn in turns)]
    kept, forgotten = fit_conversation(model, messages, int(parameters["max_tokens"]))
    if forgotten:
        gr.Info(f"The context is full: the oldest {forgotten} messages are no longer read.")
    return plan(model, [conversation_tokens(model, kept)], parameters, chat=True)


def _facts(generation: Generation) -> str:
    output, speed = generation.outputs[0], generation.tokens_per_s
    facts = [f"{len(output.tokens)} tokens", f"seed {generation.parameters.seed}"]
    if output.finish_reason is not None:
        facts += [f"{speed:.0f} tokens/s"] if speed else []
        facts.append(REASONS.get(output.finish_reason, output.finish_reason))
    return " · ".join(facts)


def _turn(role: str, text: str) -> Turn:
    """A turn as the page shows it.

    The page reads content as HTML, so what would be a tag or an entity is escaped (studio.js undoes that in copies). A
    plain string would also lose its indentation on the way.
    """
    escaped = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return {"role": role, "content": [{"type": "text", "text": re.sub(r"<(?=[A-Za-z/!?])", "&lt;", escaped)}]}


def _text(turn: Turn) -> str:
    """The text of a turn, whose content Gradio hands back as a list of typed parts."""
    shown = "".join(part["text"] for part in turn["content"] if part.get("type") == "text")
    return shown.replace("&lt;", "<").replace("&amp;", "&")


def _talks(model: LoadedModel) -> bool:
    return model.checkpoint.chat is not None


def _examples(model: LoadedModel) -> list[ExampleMessage]:
    return [{"text": text} for text in (CHAT_EXAMPLES if _talks(model) else BASE_EXAMPLES)]


def _placeholder(model: LoadedModel) -> str:
    return CHAT_PLACEHOLDER if _talks(model) else BASE_PLACEHOLDER


def _invitation(model: LoadedModel) -> str:
    return f"{model.name} · context of {model.context_length:,} tokens"
