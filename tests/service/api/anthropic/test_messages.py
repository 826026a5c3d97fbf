"""Anthropic's routes through its own client over a real socket: sync, async and streaming, with and without tools."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import anthropic
import pytest

from tests.service.api.test_errors import LONG
from tests.service.api.tgi.test_routes import fails_after
from tests.tiny import run_by
from topkapi.engine.engine import Engine
from topkapi.model.errors import Overloaded
from topkapi.service.api.anthropic import schemas as anthropic_schemas

USER = [{"role": "user", "content": "Say hello"}]
# A random network says something after this that is not one character for ever.
BEGUN = [*USER, {"role": "assistant", "content": "The value of the expression is"}]

TOOLS_TEMPLATE = """\
{%- if tools -%}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "get_time", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}


@pytest.fixture(scope="module")
def client(served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def with_tools(serve, tiny_checkpoint) -> Iterator:
    checkpoint: Path = tiny_checkpoint("tools", context=1024)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TOOLS_TEMPLATE}))
    (checkpoint / "topkapi.json").unlink()
    with serve(checkpoint) as served:
        yield served


def test_the_client_gets_what_the_network_says(served, client) -> None:
    message = client.messages.create(
        model="chat",
        max_tokens=10,
        system="Be brief.",
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"temperature": 0},
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    native = served.answer("/generate", messages=turns, max_tokens=10, temperature=0)
    (block,) = message.content
    assert (message.type, message.role, message.model) == ("message", "assistant", "chat")
    assert (block.type, block.text) == ("text", native["outputs"][0]["text"])
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    usage = message.usage
    assert usage.output_tokens == 10
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == native["usage"]["prompt_tokens"]


def test_the_answer_has_the_documented_shape(served) -> None:
    answer = served.answer("/v1/messages", model="chat", max_tokens=4, messages=USER)
    assert anthropic_schemas.AnthropicMessage.model_validate(answer).model_dump() == answer
    assert answer["id"].startswith("msg_")


def test_blocks_system_blocks_and_turns_in_a_row(served, client) -> None:
    def count(messages: list, **more: object) -> int:
        return client.messages.count_tokens(model="chat", messages=messages, **more).input_tokens

    block = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    both = [{"role": "user", "content": "a\na"}]
    assert count(both) == len(served.answer("/tokenize", messages=both)["token_ids"])
    assert count([{"role": "user", "content": [block, block]}]) == count(both)
    assert count([{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]) == count(both)
    assert count(both, system=[block, block]) == count(both, system="a\na") > count(both)


def test_a_last_turn_of_the_assistant_is_gone_on_with(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    prompt = served.answer("/tokenize", messages=USER)["token_ids"] + tokenizer.encode("Hello, I")
    native = served.answer("/generate", prompt=prompt, max_tokens=8, temperature=0)["outputs"][0]["text"]
    turns = [*USER, {"role": "assistant", "content": "Hello, I"}]
    answer = served.answer("/v1/messages", model="chat", max_tokens=8, temperature=0, messages=turns)
    assert answer["content"] == [{"type": "text", "text": native}]


def test_why_it_stopped(client) -> None:
    def create(**more: object) -> anthropic.types.Message:
        asked = {"model": "chat", "max_tokens": 12, "messages": BEGUN, "extra_body": {"temperature": 0}}
        return client.messages.create(**(asked | more))

    text = create().content[0].text
    stopped = create(stop_sequences=[text[4:7], "never"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[4:7])
    assert stopped.content[0].text == text[: text.index(text[4:7])]
    shape = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    structured = create(output_config={"format": {"type": "json_schema", "schema": shape}}, max_tokens=60)
    assert (json.loads(structured.content[0].text), structured.stop_reason) == ({"a": 1}, "end_turn")
    assert create(max_tokens=1000).stop_reason == "model_context_window_exceeded"
    nothing = create(max_tokens=0)
    assert (nothing.content[0].text, nothing.stop_reason) == ("", "max_tokens")


def test_sampling_parameters_act(client) -> None:
    def text(**more: object) -> str:
        return client.messages.create(model="chat", max_tokens=12, messages=USER, extra_body=more).content[0].text

    assert len({text() for _ in range(4)}) > 1
    greedy = text(temperature=0)
    assert {text(temperature=1.0, top_k=1), text(top_p=0.0), greedy} == {greedy}


def test_a_stream_adds_up_to_the_whole_answer(client) -> None:
    asked = {"model": "chat", "max_tokens": 30, "messages": BEGUN, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, 30)
    total = (whole.usage.input_tokens, whole.usage.cache_read_input_tokens)
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == sum(map(int, total))


def test_the_events_come_in_their_order(served) -> None:
    response = served.post("/v1/messages", model="chat", max_tokens=5, temperature=0, messages=USER, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    names, data = [], []
    for event in response.text.strip().split("\n\n"):
        name, line = event.split("\n")
        names.append(name.removeprefix("event: "))
        data.append(json.loads(line.removeprefix("data: ")))
    assert [each["type"] for each in data] == names
    assert [name for name in names if name not in ("content_block_delta", "ping")] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert names.count("ping") == 1
    start = data[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None) and start["usage"]["input_tokens"] > 0
    assert data[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert data[-2]["usage"]["output_tokens"] == 5


def test_the_asynchronous_client(served, client) -> None:
    asked = {"model": "chat", "max_tokens": 12, "messages": BEGUN, "extra_body": {"temperature": 0}}

    async def both() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as asynchronous:
            whole = await asynchronous.messages.create(**asked)
            async with asynchronous.messages.stream(**asked) as stream:
                return whole.content[0].text, "".join([text async for text in stream.text_stream])

    text = client.messages.create(**asked).content[0].text
    assert asyncio.run(both()) == (text, text)


BAD = [
    ({}, "model is missing"),
    ({"model": "chat", "messages": USER}, "max_tokens is missing"),
    ({"model": "chat", "max_tokens": 5}, "messages is missing"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is empty"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "system", "content": "a"}]}, "the user has said nothing"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "the user has said nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": LONG}]}, "context holds 128"),
    ({"model": "base"}, "without a chat template"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"mcp_servers": []}, "mcp_servers"),
    ({"container": "x"}, "container"),
    ({"output_config": {"effort": "low"}}, "output_config.effort"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"tools": [WEATHER]}, "takes no tools"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
    ({"tool_choice": {"type": "any"}}, "tool_choice goes with tools"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "takes no tools"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[json.dumps(body)[:60] for body, _ in BAD])
def test_bad_requests_are_refused_in_anthropics_shape(served, changes, words) -> None:
    complete = {"model": "chat", "max_tokens": 5, "messages": USER}
    body = changes if "is missing" in words else complete | changes
    response = served.post("/v1/messages", **body)
    assert response.status_code == 400, response.text
    error = anthropic_schemas.AnthropicError.model_validate(response.json()).error
    assert error.type == "invalid_request_error"
    assert words in error.message and "\n" not in error.message


def test_a_lenient_server_leaves_out_what_it_cannot_do(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("lenient"), ignore_unknown_fields=True) as served:
        more = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "container": "x"}
        response = served.post("/v1/messages", model="lenient", max_tokens=2, messages=USER, **more)
        assert response.status_code == 200
        assert set(response.headers["X-Ignored-Parameters"].split(", ")) == {"thinking", "container"}


def test_the_client_raises_its_own_errors(served, client) -> None:
    with pytest.raises(anthropic.BadRequestError, match="context holds 128"):
        client.messages.create(model="chat", max_tokens=5, messages=[{"role": "user", "content": LONG}])
    with pytest.raises(anthropic.NotFoundError, match="no checkpoint named 'claude'"):
        client.messages.create(model="claude", max_tokens=5, messages=USER)
    response = served.client.get("/v1/messages")
    assert (response.status_code, response.json()["type"]) == (405, "error")
    assert served.client.get("/v1/messages/batches").json()["error"]["type"] == "not_found_error"


@pytest.mark.one_process("has the engine refuse")
def test_a_full_queue_is_anthropics_overload(client, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Overloaded("the queue is full", retry_after=7)

    monkeypatch.setattr(Engine, "submit", refuse)
    with pytest.raises(anthropic.APIStatusError, match="the queue is full") as refused:
        client.messages.create(model="chat", max_tokens=5, messages=USER)
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (529, "7")


@pytest.mark.one_process("has steps of the engine fail")
def test_a_failed_step_in_mid_stream_is_an_error_event(served, client, monkeypatch) -> None:
    run = served.models.get().engine.network.run
    run_by(monkeypatch, served.models.get().engine.network, fails_after(4, run))
    seen = ""
    with (
        pytest.raises(anthropic.APIStatusError, match="api_error"),
        client.messages.stream(model="chat", max_tokens=50, messages=USER) as stream,
    ):
        for text in stream.text_stream:
            seen += text
    assert seen
    served.wait_until_idle()
    with pytest.raises(anthropic.InternalServerError):
        client.messages.create(model="chat", max_tokens=50, messages=USER)


@pytest.mark.one_process("slows the network down")
def test_a_client_that_leaves_frees_the_engine(served, client, monkeypatch) -> None:
    engine = served.models.get().engine
    run = engine.network.run

    def slow(*arguments: object) -> object:
        time.sleep(0.02)
        return run(*arguments)

    run_by(monkeypatch, engine.network, slow)
    before = engine.counters.generated_tokens
    with client.messages.stream(model="chat", max_tokens=90, messages=USER) as stream:
        next(iter(stream.text_stream))
    served.wait_until_idle()
    assert engine.counters.generated_tokens - before < 50


def test_a_tool_that_must_be_called_is_called(with_tools) -> None:
    client = anthropic.Anthropic(base_url=with_tools.url, api_key="none", max_retries=0)
    asked = {"model": "tools", "max_tokens": 200, "messages": USER, "tools": [WEATHER, CLOCK]}
    named = client.messages.create(**asked, tool_choice={"type": "tool", "name": "get_weather"})
    (block,) = named.content
    assert (named.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "get_weather")
    assert block.input["city"] in ("Paris", "Rome") and block.id.startswith("toolu_")
    alone = {"type": "any", "disable_parallel_tool_use": True}
    (either,) = client.messages.create(**asked, tool_choice=alone).content
    assert either.name in ("get_weather", "get_time")

    with client.messages.stream(**asked, tool_choice={"type": "tool", "name": "get_weather"}) as stream:
        partial = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert (final.stop_reason, final.content[0].name) == ("tool_use", "get_weather")
    assert json.loads("".join(partial)) == final.content[0].input
    assert final.content[0].input["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(("cut", "reason"), [({"stop_sequences": ['"city"']}, "stop_sequence"),
                                             ({"max_tokens": 20}, "max_tokens")])  # fmt: skip
def test_half_a_call_is_no_call(with_tools, cut, reason) -> None:
    client = anthropic.Anthropic(base_url=with_tools.url, api_key="none", max_retries=0)
    asked = {"model": "tools", "max_tokens": 200, "messages": USER, "tools": [WEATHER], **cut}
    asked["tool_choice"] = {"type": "tool", "name": "get_weather"}
    whole = client.messages.create(**asked)
    assert (whole.stop_reason, [block.type for block in whole.content]) == (reason, ["text"])
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == reason and [block.type for block in final.content] == ["text"]


@pytest.mark.one_process("looks at what the engine is given")
def test_tools_calls_and_results_reach_the_template(with_tools) -> None:
    tokenizer = with_tools.models.get().checkpoint.tokenizer
    turns = [
        *USER,
        {"role": "assistant", "content": [
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
            {"type": "text", "text": "And now?"},
        ]},
    ]  # fmt: skip
    body = {"model": "tools", "max_tokens": 1, "tools": [CLOCK], "messages": turns}
    read: list[list[int]] = []
    engine = with_tools.models.get().engine
    submit = engine.submit
    engine.submit = lambda job, *rest, **more: (read.append(list(job.prompt)), submit(job, *rest, **more))[1]
    try:
        with_tools.answer("/v1/messages", **body)
    finally:
        engine.submit = submit
    text = tokenizer.decode(read[0])
    assert '"name": "get_time"' in text
    call = re.search(r"Let me look\.<tool_call>\n(.*)\n</tool_call><\|im_end\|>", text)
    assert call and json.loads(call[1]) == {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>" in text
    counted = with_tools.answer("/v1/messages/count_tokens", model="tools", tools=[CLOCK], messages=turns)
    assert counted == {"input_tokens": len(read[0])}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tools": [CLOCK, CLOCK]}, "two tools named 'get_time'"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "other"}}, "none of the tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [CLOCK], "tool_choice": {"type": "auto", "name": "get_time"}}, "tool_choice.name"),
        ({"messages": [*USER, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "x", "name": "get_time", "input": {}}]}]}, "whose result is missing"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_use", "id": "x", "name": "get_time", "input": {}}]}]}, "belongs to the assistant"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(with_tools, changes, words) -> None:
    response = with_tools.post("/v1/messages", **({"model": "tools", "max_tokens": 5, "messages": USER} | changes))
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text
