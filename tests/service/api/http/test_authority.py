"""Who may do what, over a real socket: keys in every dialect's header, roles, limits, and what is told of them."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from topkapi.service import keys
from topkapi.service.keys import Key, KeyRing, digest_of, line_of, new_key, read_line
from topkapi.service.quotas import Bucket, Limits

SHORT = {"prompt": "a", "max_tokens": 1}
KEYS = {name: new_key() for name in ("alice", "root", "few", "narrow", "single")}
LINES = [
    line_of(Key("alice", "use", digest_of(KEYS["alice"]))),
    line_of(Key("root", "admin", digest_of(KEYS["root"]))),
    line_of(Key("few", "use", digest_of(KEYS["few"]), Limits(requests_per_minute=2, tokens_per_minute=10_000))),
    line_of(Key("narrow", "use", digest_of(KEYS["narrow"]), Limits(tokens_per_minute=60))),
    line_of(Key("single", "use", digest_of(KEYS["single"]), Limits(concurrency=1))),
]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS.get(name, name)}"}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# who\n" + "\n".join(LINES) + "\n")
    return path


@pytest.fixture(scope="module")
def locked(serve, tiny_checkpoint, file) -> Iterator[Any]:
    with serve(tiny_checkpoint("locked", context=2048), keys=file, studio=True, stream_grace=0) as served:
        yield served


def ask(served: Any, path: str, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    if body is None:
        return served.client.get(path, headers=headers)
    return served.client.post(path, json=body, headers=headers)


REFUSALS: dict[str, Callable[[dict[str, Any], int], bool]] = {
    "/generate": lambda body, status: body["error"]["type"] == "invalid_api_key",
    "/score": lambda body, status: "hint" in body["error"],
    "/v1/chat/completions": lambda body, status: (
        (body["error"]["type"], body["error"]["code"]) == ("authentication_error", "invalid_api_key")
    ),
    "/v1/no/such/path": lambda body, status: "param" in body["error"],
    "/v1/messages": lambda body, status: (body["type"], body["error"]["type"]) == ("error", "authentication_error"),
    "/generate_stream": lambda body, status: body["error_type"] == "authentication",
    "/completion": lambda body, status: (body["error"]["code"], body["error"]["type"]) == (401, "authentication_error"),
    "/": lambda body, status: True,
    "/gradio_api/queue/join": lambda body, status: True,
    "/no/such/path": lambda body, status: body["error"]["type"] == "invalid_api_key",
}


@pytest.mark.parametrize("path", REFUSALS)
def test_without_a_key_each_dialect_is_told_so_in_its_own_shape(locked, path) -> None:
    for headers in ({}, bearer("tk-wrong"), {"x-api-key": KEYS["alice"] + "x"}, {"Authorization": "Basic YTpi"}):
        answer = ask(locked, path, SHORT, **headers)
        assert answer.status_code == 401 and REFUSALS[path](answer.json(), 401), (path, answer.text)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert not any(secret in answer.text for secret in KEYS.values())


def test_probes_and_pages_need_no_key_and_everything_else_does(locked) -> None:
    for path in ("/health", "/ready", "/v1/health", "/", "/docs", "/openapi.json"):
        assert ask(locked, path).status_code == 200, path
    for path in ("/models", "/models/locked", "/v1/models", "/props", "/slots", "/info", "/streams/x", "/metrics"):
        assert ask(locked, path).status_code == 401, path
        assert locked.client.head(path).status_code == 401, path
    for path in ("/models", "/v1/models", "/props"):
        assert ask(locked, path, **bearer("alice")).status_code == 200, path
    # Every route there is: new ones are not forgotten.
    for path, operations in ask(locked, "/openapi.json").json()["paths"].items():
        for method in operations:
            answer = locked.client.request(method, path.replace("{", "").replace("}", ""), json={})
            assert path in ("/health", "/ready", "/v1/health") or answer.status_code == 401, (method, path)


def test_the_documentation_has_a_place_for_a_key(locked, served) -> None:
    document = ask(locked, "/openapi.json").json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert "security" not in ask(served, "/openapi.json").json()


@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "api-key"])
def test_a_key_comes_by_any_clients_header(locked, header) -> None:
    value = KEYS["alice"] if header != "Authorization" else f"bearer  {KEYS['alice']}"
    for path, body in (
        ("/generate", SHORT),
        ("/v1/completions", SHORT),
        ("/completion", {"prompt": "a", "n_predict": 1}),
    ):
        assert ask(locked, path, body, **{header: value}).status_code == 200, path


def test_of_two_keys_neither_counts(locked) -> None:
    both = [("Authorization", f"Bearer {KEYS['alice']}"), ("x-api-key", "tk-another-one-that-is-not-known")]
    for headers in (both, both[::-1], [both[0], ("Authorization", f"Bearer {KEYS['root']}")]):
        answer = locked.client.post("/generate", json=SHORT, headers=headers)
        assert answer.status_code == 401 and "two different keys" in answer.text
    same = [both[0], ("x-api-key", KEYS["alice"])]
    assert locked.client.post("/generate", json=SHORT, headers=same).status_code == 200


def test_what_changes_the_server_takes_an_admins_key(locked) -> None:
    changes = [("POST", "/models"), ("PATCH", "/models/locked"), ("DELETE", "/models/locked"), ("POST", "/models/"),
               ("POST", "/adapters"), ("DELETE", "/adapters/locked"), ("GET", "/metrics"),
               ("GET", "/metrics/")]  # fmt: skip
    for method, path in changes:
        answer = locked.client.request(method, path, json={"path": "x"}, headers=bearer("alice"))
        assert answer.status_code == 403 and "role admin" in answer.text, (method, path)
    assert 'topkapi_requests_refused_total{reason="forbidden"}' in ask(locked, "/metrics", **bearer("root")).text


@pytest.mark.one_process("replicas keep their checkpoints, and refuse changes whatever the settings say")
def test_what_a_key_allows_settings_may_refuse(locked) -> None:
    answer = ask(locked, "/models", {"path": "x"}, **bearer("root"))
    assert answer.status_code == 403 and "lets no request load" in answer.text


def test_their_own_clients_know_what_they_are_told(locked) -> None:
    ours = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS["alice"], max_retries=0)
    question: Any = [{"role": "user", "content": "hi"}]
    assert ours.chat.completions.create(model="locked", messages=question, max_tokens=1).choices
    with pytest.raises(openai.AuthenticationError, match="none of the server's keys"):
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="none", max_retries=0).models.list()
    theirs = anthropic.Anthropic(base_url=locked.url, api_key=KEYS["alice"], max_retries=0)
    assert theirs.messages.create(model="locked", messages=question, max_tokens=1).content
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=locked.url, api_key="none", max_retries=0).messages.create(
            model="locked", messages=question, max_tokens=1
        )


def test_requests_a_minute(locked) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS["few"], max_retries=0)
    first = client.completions.with_raw_response.create(model="locked", prompt="a", max_tokens=1).headers
    assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert first["x-ratelimit-limit-tokens"] == "10000" and int(first["x-ratelimit-remaining-tokens"]) < 10_000
    assert first["x-ratelimit-reset-requests"].endswith("s")
    assert ask(locked, "/generate", SHORT, **bearer("few")).status_code == 200
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="locked", prompt="a", max_tokens=1)
    assert refused.value.code == "rate_limit_exceeded" and "2 requests a minute" in refused.value.message
    assert 20 <= int(refused.value.response.headers["retry-after"]) <= 30
    again = ask(locked, "/v1/messages", {}, **{"x-api-key": KEYS["few"]})
    assert (again.status_code, again.json()["error"]["type"]) == (429, "rate_limit_error")
    assert again.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert again.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert ask(locked, "/generate_stream", {"inputs": "a"}, **bearer("few")).json()["error_type"] == "overloaded"
    # Reading costs nothing, and other keys are not concerned.
    assert ask(locked, "/models", **bearer("few")).status_code == 200
    assert ask(locked, "/generate", SHORT, **bearer("alice")).status_code == 200


def test_tokens_a_minute_read_and_written(locked) -> None:
    long = {"prompt": "the list of the names " * 30, "max_tokens": 1}
    assert ask(
        locked, "/generate", {"prompt": "a", "max_tokens": 40, "ignore_end_token": True}, **bearer("narrow")
    ).is_success
    refused = ask(locked, "/generate", long, **bearer("narrow"))
    assert refused.status_code == 429 and "60 tokens a minute" in refused.json()["error"]["message"]
    # About forty seconds until forty are there again; what a prompt beyond the limit needs is a full bucket.
    assert 25 <= int(refused.headers["retry-after"]) <= 42
    left = int(refused.headers["x-ratelimit-remaining-tokens"])
    assert 15 <= left <= 40
    embedded = ask(locked, "/v1/embeddings", {"input": "the list of the names " * 30}, **bearer("narrow"))
    assert embedded.status_code == 429 and embedded.json()["error"]["code"] == "rate_limit_exceeded"


def test_requests_at_once(locked) -> None:
    slow = {"prompt": "a", "max_tokens": 1500, "ignore_end_token": True, "stream": True}
    with locked.client.stream("POST", "/generate", json=slow, headers=bearer("single")) as stream:
        lines = stream.iter_lines()
        next(lines)
        refused = ask(locked, "/generate", SHORT, **bearer("single"))
        assert refused.status_code == 429 and "1 request under way at once" in refused.text
        assert ask(locked, "/generate", SHORT, **bearer("alice")).status_code == 200
    locked.wait_until_idle()
    assert ask(locked, "/generate", SHORT, **bearer("single")).status_code == 200


@pytest.mark.one_process("has the file of keys looked at every time")
def test_a_line_taken_out_or_added_counts_at_once(serve, tiny_checkpoint, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(keys, "LOOK_SECONDS", 0.0)
    path = tmp_path / "keys"
    path.write_text(f"{LINES[0]}\n")
    with serve(tiny_checkpoint("changing"), keys=path) as served:
        assert ask(served, "/models", **bearer("alice")).status_code == 200
        path.write_text("\n".join(LINES[1:]))
        assert ask(served, "/models", **bearer("alice")).status_code == 401
        assert ask(served, "/models", **bearer("root")).status_code == 200
        with caplog.at_level(logging.ERROR):
            path.write_text("what is this\n")
            assert ask(served, "/models", **bearer("root")).status_code == 200, "the keys stay as they were"
        assert "line 1" in caplog.text
        path.unlink()
        assert ask(served, "/models", **bearer("root")).status_code == 200


def test_the_environments_key_has_every_right(serve, tiny_checkpoint, monkeypatch) -> None:
    secret = new_key()
    for given in (secret, digest_of(secret)):
        monkeypatch.setenv("TOPKAPI_API_KEY", given)
        with serve(tiny_checkpoint("environment")) as served:
            assert ask(served, "/metrics").status_code == 401
            assert ask(served, "/metrics", **bearer(secret)).status_code == 200
            # The hash is no key.
            assert ask(served, "/metrics", **bearer(digest_of(secret))).status_code == 401


def test_keys_are_compared_in_constant_time_and_kept_nowhere(monkeypatch) -> None:
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    ring = KeyRing(secret=KEYS["alice"])
    ring._keys += [Key(f"k{number}", "use", digest_of(new_key())) for number in range(9)]
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for given in (KEYS["alice"], "tk-wrong", ""):
        compared.clear()
        ring.find(given)
        # Each key, whichever was right, and hashes of one length.
        assert len(compared) == 10 and {len(each) for pair in compared for each in pair} == {len("sha256:") + 64}
    assert KEYS["alice"] not in repr(vars(ring)) and digest_of(KEYS["alice"]) not in repr(ring._keys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a use", "NAME ROLE"),
        ("a user sha256:" + "0" * 64, "use or admin"),
        ("a use " + "0" * 64, "sha256:"),
        ("a/b use sha256:" + "0" * 64, "letters, digits"),
        ("a use sha256:" + "0" * 64 + " request_per_minute=1", "did you mean requests_per_minute"),
        ("a use sha256:" + "0" * 64 + " concurrency=0", "from 1"),
        ("a use sha256:" + "0" * 64 + " concurrency=1 concurrency=2", "twice"),
        ("a use sha256:" + "0" * 64 + " priority=1e3", "whole number"),
    ],
)
def test_lines_that_are_none_say_why(line, said) -> None:
    with pytest.raises(ValueError, match=said):
        read_line(line)


def test_a_line_is_read_as_it_was_written() -> None:
    key = Key("bob", "admin", digest_of("x" * 20), Limits(60, 1000, 4), -5)
    assert read_line(line_of(key)) == key


def test_a_bucket_fills_steadily_and_may_owe(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bucket = Bucket(60)
    bucket.take(100)
    assert (bucket.left, bucket.wait(1)) == (-40, 41)
    now[0] += 41
    assert (bucket.left, bucket.wait(1), bucket.wait(1000)) == (1, 0, 59)
    now[0] += 1000
    assert bucket.left == 60


def test_tokens_are_counted_for_each_key(locked) -> None:
    before = counted(locked)
    answer = ask(locked, "/generate", {"prompt": "a b", "max_tokens": 7, "ignore_end_token": True}, **bearer("alice"))
    usage = answer.json()["usage"]
    after = counted(locked)
    for kind, name in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        label = f'topkapi_key_tokens_total{{key="alice",kind="{kind}"}}'
        assert after[label] - before[label] == usage[name]


def counted(served: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in ask(served, "/metrics", **bearer("root")).text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[re.sub(r',replica="\w+"', "", name)] += float(value)
    return found
