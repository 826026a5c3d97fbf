"""What the server says of itself: a line for each request, numbers, and never what somebody asked or by which key."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest

from topkapi.model.errors import InvalidRequest
from topkapi.service import logs
from topkapi.service.keys import new_key

SECRET = "the words of somebody's letter"


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """`written(format, texts=…)` sets the log up and returns a function: all that was written since, once it has what
    is looked for, as an answer may be there before its line."""
    before, level = logging.getLogger().handlers[:], logging.getLogger().level

    def set_up(log_format: str, *, texts: bool = False) -> Callable[[str], str]:
        logs.set_up(log_format, access=True, texts=texts)
        capsys.readouterr()
        said = ""

        def since(wanted: str) -> str:
            nonlocal said
            end = time.monotonic() + 20
            while wanted not in said:
                assert time.monotonic() < end, said
                said += capsys.readouterr().err
                time.sleep(0.01)
            return said

        return since

    yield set_up
    logging.getLogger().handlers[:] = before
    logging.getLogger().setLevel(level)
    for name in ("topkapi", "topkapi.access"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_each_request_is_a_line_of_json(serve, tiny_checkpoint, written, monkeypatch) -> None:
    key = new_key()
    monkeypatch.setenv("TOPKAPI_API_KEY", key)
    with serve(tiny_checkpoint("logged")) as served:
        told = written("json")
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine-1"}
        body = {"prompt": SECRET, "max_tokens": 3, "ignore_end_token": True}
        answer = served.client.post("/generate", json=body, headers=headers, params={"api_key": key})
        assert answer.headers["x-request-id"] == "mine-1"
        refused = served.client.post("/generate", json=body | {SECRET: 1}, headers=headers)
        unknown = served.client.post("/v1/completions", json=body, headers={"x-api-key": "tk-somebody-elses-key"})
        served.client.get("/ready")
    said = told("invalid_api_key")
    first, second, third = (json.loads(line) for line in said.splitlines())
    tokens = answer.json()["usage"]
    expected = {
        "level": "info", "logger": "topkapi.access", "request_id": "mine-1", "key": "environment", "method": "POST",
        "path": "/generate", "status": 200, "client": "127.0.0.1", "model": "logged",
        "prompt_tokens": tokens["prompt_tokens"], "generated_tokens": 3,
    }  # fmt: skip
    assert {name: first[name] for name in expected} == expected
    assert 0 < first["first_token_s"] <= first["seconds"] and first["queue_s"] >= 0
    assert (refused.status_code, second["status"], second["error"]) == (422, 422, "invalid_request")
    assert (unknown.status_code, third["error"], "key" in third) == (401, "invalid_api_key", False)
    assert third["request_id"] == unknown.headers["x-request-id"] and third["request_id"].startswith("req_")
    assert not any(each in said for each in (SECRET, key, "tk-somebody"))


def test_an_unexpected_error_is_told_without_its_words(serve, tiny_checkpoint, written, monkeypatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        try:
            raise ValueError(f"can't read {SECRET!r}")
        except ValueError as error:
            raise KeyError(SECRET) from error

    with serve(tiny_checkpoint("broken")) as served:
        monkeypatch.setattr("topkapi.service.api.native.routes.generation_of", broken)
        for log_format in ("text", "json"):
            since = written(log_format)
            with httpx.Client(base_url=served.url) as client:
                answer = client.post("/generate", json={"prompt": SECRET})
            told = since("Traceback")
            assert answer.status_code == 500 and answer.headers["x-request-id"] in told
            assert "KeyError" in told and "ValueError" in told and "in broken" in told and logs.LEFT_OUT in told
            assert SECRET not in told
        since = written("text", texts=True)
        served.client.post("/generate", json={"prompt": "a"})
        assert SECRET in since("Traceback")


def test_our_own_errors_keep_their_words(written) -> None:
    since = written("text")
    try:
        raise InvalidRequest("top_k must be at least 0")
    except InvalidRequest:
        logging.getLogger("topkapi.x").exception("it failed")
    told = since("Traceback")
    assert "ERROR: it failed\nTraceback" in told and "top_k must be at least 0" in told


def test_a_line_can_not_be_forged(serve, tiny_checkpoint, written) -> None:
    with serve(tiny_checkpoint("forged")) as served:
        since = written("text")
        served.client.get("/a%0AINFO: POST /models 200", headers={"X-Request-Id": "evil id with spaces"})
        served.client.get("/b", headers={"X-Request-Id": "x" * 500})
    first, second = since("GET /b").splitlines()
    assert r"/a\nINFO: POST /models 200 " in first and "request_id=req_" in first and "request_id=req_" in second


def test_anthropics_client_finds_the_requests_name(served) -> None:
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
    answer = client.messages.create(model="chat", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
    assert answer._request_id is not None and answer._request_id.startswith("req_")
    counted = client.messages.with_raw_response.count_tokens(model="chat", messages=[{"role": "user", "content": "hi"}])
    assert counted.headers["request-id"] == counted.headers["x-request-id"]
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="none", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
    assert unknown.value.request_id is not None and unknown.value.request_id.startswith("req_")
    assert "request-id" not in served.post("/generate", prompt="a", max_tokens=1).headers


def test_refusals_are_counted_by_their_reason(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("counted")) as served:
        served.post("/generate", prompt="a", top_k="many")
        served.post("/v1/messages", model="no such", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
        served.client.post("/generate", content=b"{", headers={"Content-Type": "application/json"})
        served.client.get("/health", headers={"Host": "evil.example"})
        told = served.client.get("/metrics").text
    for reason in ("invalid_request", "unknown_model", "malformed_body", "unknown_host"):
        assert f'topkapi_requests_refused_total{{reason="{reason}"}} 1.0' in told, reason


def test_how_long_each_part_took_is_measured(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("measured")) as served:
        served.answer("/generate", prompt="a b c", max_tokens=5, ignore_end_token=True)
        told = served.client.get("/metrics").text
    for stem in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                 "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
                 "request_generation_tokens"):  # fmt: skip
        assert f'topkapi_{stem}_count{{model_name="measured"}} 1.0' in told, stem
    assert 'topkapi_inter_token_latency_seconds_count{model_name="measured"} 4.0' in told
    assert 'topkapi_request_generation_tokens_sum{model_name="measured"} 5.0' in told
    assert 'topkapi_kv_cache_usage_perc{model_name="measured"} 0.0' in told


@pytest.mark.parametrize(
    ("header", "value"),
    [("X-Request-Timeout", "0"), ("X-Request-Timeout", "soon"), ("X-Request-Timeout", "nan"),
     ("X-Envoy-Expected-Rq-Timeout-Ms", "-1"), ("X-Request-Timeout", "1e9"),
     ("X-Request-Timeout", "1_0"), ("X-Request-Timeout", "inf"), ("X-Request-Timeout", "+1")],
)  # fmt: skip
def test_a_deadline_that_is_none_is_refused_by_its_name(served, header, value) -> None:
    for path in ("/generate", "/v1/messages", "/v1/completions"):
        answer = served.client.post(path, json={}, headers={header: value})
        assert answer.status_code == 400 and header in answer.text, path


LONG = {"prompt": "a", "max_tokens": 2000, "ignore_end_token": True, "model": "base"}


def test_a_clients_deadline_ends_its_work(served) -> None:
    soon = {"X-Request-Timeout": "0.2"}
    native = served.client.post("/generate", json=LONG, headers=soon).json()["outputs"][0]
    assert native["finish_reason"] == "deadline" and 0 < len(native["token_ids"]) < 2000
    shortest = {"X-Request-Timeout": "60", "X-Envoy-Expected-Rq-Timeout-Ms": "200"}
    completion = served.client.post("/v1/completions", json=LONG, headers=shortest).json()
    assert completion["choices"][0]["finish_reason"] == "length"
    assert completion["usage"]["completion_tokens"] < 2000
    scored = served.client.post("/score", json={"text": "word " * 20_000, "model": "base"}, headers=soon)
    assert scored.status_code == 408 and "X-Request-Timeout" in scored.text
    message = {"model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    none = served.client.post("/v1/embeddings", json={"input": ["word " * 400] * 200, "model": "base"}, headers=soon)
    assert none.status_code == 408, none.text
    assert served.client.post(
        "/v1/messages", json=message | {"model": "chat"}, headers={"X-Request-Timeout": "60"}
    ).is_success
    served.wait_until_idle()
