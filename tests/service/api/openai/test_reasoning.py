"""What a checkpoint thinks is told apart from what it says, whole and in streams, beside calls of tools, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.service.api.openai.openai_cases import TIME, TOOL_TEMPLATE, USER, chunks
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.service.api.anthropic.schemas import AnthropicMessage
from topkapi.service.api.openai.chat import ChatResponse
from topkapi.service.api.openai.responses import ResponsesResponse

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


def test_the_thoughts_of_an_answer_are_counted_and_bounded(thinking) -> None:
    served, opened = thinking
    body = forced("<think>\nHm.\nYes.\n</think>\n\nHello.", opened)
    usage = served.answer(PATH, **body)["usage"]
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < thought < usage["completion_tokens"]
    if not opened:
        return
    bounded = {"messages": USER, "temperature": 1, "seed": 5, "max_tokens": 60, "ignore_end_token": True}
    answer = served.answer(PATH, **bounded, thinking_token_budget=7, return_token_ids=True)
    # The tiny vocabulary spells the marks; a real one has a token for each.
    close = served.answer("/tokenize", text="</think>")["token_ids"]
    ids = answer["choices"][0]["token_ids"]
    assert ids[7 : 7 + len(close)] == close
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 7 + len(close)
    assert len(ids) == 60 and answer["choices"][0]["message"]["content"]


def test_what_has_a_form_is_not_thought_about(thinking) -> None:
    served, _ = thinking
    for form in ({"choice": ["yes", "no"]}, {"response_format": {"type": "json_object"}, "max_tokens": 40}):
        message = served.answer(PATH, messages=USER, **form)["choices"][0]["message"]
        assert "reasoning_content" not in message and message["content"]
    must = served.answer(PATH, messages=USER, tools=[TIME], tool_choice="required", max_tokens=100)
    assert must["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "time_now"
    refused = served.post(PATH, messages=USER, choice=["yes"], thinking_budget=5)
    assert refused.status_code == 400 and "thinking_budget" in refused.text


def test_a_budget_is_refused_where_nothing_is_thought(served) -> None:
    refused = served.post(PATH, messages=USER, thinking_budget=5)
    assert refused.status_code == 400 and "knows of thinking" in refused.text


def _response(served, opened: bool, text: str, **more: Any) -> dict[str, Any]:
    body = forced(text, opened)
    return {"input": "Hello", "grammar": body["grammar"], "max_output_tokens": 200, "temperature": 0, **more}


def test_responses_tell_thoughts_as_an_item_of_their_own(thinking) -> None:
    served, opened = thinking
    body = _response(served, opened, "<think>\nHm.\nYes.\n</think>\n\nHello.")
    answer = served.answer("/v1/responses", **body)
    assert ResponsesResponse.model_validate(answer)
    thought, said = answer["output"]
    assert (thought["type"], thought["status"], thought["summary"]) == ("reasoning", "completed", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm.\nYes."}]
    assert said["content"][0]["text"] == "Hello."
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    more = {"extra_body": {"grammar": body["grammar"]}}
    parsed = client.responses.create(model="thinking", input="Hello", max_output_tokens=200, temperature=0, **more)
    assert parsed.output_text == "Hello." and parsed.output[0].type == "reasoning"
    events = list(
        client.responses.create(
            model="thinking", input="Hello", max_output_tokens=200, temperature=0, stream=True, **more
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "Hm.\nYes."
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello."
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
    # An answer's items go back as they came.
    again = [{"role": "user", "content": "Hello"}, *answer["output"], {"role": "user", "content": "And?"}]
    assert served.post("/v1/responses", input=again, max_output_tokens=2).status_code == 200
    lost = served.post("/v1/responses", input=[answer["output"][0], {"role": "user", "content": "And?"}])
    assert lost.status_code == 400 and "input[0]" in lost.text


def test_thoughts_that_are_cut_off_leave_an_empty_message(thinking) -> None:
    served, opened = thinking
    body = _response(served, opened, "<think>\nHm, yes, no, well, if so, then", max_output_tokens=12)
    answer = served.answer("/v1/responses", **body)
    assert answer["status"] == "incomplete"
    assert [(item["type"], item["status"]) for item in answer["output"]] == [
        ("reasoning", "completed"),
        ("message", "incomplete"),
    ]


def test_messages_tell_thoughts_as_a_block_of_their_own(thinking) -> None:
    served, opened = thinking
    body = {"model": "thinking", "max_tokens": 60, "messages": USER}
    answer = served.answer("/v1/messages", **body, thinking={"type": "enabled", "budget_tokens": 9})
    assert AnthropicMessage.model_validate(answer)
    if opened:
        # About one in twenty that are drawn ends where the text would begin.
        while len(answer["content"]) == 1 and answer["stop_reason"] == "end_turn":
            answer = served.answer("/v1/messages", **body, thinking={"type": "enabled", "budget_tokens": 9})
        thought, said = answer["content"]
        assert (thought["type"], said["type"]) == ("thinking", "text")
        client = anthropic.Anthropic(base_url=served.url, api_key="none")
        final = None
        while final is None or (len(final.content) == 1 and final.stop_reason == "end_turn"):
            with client.messages.stream(**body, thinking={"type": "enabled", "budget_tokens": 9}) as stream:
                deltas = [event for event in stream if event.type == "content_block_delta"]
                final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        assert (
            "".join(e.delta.thinking for e in deltas if e.delta.type == "thinking_delta") == final.content[0].thinking
        )
        omitted = {"type": "enabled", "budget_tokens": 9, "display": "omitted"}
        answer = served.answer("/v1/messages", **body, thinking=omitted)
        while not answer["content"] and answer["stop_reason"] == "end_turn":
            answer = served.answer("/v1/messages", **body, thinking=omitted)
        assert [block["type"] for block in answer["content"]] == ["text"]
        back = [*USER, {"role": "assistant", "content": final.to_dict()["content"]}, *USER]
        assert served.post("/v1/messages", **(body | {"messages": back})).status_code == 200
    begun = [*USER, {"role": "assistant", "content": "Well"}]
    answer = served.answer("/v1/messages", **(body | {"messages": begun}))
    assert [block["type"] for block in answer["content"]] == ["text"], "how an answer begins is no thought"
    too_long = served.post("/v1/messages", **body, thinking={"type": "enabled", "budget_tokens": 60})
    assert too_long.status_code == 400 and "below max_tokens" in too_long.text


def test_messages_refuse_thinking_of_checkpoints_that_do_not(served) -> None:
    body = {"model": "chat", "max_tokens": 5, "messages": USER}
    refused = served.post("/v1/messages", **body, thinking={"type": "adaptive"})
    assert refused.status_code == 400 and "knows of thinking" in refused.text
    assert served.post("/v1/messages", **body, thinking={"type": "disabled"}).status_code == 200
