"""POST /v1/chat/completions: the order of a stream, formats, log-probabilities, tools, and what is refused."""

import json
from collections.abc import Iterator

import pytest

from tests.service.api.openai.openai_cases import TIME, TOOL_TEMPLATE, USER, WEATHER, chunks, refused
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.service.api.openai.chat import ChatResponse

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def with_tools(serve, tiny_checkpoint, tmp_path_factory) -> Iterator:
    """A server whose checkpoint has a template with tools."""
    tiny = load_checkpoint(tiny_checkpoint("plain", context=512))
    path = save_checkpoint(
        tmp_path_factory.mktemp("tools") / "tools",
        model=tiny.model,
        tokenizer=tiny.tokenizer,
        chat=ChatTemplate(TOOL_TEMPLATE),
        generation={},
        details={"note": "random weights"},
    )
    with serve(path) as served:
        yield served


def test_an_answer_has_openais_shape(served) -> None:
    answer = served.answer(PATH, messages=USER, max_completion_tokens=6, seed=1, logprobs=True, top_logprobs=2)
    assert ChatResponse.model_validate(answer).model_dump(exclude_unset=True) == answer
    (choice,) = answer["choices"]
    native = served.answer("/generate", messages=USER, max_tokens=6, seed=1)["outputs"][0]
    assert choice["message"] == {"role": "assistant", "content": native["text"], "refusal": None}
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace") == native["text"]
    for entry in entries:
        assert [each["logprob"] for each in entry["top_logprobs"]] == sorted(
            (each["logprob"] for each in entry["top_logprobs"]), reverse=True
        )
        assert len(entry["top_logprobs"]) == 2


def test_a_stream_comes_in_openais_order(served) -> None:
    body = {"messages": USER, "max_tokens": 8, "seed": 2, "n": 2, "logprobs": True, "ignore_eos": True}
    whole = served.answer(PATH, **body)
    *parts, usage, done = chunks(served, PATH, stream_options={"include_usage": True}, **body)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 16
    assert {part["object"] for part in parts} == {"chat.completion.chunk"} and all(p["usage"] is None for p in parts)
    assert len({(part["id"], part["created"]) for part in parts}) == 1
    for choice in whole["choices"]:
        first, *middle, last = [p["choices"][0] for p in parts if p["choices"][0]["index"] == choice["index"]]
        assert first["delta"] == {"role": "assistant", "content": None}
        assert "".join(part["delta"]["content"] for part in middle) == choice["message"]["content"]
        assert (last["delta"], last["finish_reason"]) == ({}, choice["finish_reason"])
        joined = [entry for part in middle if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert joined == choice["logprobs"]["content"]
        assert all(part["finish_reason"] is None for part in (first, *middle))


def test_without_stream_options_a_stream_tells_no_usage(served) -> None:
    *parts, done = chunks(served, PATH, messages=USER, max_tokens=2)
    assert done == "[DONE]" and all("usage" not in part and part["choices"] for part in parts)


def test_roles_and_parts(served) -> None:
    seen = {"max_tokens": 1, "return_token_ids": True}
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    spoken = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    first, second = (served.answer(PATH, messages=each, **seen)["prompt_token_ids"] for each in (plain, spoken))
    assert first == second


def test_formats(served) -> None:
    body = {"messages": USER, "seed": 1, "max_tokens": 60}
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}
    (choice,) = served.answer(PATH, response_format=form, **body)["choices"]
    assert json.loads(choice["message"]["content"])["a"] in (1, 2) and choice["finish_reason"] == "stop"
    (choice,) = served.answer(PATH, response_format={"type": "json_object"}, **body)["choices"]
    assert choice["message"]["content"].startswith("{")
    assert served.answer(PATH, response_format={"type": "text"}, **body)["choices"]


def test_logit_bias_stop_and_seed(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    letter = tokenizer.encode("Q")[0]
    body = {"messages": USER, "max_tokens": 3, "logit_bias": {str(letter): 100}, "temperature": 0}
    assert served.answer(PATH, **body)["choices"][0]["message"]["content"] == "QQQ"
    (choice,) = served.answer(PATH, stop=["QQ"], **body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "QQ")
    first, again = (served.answer(PATH, messages=USER, seed=7, max_tokens=9)["choices"] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_fulfils_the_schema(with_tools, choice) -> None:
    body = {"messages": USER, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "seed": 4}
    whole = with_tools.answer(PATH, max_tokens=120, **body)
    (answer,) = whole["choices"]
    (call,) = answer["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "weather" and call["id"].startswith("call_")
    assert arguments["city"] in ("Ankara", "Izmir") and 1 <= arguments["days"] <= 9
    assert answer["message"]["content"] is None
    assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    assert ChatResponse.model_validate(whole).model_dump(exclude_unset=True) == whole

    *parts, _ = chunks(with_tools, PATH, max_tokens=120, **body)
    deltas = [part["choices"][0]["delta"] for part in parts]
    ((streamed,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert streamed == {"index": 0, "id": streamed["id"], **{name: call[name] for name in ("type", "function")}}
    assert parts[-1]["choices"][0]["finish_reason"] == answer["finish_reason"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize(("cut", "reason"), [({"stop": ['"days"']}, "stop"), ({"max_tokens": 25}, "length")])
def test_half_a_call_is_no_call(with_tools, choice, cut, reason) -> None:
    body = {"messages": USER, "tools": [WEATHER], "tool_choice": choice, "seed": 4, "max_tokens": 120, **cut}
    (answer,) = with_tools.answer(PATH, **body)["choices"]
    assert answer["finish_reason"] == reason and "tool_calls" not in answer["message"]
    assert answer["message"]["content"].startswith('<tool_call>\n{"name": "weather"')
    *streamed, _ = chunks(with_tools, PATH, **body)
    parts = [part["choices"][0] for part in streamed]
    assert not any("tool_calls" in part["delta"] for part in parts)
    assert "".join(part["delta"].get("content") or "" for part in parts) == answer["message"]["content"]
    assert parts[-1]["finish_reason"] == reason


def test_a_schema_that_can_not_be_followed_is_named_by_its_tool(with_tools) -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/nowhere"}}}
    tools = [WEATHER, {"type": "function", "function": {"name": "lost", "parameters": parameters}}]
    error = refused(with_tools.post(PATH, messages=USER, tools=tools, tool_choice="required"))
    assert error["param"] == "tools" and "'lost'" in error["message"] and "nowhere" in error["message"]


def test_parameters_with_definitions_and_without_a_type_are_followed(with_tools) -> None:
    parameters = {"properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"], "additionalProperties": False}
    parameters["$defs"] = {"x": {"enum": [1, 2]}}
    tools = [{"type": "function", "function": {"name": "lost", "parameters": parameters}}]
    (answer,) = with_tools.answer(PATH, messages=USER, tools=tools, tool_choice="required", max_tokens=99)["choices"]
    (call,) = answer["message"]["tool_calls"][:1]
    assert json.loads(call["function"]["arguments"])["a"] in (1, 2)


def test_an_answer_that_chooses_to_call_is_read_as_a_call(with_tools) -> None:
    written = '<tool_call>\n{"name": "time_now", "arguments": {}}\n</tool_call>'
    said = {"messages": USER, "tools": [WEATHER, TIME], "choice": [f"Wait.\n{written}"], "max_tokens": 120}
    (answer,) = with_tools.answer(PATH, **said)["choices"]
    assert answer["message"]["content"] == "Wait." and answer["finish_reason"] == "tool_calls"
    assert [call["function"] for call in answer["message"]["tool_calls"]] == [{"name": "time_now", "arguments": "{}"}]
    (answer,) = with_tools.answer(PATH, **said | {"choice": [f"{written}\n{written}"]})["choices"]
    assert len(answer["message"]["tool_calls"]) == 2
    (answer,) = with_tools.answer(PATH, parallel_tool_calls=False, **said | {"choice": [f"{written}\n{written}"]})[
        "choices"
    ]
    assert len(answer["message"]["tool_calls"]) == 1 and answer["finish_reason"] == "tool_calls"
    (answer,) = with_tools.answer(PATH, **said | {"tool_choice": "none"})["choices"]
    assert answer["message"]["content"] == f"Wait.\n{written}" and "tool_calls" not in answer["message"]


def test_a_tools_answer_goes_back_into_the_conversation(with_tools) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Izmir"}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    answer = with_tools.answer(PATH, messages=messages, tools=[WEATHER], max_tokens=1, return_token_ids=True)
    prompt = with_tools.models.get().checkpoint.tokenizer.decode(answer["prompt_token_ids"])
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Izmir"}}\n</tool_call>' in prompt
    assert "<tool_response>\nSunny.\n</tool_response>" in prompt and '"description": "The weather of a city."' in prompt


IMAGE = {"type": "image_url", "image_url": {"url": "http://a.example/b.png"}}
BAD = [
    ({}, "messages", "missing"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "assistant"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "'text'"),
    ({"messages": [{"role": "user", "content": "a", "refusal": "No."}]}, "messages[0].refusal", "assistant"),
    ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "x"}}]}, "messages[0].audio", "are text"),
    ({"messages": USER, "chat_template_kwargs": {"spoon": 1}}, "chat_template_kwargs.spoon", "no such variable"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "role 'tool' is unknown"),
    ({"messages": USER, "top_logprobs": 2}, "top_logprobs", "go with logprobs"),
    ({"messages": USER, "logprobs": 2}, "logprobs", "true or false"),
    ({"messages": USER, "tools": [WEATHER]}, "tools", "takes no tools"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice", "goes with tools"),
    ({"messages": USER, "parallel_tool_calls": True}, "parallel_tool_calls", "goes with tools"),
    ({"messages": USER, "functions": []}, "functions", "replaced by tools"),
    ({"messages": USER, "audio": {}}, "audio", "answers are text"),
    ({"messages": USER, "modalities": ["audio"]}, "modalities", "answers are text"),
    ({"messages": USER, "web_search_options": {}}, "web_search_options", "looked up"),
    ({"messages": USER, "store": True}, "store", "nothing is stored"),
    ({"messages": USER, "reasoning_effort": "high"}, "reasoning_effort", "does not ask how much"),
    ({"messages": USER, "max_completion_tokens": 0.5}, "max_completion_tokens", "whole number"),
    ({"messages": USER, "response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"messages": USER, "model": "base"}, "messages", "without a chat template"),
    ({"messages": [{"role": "user", "content": "hello " * 300}]}, "messages", "context holds 128"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=lambda value: str(value)[:50])
def test_what_is_wrong_is_a_400_that_names_it(served, body, param, words) -> None:
    error = refused(served.post(PATH, **body))
    assert error["param"] == param and words in error["message"]


BAD_TOOLS = [
    (
        {"tool_choice": {"type": "function", "function": {"name": "rm"}}},
        "tool_choice.function.name",
        "none of the tools",
    ),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "two tools"),
    *(
        ({"tool_choice": choice}, "tool_choice.type", "'function'")
        for choice in (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            {"type": "custom", "custom": {"name": "x"}},
        )
    ),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
    ({"tool_choice": {"type": "function", "name": "weather"}}, "tool_choice.function", "missing"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "'function'"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "exclude"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "of the form"),
    ({"tool_choice": "sometimes"}, "tool_choice", "'required'"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD_TOOLS, ids=lambda value: str(value)[:50])
def test_what_is_wrong_with_tools_is_named(with_tools, body, param, words) -> None:
    error = refused(with_tools.post(PATH, **{"messages": USER, "tools": [WEATHER], **body}))
    assert error["param"] == param and words in error["message"]


def test_a_lenient_server_leaves_out_what_other_servers_know(serve, tiny_checkpoint) -> None:
    part = {"type": "text", "text": "hi", "detail": "low"}
    turn = {"role": "user", "content": [part], "function_call": {"name": "f", "arguments": "{}"}}
    body = {"messages": [turn], "max_tokens": 1, "reasoning_effort": "low"}
    with serve(tiny_checkpoint("lenient"), ignore_unknown_fields=True) as served:
        response = served.post(PATH, **body)
        assert response.status_code == 200, response.text
        ignored = response.headers["x-ignored-parameters"].split(", ")
        assert sorted(ignored) == ["messages[0].content[0].detail", "messages[0].function_call", "reasoning_effort"]


def test_the_defaults_that_ask_for_nothing_are_accepted(served) -> None:
    harmless = {
        "store": False, "service_tier": "auto", "user": "me", "metadata": {"a": "b"},
        "tool_choice": "none", "tools": None, "reasoning_effort": None, "prompt_cache_key": "x", "n": 1,
    }  # fmt: skip
    assert served.post(PATH, messages=USER, max_tokens=1, **harmless).status_code == 200
