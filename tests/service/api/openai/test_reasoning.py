"""What a checkpoint thinks is told apart from what it says, whole and in streams, beside calls of tools, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.api.openai.openai_cases import TIME, TOOL_TEMPLATE, USER, chunks
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.service.api.openai.chat import ChatResponse

PATH = "/v1/chat/completions"
# Earlier answers are shown without their reasoning; `open` puts its beginning into the prompt, as DeepSeek-R1 does.
THINKING = TOOL_TEMPLATE.replace("message.content }}", "message.content.split('</think>')[-1] }}")
OPENING = THINKING.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")


@pytest.fixture(scope="module", params=["closed", "opened"])
def thinking(request, serve, tiny_checkpoint, tmp_path_factory) -> Iterator[tuple[Any, bool]]:
    tiny = load_checkpoint(tiny_checkpoint("plain", context=512))
    opened = request.param == "opened"
    assert len({TOOL_TEMPLATE, THINKING, OPENING}) == 3
    path = save_checkpoint(
        tmp_path_factory.mktemp("thinking") / "thinking",
        model=tiny.model,
        tokenizer=tiny.tokenizer,
        chat=ChatTemplate(OPENING if opened else THINKING),
        generation={},
        details={"note": "random weights"},
    )
    with serve(path) as served:
        yield served, opened


def forced(text: str, opened: bool, **more: Any) -> dict[str, Any]:
    """A request whose answer is `text`, and begins inside of the block where the prompt has opened it."""
    answer = text.removeprefix("<think>\n") if opened else text
    grammar = "start: " + " ".join(f'"{line}"' for line in answer.replace('"', '\\"').split("\n\n"))
    grammar = grammar.replace("\n", "\\n").replace('" "', '\\n\\n" "')
    return {"messages": USER, "grammar": grammar, "max_tokens": 200, "temperature": 0, **more}


def test_thoughts_are_no_part_of_the_content(thinking) -> None:
    served, opened = thinking
    body = forced("<think>\nHm.\nYes.\n</think>\n\nHello.", opened)
    answer = served.answer(PATH, **body)
    assert ChatResponse.model_validate(answer).model_dump(exclude_unset=True) == answer
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.\nYes.", "Hello.")
    *parts, done = chunks(served, PATH, **body)
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert done == "[DONE]"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm.\nYes."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hello."
    kinds = [name for delta in deltas for name in delta if name != "role" and delta[name]]
    assert kinds == sorted(kinds, reverse=True), "what is thought comes first"


def test_a_block_that_is_cut_off_is_all_thought(thinking) -> None:
    served, opened = thinking
    message = served.answer(PATH, **forced("<think>\nHm, yes, no, well", opened))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, yes, no, well", "")


def test_a_call_after_thinking_is_read(thinking) -> None:
    served, opened = thinking
    call = '<tool_call>\n{"name": "time_now", "arguments": {}}\n</tool_call>'
    choice = served.answer(PATH, tools=[TIME], **forced(f"<think>\nHm.\n</think>\n\n{call}", opened))["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["reasoning_content"] == "Hm."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "time_now", "arguments": "{}"}


def test_a_template_without_reasoning_leaves_the_text_as_it_is(served) -> None:
    message = served.answer(PATH, **forced("<think>\nHm.\n</think>\n\nHello.", False))["choices"][0]["message"]
    assert message["content"] == "<think>\nHm.\n</think>\n\nHello." and "reasoning_content" not in message
