"""Every bad request gets one JSON shape that names the field and the remedy, and nothing gets a traceback."""

import functools
import gzip
import http.client
import json

import httpx
import pytest

from topkapi.engine.engine import Engine
from topkapi.service.api.native.schemas import ErrorBody


def refused(response: httpx.Response, status: int) -> dict:
    """The error of a refused request, after checking its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = ErrorBody.model_validate(response.json()).error
    assert error.message and "Traceback" not in response.text and "\n" not in error.message
    return error.model_dump()


LONG = "hello " * 300
USER = [{"role": "user", "content": "hi"}]

BAD_GENERATE = [
    ({}, None, "prompt and messages"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt[0]", "empty"),
    ({"prompt": 5}, "prompt", "not a number"),
    ({"prompt": True}, "prompt", "not a boolean"),
    ({"prompt": {"a": 1}}, "prompt", "not an object"),
    ({"prompt": [1, "a"]}, "prompt[1]", "whole number"),
    ({"prompt": [1.5]}, "prompt[0]", "whole number"),
    ({"prompt": ["a", None]}, "prompt[1]", "null"),
    ({"prompt": [-1]}, "prompt[0]", "0 to 511"),
    ({"prompt": ["a", [3, 512]]}, "prompt[1][1]", "0 to 511"),
    ({"prompt": LONG}, "prompt", "context holds 128"),
    ({"prompt": ["a", LONG]}, "prompt[1]", "context holds 128"),
    ({"prompt": "a", "messages": USER}, "messages", "exclude"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "assistant"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must be a text"),
    ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages[0].mood", "unknown field"),
    ({"messages": [{"role": "user", "content": LONG}]}, "messages", "context holds 128"),
    ({"messages": USER, "model": "base"}, "messages", "without a chat template"),
    ({"prompt": "a", "temprature": 1}, "temprature", "unknown field"),
    ({"prompt": "a", "max_new_tokens": 1}, "max_new_tokens", "unknown field"),
    ({"prompt": "a", "top_k": -1}, "top_k", "0 means off"),
    ({"prompt": "a", "top_k": "5"}, "top_k", "whole number"),
    ({"prompt": "a", "top_k": 1.5}, "top_k", "whole number"),
    ({"prompt": "a", "temperature": -0.5}, "temperature", "at least 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "number"),
    ({"prompt": "a", "temperature": True}, "temperature", "number"),
    ({"prompt": "a", "top_p": 1.01}, "top_p", "at most 1"),
    ({"prompt": "a", "n": 0}, "n", "at least 1"),
    ({"prompt": "a", "seed": -1}, "seed", "at least 0"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "at least 0"),
    ({"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens", "above max_tokens"),
    ({"prompt": "a", "stop": ""}, "stop", "empty"),
    ({"prompt": "a", "stop": [1]}, "stop", "texts"),
    ({"prompt": "a", "stop_token_ids": [512]}, "stop_token_ids", "0 to 511"),
    ({"prompt": "a", "logit_bias": {"one": 1}}, "logit_bias", "token ids"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "at most 100"),
    ({"prompt": "a", "ignore_end_token": 1}, "ignore_end_token", "true or false"),
    ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
    ({"prompt": "a", "priority": 101}, "priority", "at most 100"),
    ({"prompt": "a", "priority": -101}, "priority", "at least -100"),
    ({"prompt": "a", "priority": 0.5}, "priority", "whole number"),
    ({"prompt": "a", "model": 5}, "model", "must be a text"),
]

BAD_SCORE = [
    ({}, None, "send one of"),
    ({"text": ""}, "text", "empty"),
    ({"text": []}, "text", "empty"),
    ({"text": ["a", ""]}, "text[1]", "empty"),
    ({"text": [1, 2]}, "text[0]", "must be a text"),
    ({"text": 5}, "text", "must be a text"),
    ({"text": "a", "token_ids": [1]}, "token_ids", "exclude"),
    ({"token_ids": "a"}, "token_ids", "list of token ids"),
    ({"token_ids": []}, "token_ids", "empty"),
    ({"token_ids": [[1], [512]]}, "token_ids[1][0]", "0 to 511"),
    ({"text": "a", "prompt": "b"}, "prompt", "choices"),
    ({"choices": ["a"]}, "prompt", "choices need a prompt"),
    ({"prompt": "a", "choices": []}, "choices", "empty"),
    ({"prompt": "a", "choices": ["b", ""]}, "choices[1]", "empty"),
    ({"pairs": []}, "pairs", "empty"),
    ({"pairs": [{"prompt": "a"}]}, "pairs[0].completion", "missing"),
    ({"pairs": [{"prompt": "", "completion": "a"}]}, "pairs[0].prompt", "empty"),
    ({"text": "a", "window": 1}, "window", "at least 2 and at most"),
    ({"text": "a", "window": 129}, "window", "context length 128"),
    ({"text": "a", "window": 8, "stride": 8}, "stride", "below the window"),
    ({"text": "a", "stride": 0}, "stride", "at least 1"),
    ({"text": "a", "top": -1}, "top", "at least 0"),
    ({"text": "a", "windw": 8}, "windw", "unknown field"),
    ({"text": "a", "normalize": "byte"}, "normalize", "ranks choices"),
    ({"prompt": "a", "choices": ["b"], "normalize": "word"}, "normalize", "'byte', 'token' or 'none'"),
    ({"text": "a", "priority": 101}, "priority", "at most 100"),
    ({"text": "a", "stream": 1}, "stream", "true or false"),
]

BAD_BODIES = [
    (b"", "empty"),
    (b"{", "line 1, column 2"),
    (b"[]", "JSON object"),
    (b"null", "JSON object"),
    (b'{"prompt": "\xff"}', "byte 0xff at offset 12"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
    (b'{"prompt": "a", "temperature": 1e999}', "beyond float64"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "beyond float64"),
    (b'{"prompt": "a", "temperature": -1' + b"0" * 400 + b"}", "beyond float64"),
    (b'{"prompt": "a", "prompt": "b"}', "twice"),
    (b'{"prompt": "\\ud83e"}', "surrogate"),
    (b"[" * 100_000, "nested"),
]


@pytest.mark.parametrize(("body", "field", "words"), BAD_GENERATE, ids=lambda value: str(value)[:40])
def test_generate_names_the_field(served, body, field, words) -> None:
    error = refused(served.client.post("/generate", content=json.dumps(body), headers=JSON), 422)
    assert error["field"] == field and words in error["message"]


@pytest.mark.parametrize(("body", "field", "words"), BAD_SCORE, ids=lambda value: str(value)[:40])
def test_score_names_the_field(served, body, field, words) -> None:
    error = refused(served.post("/score", **body), 422)
    assert error["field"] == field and words in error["message"]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("path", ["/generate", "/score"])
def test_a_malformed_body_is_told_where(served, path, body, words) -> None:
    error = refused(served.client.post(path, content=body, headers=JSON), 400)
    assert error["type"] == "malformed_body" and words in error["message"]


JSON = {"Content-Type": "application/json"}


def test_a_bad_stream_request_is_refused_before_it_begins(served) -> None:
    refused(served.post("/generate", prompt="a", top_k=-1, stream=True), 422)


def test_a_misspelt_field_gets_the_right_one_as_a_hint(served) -> None:
    for wrong, right in (("temprature", "temperature"), ("max_new_tokens", "max_tokens"), ("promt", "prompt")):
        error = refused(served.post("/generate", **{wrong: 1, "prompt": "a"}), 422)
        assert right in error["hint"]


def test_an_unknown_model_lists_the_loaded_ones(served) -> None:
    for path, body in (("/generate", {"prompt": "a"}), ("/score", {"text": "a"}), ("/tokenize", {"text": "a"})):
        error = refused(served.post(path, model="gpt-5", **body), 404)
        assert error["type"] == "unknown_model" and "chat, base" in error["hint"]


def test_a_body_must_be_declared_as_json(served) -> None:
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        error = refused(served.client.post("/generate", content=b'{"prompt": "a"}', headers=headers), 415)
        assert "Content-Type: application/json" in error["hint"]
    declared = {"Content-Type": "application/json; charset=utf-8"}
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert served.client.post("/generate", content=body, headers=declared).status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/messages", "/completion", "/tokenize"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity", "zstd"])
def test_compressed_bodies_are_refused_by_name(served, path, encoding) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    answer = served.client.post(path, content=gzip.compress(b'{"prompt": "a"}'), headers=headers)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    assert encoding.lower() in answer.text and "Content-Encoding" in answer.text
    plain = {**headers, "Content-Encoding": "identity"}
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert served.client.post("/generate", content=body, headers=plain).status_code == 200


@pytest.mark.parametrize("studio", [False, True])
def test_unknown_routes_and_methods(serve, tiny_checkpoint, studio) -> None:
    with serve(tiny_checkpoint("routes"), studio=studio) as served:
        assert "/docs" in refused(served.client.get("/nothing"), 404)["hint"]
        refused(served.client.post("/nothing", json={}), 404)
        response = served.client.get("/generate")
        assert refused(response, 405)["hint"] == "use POST" and response.headers["allow"] == "POST"
        refused(served.client.delete("/models"), 405)


def test_a_body_above_the_limit_is_refused_declared_or_not(serve, tiny_checkpoint) -> None:
    body = json.dumps({"prompt": "a" * 5000}).encode()
    with serve(tiny_checkpoint("limited"), max_body_bytes=4096) as served:
        refused(served.client.post("/generate", content=body, headers=JSON), 413)
        error = refused(served.client.post("/generate", content=iter([body]), headers=JSON), 413)
        assert "TOPKAPI_MAX_BODY_BYTES" in error["hint"]
        assert served.post("/generate", prompt="a", max_tokens=1).status_code == 200


@pytest.mark.one_process("its engine runs one request at a time")
def test_a_full_queue_is_refused_at_once_with_retry_after(serve, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr("topkapi.service.models.Engine", functools.partial(Engine, max_running=1))
    with serve(tiny_checkpoint("full", context=2048), max_queue=1, stream_grace=0) as served:
        slow = {"prompt": "a", "ignore_end_token": True, "stream": True}
        with (
            served.client.stream("POST", "/generate", json=slow) as first,
            served.client.stream("POST", "/generate", json=slow | {"progress": True}) as second,
        ):
            # The second is in the queue, of which it tells.
            assert first.status_code == second.status_code == 200
            response = served.post("/generate", prompt="a", max_tokens=1)
            error = refused(response, 429)
            assert error["type"] == "overloaded" and int(response.headers["retry-after"]) >= 1
        served.wait_until_idle()
        assert served.post("/generate", prompt="a", max_tokens=1).status_code == 200


@pytest.mark.one_process("damages the weights")
def test_a_failed_step_fails_its_own_request_only(serve, tiny_checkpoint, monkeypatch) -> None:
    import torch

    monkeypatch.setattr("topkapi.model.native.levels", lambda: ())  # weights that are damaged while it serves

    with serve(tiny_checkpoint("broken")) as served:
        weight = served.models.get().checkpoint.model.embed_tokens.weight
        whole = weight.clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        error = refused(served.post("/generate", prompt="a"), 500)
        assert error["type"] == "engine_error" and error["hint"]
        refused(served.post("/score", text="a b c"), 500)
        with served.client.stream("POST", "/generate", json={"prompt": "a", "stream": True}) as response:
            assert response.read().decode().split("\n", 1)[1].startswith("event: error\ndata: {")
        with torch.no_grad():
            weight.copy_(whole)
        assert served.post("/generate", prompt="a", max_tokens=1).status_code == 200


def test_parameters_that_leave_no_token_are_the_requests_own_fault(served) -> None:
    """Nobody can tell before: after its first token, no word of the grammar is allowed."""
    tokenizer = served.models.get().checkpoint.tokenizer
    allowed = [token_id for token_id in range(512) if tokenizer.token_bytes(token_id) in (b"a", b"b")]
    error = refused(served.post("/generate", prompt="x", regex="ac", allowed_token_ids=allowed), 422)
    assert error["type"] == "invalid_request" and "no token is left" in error["message"] and error["hint"]
    assert served.post("/generate", prompt="x", max_tokens=1).status_code == 200


@pytest.mark.one_process("puts a defect into a route")
def test_a_defect_answers_in_the_same_shape(serve, tiny_checkpoint, monkeypatch) -> None:
    with serve(tiny_checkpoint("defect")) as served:
        monkeypatch.setattr("topkapi.service.api.native.routes.generate_response", lambda *_: 1 / 0)
        error = refused(served.post("/generate", prompt="a", max_tokens=1), 500)
        assert error["type"] == "internal_error" and "division" not in str(error)


def test_a_request_line_that_is_no_http_does_not_stop_the_server(served) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.putrequest("POST", "/generate")
    connection.putheader("Content-Length", "not a number")
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()
    assert served.client.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/generate", {"prompt": "a", "stream": "maybe"}, "stream: must be true or false"),
        ("/generate", {"prompt": "a", "negative_prompt": ["a", "b"]}, "negative_prompt must be one text"),
        ("/score", {"text": "a", "top": "x"}, "top: must be a whole number"),
        ("/score", {"text": "a", "top": -1}, "top: must be at least 0"),
        ("/score", {"text": "a", "normalize": "x"}, "normalize: must be 'byte', 'token' or 'none'"),
        pytest.param(
            "/models",
            {"path": ""},
            "path: must have at least 1 characters",
            marks=pytest.mark.one_process("replicas refuse to load, whatever is sent"),
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "content: must be a text, or a list"),
        ("/v1/chat/completions", {"messages": "a"}, "messages: must be a list"),
    ],
)
def test_what_may_be_sent_is_said_in_words(served, path, body, told) -> None:
    assert told in served.post(path, **body).json()["error"]["message"]
