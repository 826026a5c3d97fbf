"""More than can be served in time, over a real socket: who is refused, with what, and who is not kept waiting."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.tiny import run_by
from topkapi.model.errors import EngineStopped
from topkapi.service.api.http.middleware import COMMENT
from topkapi.service.keys import Key, digest_of, line_of, new_key
from topkapi.service.limits import MOST_PROMPTS
from topkapi.service.quotas import Limits

USER = [{"role": "user", "content": "hi"}]
LONG = {"max_tokens": 1900, "ignore_end_token": True}
SHORT = {"prompt": "b", "max_tokens": 2, "ignore_end_token": True}
KEYS = {name: new_key() for name in ("greedy", "modest", "urgent")}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


class Held:
    """A network that computes nothing until it is let go."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        run = engine.network.run

        def held(works: Any) -> Any:
            self.entered.set()
            assert self.go_on.wait(60)
            return run(works)

        run_by(monkeypatch, engine.network, held)


class Answers:
    """Requests that are under way at the same time, and what came of them, in the order in which it did."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.came: list[tuple[str, httpx.Response]] = []
        self.threads: list[threading.Thread] = []

    def ask(self, name: str, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        def call() -> None:
            self.came.append((name, httpx.post(self.url + path, json=body, headers=headers, timeout=60)))

        self.threads.append(threading.Thread(target=call))
        self.threads[-1].start()

    def all(self) -> list[tuple[str, httpx.Response]]:
        for thread in self.threads:
            thread.join(60)
        return self.came


def slow(engine: Any) -> None:
    """As if a token took ten seconds to read and as long to write."""
    for _ in range(500):
        engine._steps.speed.step(10.0, 0)
        engine._steps.speed.step(10.0, 1)
    engine._steps.speed._used[:] = [100.0, 100.0]


REFUSED = {
    "/generate": (429, {"prompt": "a"}, lambda body: body["error"]["type"] == "overloaded"),
    "/v1/completions": (429, {"prompt": "a"}, lambda body: body["error"]["type"] == "rate_limit_error"),
    "/v1/chat/completions": (429, {"messages": USER}, lambda body: body["error"]["type"] == "rate_limit_error"),
    "/v1/responses": (429, {"input": "a"}, lambda body: body["error"]["type"] == "rate_limit_error"),
    "/v1/messages": (
        529, {"model": "busy", "max_tokens": 5, "messages": USER},
        lambda body: body["error"]["type"] == "overloaded_error",
    ),
    "/completion": (429, {"prompt": "a"}, lambda body: body["error"]["code"] == 429),
    "/generate_stream": (429, {"inputs": "a"}, lambda body: body["error_type"] == "overloaded"),
    "/score": (429, {"text": "a b"}, lambda body: body["error"]["type"] == "overloaded"),
    "/generate of SGLang": (503, {"text": "a"}, lambda body: list(body["error"]) == ["message"]),
}  # fmt: skip
FIRST = {"prompt": "a", "n": 32, "max_tokens": 20, "ignore_end_token": True}
"""Takes all the room there is."""


def ask_all(answers: Answers, headers: dict[str, str] | None = None) -> int:
    """Ask in every dialect, whole and by events; how many requests that is."""
    for path, (_, body, _) in REFUSED.items():
        for stream in (False, True):
            if path == "/generate_stream" and not stream:
                continue
            sent = body if path == "/generate_stream" else body | {"stream": stream}
            answers.ask(f"{path} {stream}", path.split()[0], sent, headers)
    return len(answers.threads) - 1


def test_what_could_not_begin_in_time_is_refused_before_its_answer_begins(serve, tiny_checkpoint, monkeypatch) -> None:
    with serve(tiny_checkpoint("busy", context=2048), max_queue_seconds=60, stream_grace=0) as served:
        engine = served.models.get().engine
        held, answers = Held(engine, monkeypatch), Answers(served.url)
        # It takes all the room there is.
        answers.ask("first", "/generate", {"prompt": "a", "n": 32, "max_tokens": 20, "ignore_end_token": True})
        assert held.entered.wait(30)
        slow(engine)
        for path, (status, body, is_its_own) in REFUSED.items():
            for stream in (False, True):
                sent = body | ({"stream": True} if stream and path != "/generate_stream" else {})
                refused = served.client.post(path.split()[0], json=sent)
                assert refused.status_code == status and is_its_own(refused.json()), (path, refused.text)
                assert "--max-queue-seconds (60 s)" in refused.text
                assert 190 <= int(refused.headers["retry-after"]) <= 540, refused.headers
        # By its own deadline, though the server would let it wait.
        engine.max_queue_seconds = None
        hasty = served.client.post("/generate", json=SHORT, headers={"X-Request-Timeout": "30"})
        assert hasty.status_code == 429 and "more than it was given" in hasty.text
        native = served.client.post("/generate", json=SHORT | {"timeout_s": 30})
        assert native.status_code == 429
        answers.ask("patient", "/generate", SHORT)
        wait_for(lambda: engine.waiting == 1)
        held.go_on.set()
        assert {response.status_code for _, response in answers.all()} == {200}
        assert 'refused_total{reason="overloaded"}' in served.client.get("/metrics").text


def test_what_waited_too_long_after_all_is_refused_then(serve, tiny_checkpoint, monkeypatch) -> None:
    """A stream is, too, for it begins when it leaves the queue; unless it was to tell of the queue."""
    with serve(tiny_checkpoint("busy", context=2048), max_queue_seconds=0.2) as served:
        engine = served.models.get().engine
        held, answers = Held(engine, monkeypatch), Answers(served.url)
        answers.ask("first", "/generate", FIRST)
        assert held.entered.wait(30)
        answers.ask("told of the queue", "/generate", SHORT | {"stream": True, "progress": True})
        asked = ask_all(answers)
        wait_for(lambda: engine.waiting == asked)
        wait_for(lambda: all(each.impatient for each in engine._arriving))
        held.go_on.set()
        came = dict(answers.all())
        assert came.pop("first").status_code == 200
        begun = came.pop("told of the queue")
        assert begun.status_code == 200 and "queued" in begun.text and begun.text.count("event: error") == 1
        for name, answer in came.items():
            status, _, is_its_own = REFUSED[name.rpartition(" ")[0]]
            assert answer.status_code == status and is_its_own(answer.json()), (name, answer.text)
            assert "longer than --max-queue-seconds" in answer.text
            # Four steps of as long as the first was held are before whoever comes again, or less.
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert served.answer("/generate", **SHORT)


def test_what_waited_in_vain_has_used_nothing_of_its_keys_tokens(serve, tiny_checkpoint, tmp_path, monkeypatch) -> None:
    limits = Limits(tokens_per_minute=1000)
    lines = [line_of(Key(name, "use", digest_of(KEYS[name]), limits)) for name in ("greedy", "modest")]
    (tmp_path / "keys").write_text("\n".join(lines))
    settings = {"keys": tmp_path / "keys", "max_queue_seconds": 0.2}
    with serve(tiny_checkpoint("charged", context=2048), **settings) as served:
        engine = served.models.get().engine
        held, answers = Held(engine, monkeypatch), Answers(served.url)
        answers.ask("first", "/generate", FIRST, bearer("greedy"))
        assert held.entered.wait(30)
        answers.ask("stream", "/generate", {"prompt": "the list " * 40, "stream": True}, bearer("modest"))
        answers.ask("whole", "/generate", {"prompt": "the list " * 40}, bearer("modest"))
        wait_for(lambda: len(engine._arriving) == 2 and all(each.impatient for each in engine._arriving))
        held.go_on.set()
        came = dict(answers.all())
        assert came["stream"].status_code == came["whole"].status_code == 429
        left = served.client.get("/models", headers=bearer("modest")).headers["x-ratelimit-remaining-tokens"]
        assert left == "1000"


def test_a_stream_that_waits_long_says_so_before_a_proxy_cuts_it(serve, tiny_checkpoint, monkeypatch) -> None:
    settings = {"max_queue_seconds": 0.5, "stream_keep_alive": 0.05}
    with serve(tiny_checkpoint("patient", context=2048), **settings) as served:
        engine = served.models.get().engine
        held, answers = Held(engine, monkeypatch), Answers(served.url)
        answers.ask("first", "/generate", FIRST)
        assert held.entered.wait(30)
        with served.client.stream("POST", "/generate", json=SHORT | {"stream": True}) as stream:
            assert stream.status_code == 200
            parts = stream.iter_bytes()
            assert next(parts) == COMMENT
            wait_for(lambda: engine._arriving[0].impatient)
            held.go_on.set()
            rest = b"".join(parts)
        assert b"event: error" in rest and b'"overloaded"' in rest
        assert dict(answers.all())["first"].status_code == 200


def test_a_stream_begins_when_the_engine_is_at_work_on_it(serve, tiny_checkpoint, monkeypatch) -> None:
    with serve(tiny_checkpoint("busy")) as served:
        held = Held(served.models.get().engine, monkeypatch)
        for path, (_, body, _) in REFUSED.items():
            sent = body if path == "/generate_stream" else body | {"stream": True}
            held.go_on.clear()
            with served.client.stream("POST", path.split()[0], json=sent) as stream:
                assert stream.headers["content-type"].startswith("text/event-stream"), (path, stream.read())
                # Nothing has been computed yet.
                held.go_on.set()
                assert stream.read()


@pytest.mark.parametrize("how", ["late", "unloaded", "hanging"])
def test_what_ends_before_it_began_has_a_status_by_events_too(serve, tiny_checkpoint, monkeypatch, how) -> None:
    with serve(tiny_checkpoint("busy", context=2048)) as served:
        engine = served.models.get().engine
        held, answers = Held(engine, monkeypatch), Answers(served.url)
        answers.ask("first", "/generate", FIRST)
        assert held.entered.wait(30)
        asked = ask_all(answers, {"X-Request-Timeout": "0.5"} if how == "late" else None)
        wait_for(lambda: engine.waiting == asked)
        if how == "late":
            wait_for(lambda: all(each.late for each in engine._arriving))
        elif how == "unloaded":
            engine.stop()
        else:
            engine.abandon(EngineStopped("it does not come back"))
        held.go_on.set()
        came = dict(answers.all())
        for path in REFUSED:
            stream, whole = came[f"{path} True"], came.get(f"{path} False")
            if whole is not None:
                assert stream.status_code == whole.status_code, (path, stream.text, whole.text)
            if stream.status_code == 200:
                # Our own and llama.cpp's clients are told so by an answer that is empty.
                assert path in ("/generate", "/completion") and how != "hanging", (path, stream.text)
                assert "error" not in stream.text
            else:
                assert stream.status_code in (408, 424, 503) and stream.headers["content-type"] == "application/json"
            if how == "hanging":
                assert int(stream.headers["retry-after"]) >= 1


def test_a_long_list_that_has_begun_is_not_given_up(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("list"), max_queue_seconds=0.05) as served:
        body = {"prompt": ["a"] * min(300, MOST_PROMPTS), "max_tokens": 4, "ignore_end_token": True}
        assert len(served.answer("/generate", **body)["outputs"]) == 300


@pytest.fixture
def shared(serve, tiny_checkpoint, tmp_path) -> Iterator[Any]:
    lines = [line_of(Key(name, "use", digest_of(key), priority=5 * (name == "urgent"))) for name, key in KEYS.items()]
    (tmp_path / "keys").write_text("\n".join(lines))
    with serve(tiny_checkpoint("shared", context=2048), keys=tmp_path / "keys", stream_grace=0, max_queue=30) as served:
        yield served


def test_a_key_with_many_requests_does_not_keep_another_one_waiting(shared, monkeypatch) -> None:
    engine = shared.models.get().engine
    held, answers = Held(engine, monkeypatch), Answers(shared.url)
    many = {"prompt": "a", "n": 32, "max_tokens": 40, "ignore_end_token": True, "priority": 100}
    for number in range(8):
        answers.ask(f"greedy{number}", "/generate", many, bearer("greedy"))
        wait_for(lambda number=number: engine.running + engine.waiting == number + 1)
    answers.ask("modest", "/v1/completions", {"prompt": "b", "max_tokens": 30}, bearer("modest"))
    wait_for(lambda: engine.waiting == 8)
    answers.ask("urgent", "/v1/completions", {"prompt": "c", "max_tokens": 30}, bearer("urgent"))
    wait_for(lambda: engine.waiting == 9)
    held.go_on.set()
    order = [name for name, response in answers.all() if response.status_code == 200]
    assert len(order) == 10
    assert {"urgent", "modest"} <= set(order[:4]), order


def test_a_key_does_not_fill_the_queue(shared, monkeypatch) -> None:
    engine = shared.models.get().engine
    held, answers = Held(engine, monkeypatch), Answers(shared.url)
    answers.ask("first", "/generate", {"prompt": "a", "n": 32, "max_tokens": 2}, bearer("greedy"))
    assert held.entered.wait(30)
    for number in range(20):
        answers.ask(str(number), "/generate", SHORT, bearer("greedy"))
    wait_for(lambda: engine.waiting == 20)
    refused = shared.client.post("/generate", json=SHORT, headers=bearer("greedy"))
    assert refused.status_code == 429 and "the rest of the queue is for others" in refused.text
    answers.ask("modest", "/generate", SHORT, bearer("modest"))
    wait_for(lambda: engine.waiting == 21)
    held.go_on.set()
    assert {response.status_code for _, response in answers.all()} == {200}


def test_a_client_that_reads_nothing_is_cut_off_and_a_slow_one_is_not(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("unread", context=2048), write_timeout=0.5, stream_grace=0) as served:
        address = httpx.URL(served.url)
        text = '{"prompt": "a", "max_tokens": 1900, "ignore_end_token": true, "logprobs": 20, "n": 16, "stream": true}'
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(text)}"
        with socket.socket() as bare:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            bare.connect((address.host, address.port))
            bare.sendall(f"{head}\r\n\r\n{text}".encode())
            wait_for(lambda: served.models.get().engine.running)
            # Cut off, its work ends long before the answer is whole.
            wait_for(lambda: not served.models.get().engine.running)
            assert served.models.get().engine.counters.generated_tokens < 1900 * 16
