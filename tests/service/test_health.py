"""What a server says of itself while its engine computes nothing, what its clients are told, and how it ends."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import httpx
import pytest

from tests.tiny import run_by
from topkapi.service.embedding import EMBEDDER

ENDLESS = {"max_tokens": 1500, "ignore_end_token": True}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def watched(serve, tiny_checkpoint) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # The tests' own process is not to end.
        patch.setattr("topkapi.engine.watch.RETURN_SECONDS", 1e9)
        with serve(tiny_checkpoint("watched", context=2048), step_timeout=0.5, stream_grace=0) as served:
            yield served


class Calls(threading.Thread):
    """Requests of several dialects at once, and what came of each."""

    REQUESTS: ClassVar[dict[str, Any]] = {
        "/generate": {"prompt": "a", **ENDLESS},
        "/v1/completions": {"prompt": "a", "max_tokens": 1500},
        "/v1/messages": {"model": "watched", "max_tokens": 1500, "messages": [{"role": "user", "content": "hi"}]},
        "/completion": {"prompt": "a", "n_predict": 1500},
        "/score": {"text": "a b c"},
    }

    def __init__(self, url: str) -> None:
        super().__init__()
        self.answers: dict[str, httpx.Response] = {}
        self.url = url
        self.threads = [threading.Thread(target=self.call, args=call) for call in self.REQUESTS.items()]

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(30)

    def call(self, path: str, body: dict[str, Any]) -> None:
        self.answers[path] = httpx.post(self.url + path, json=body, timeout=30)


def test_a_hanging_network_is_told_to_everybody(watched, monkeypatch) -> None:
    engine = watched.models.get().engine
    entered, go_on = threading.Event(), threading.Event()
    run = engine.network.run

    def hang(works: Any) -> Any:
        entered.set()
        assert go_on.wait(60)
        return run(works)

    run_by(monkeypatch, engine.network, hang)
    streamed: list[str] = []

    def stream() -> None:
        with httpx.stream(
            "POST", f"{watched.url}/generate", json={"prompt": "a", "stream": True}, timeout=30
        ) as answer:
            streamed.extend(line for line in answer.iter_lines() if line)

    streaming, calls = threading.Thread(target=stream), Calls(watched.url)
    streaming.start()
    # What waits behind it has not begun, and is told by a status.
    assert entered.wait(20)
    calls.start()
    wait_for(lambda: watched.client.get("/ready").status_code == 503)
    ready = watched.client.get("/ready").json()
    assert ready["status"] == "failing" and "more than 0.5 s" in ready["reason"] and "watched" in ready["reason"]
    assert watched.client.get("/health").status_code == 200
    assert watched.client.get("/v1/health").status_code == 503
    assert 'topkapi_engine_healthy{model_name="watched"} 0.0' in watched.client.get("/metrics").text
    streaming.join(20)
    calls.join(30)
    assert streamed[-2] == "event: error" and "more than 0.5 s" in streamed[-1]
    assert {path: answer.status_code for path, answer in calls.answers.items()} == dict.fromkeys(calls.REQUESTS, 503)
    assert all("more than 0.5 s" in answer.text for answer in calls.answers.values())
    refused = watched.post("/generate", prompt="a")
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "engine_stopped"
    assert int(refused.headers["retry-after"]) >= 1
    go_on.set()
    wait_for(lambda: watched.client.get("/ready").status_code == 200)
    assert watched.post("/generate", prompt="a", max_tokens=2).status_code == 200
    metrics = watched.client.get("/metrics").text
    assert 'topkapi_engine_healthy{model_name="watched"} 1.0' in metrics
    assert 'topkapi_engine_restarts{model_name="watched"} 1.0' in metrics


def test_a_thread_that_embeds_and_hangs_is_told_too(watched, monkeypatch) -> None:
    go_on = threading.Event()

    def hang(*_: object) -> list[float]:
        EMBEDDER.heartbeat.beat()
        assert go_on.wait(60)
        return [0.0]

    monkeypatch.setattr("topkapi.service.embedding.embed", hang)
    answers = [watched.post("/v1/embeddings", input=["a", "b"]), watched.post("/v1/embeddings", input="a")]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert watched.client.get("/ready").status_code == 503
    go_on.set()
    wait_for(lambda: watched.client.get("/ready").status_code == 200)
    monkeypatch.undo()
    assert watched.post("/v1/embeddings", input="a").status_code == 200


def test_an_exit_in_the_thread_that_embeds_ends_its_request_alone(watched, monkeypatch) -> None:
    def leave(*_: object) -> None:
        raise SystemExit(1)

    monkeypatch.setattr("topkapi.service.embedding.embed", leave)
    answer = watched.post("/v1/embeddings", input="a")
    assert answer.status_code == 500 and "SystemExit" in answer.json()["error"]["message"]
    assert watched.client.get("/ready").status_code == 200


def test_an_engine_that_breaks_down_answers_and_begins_anew(watched, monkeypatch) -> None:
    engine = watched.models.get().engine
    wait_for(lambda: engine.healthy)
    plan = engine._steps.scheduler.plan

    def broken() -> None:
        monkeypatch.setattr(engine._steps.scheduler, "plan", plan)
        raise SystemExit("plan")

    monkeypatch.setattr(engine._steps.scheduler, "plan", broken)
    answer = watched.post("/v1/completions", prompt="a")
    assert answer.status_code == 503 and "broke down" in answer.json()["error"]["message"]
    wait_for(lambda: watched.client.get("/ready").status_code == 200)
    assert watched.post("/v1/completions", prompt="a").status_code == 200


UNLOADED = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2000},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1800},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1800},
    "/v1/messages": {"model": "going", "max_tokens": 1800, "messages": [{"role": "user", "content": "hi"}]},
    "/completion": {"prompt": "a", "n_predict": 2000},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2000}},
    "/generate_stream": {"inputs": "a", "parameters": {"max_new_tokens": 1800}},
}


def test_every_dialect_says_that_the_checkpoint_was_unloaded(serve, tiny_checkpoint) -> None:
    """None of them says that the server is stopping: it is not."""
    checkpoint = tiny_checkpoint("going", context=2048)
    with serve(checkpoint, model_directory=checkpoint.parent) as served:
        engine = served.models.get().engine
        run, begun = engine.network.run, threading.Event()

        def held(works: Any) -> Any:
            # No answer is at its end before all have come and the checkpoint is unloaded.
            wait_for(lambda: engine.running + engine.waiting == len(UNLOADED))
            begun.set()
            wait_for(lambda: engine._closing is not None)
            return run(works)

        engine.network.run, engine.network.steps = held, lambda *_: []
        answers: dict[str, str] = {}

        def call(path: str) -> None:
            answers[path] = httpx.post(served.url + path, json=UNLOADED[path], timeout=30).text

        threads = [threading.Thread(target=call, args=(path,)) for path in UNLOADED]
        for thread in threads:
            thread.start()
        assert begun.wait(20)
        assert served.client.delete("/models/going").status_code == 204
        for thread in threads:
            thread.join(30)
        assert set(answers) == set(UNLOADED)
        for path, text in answers.items():
            assert "going is being unloaded" in text and "stopping" not in text, (path, text[-300:])


def test_a_stream_whose_client_went_away_in_the_queue_is_never_begun(serve, tiny_checkpoint) -> None:
    """It might be resumed by its id, but its client has not been told one."""
    with serve(tiny_checkpoint("queue", context=2048), stream_grace=60) as served:
        engine = served.models.get().engine
        run, entered, go_on = engine.network.run, threading.Event(), threading.Event()

        def wait(works: Any) -> Any:
            entered.set()
            assert go_on.wait(60)
            return run(works)

        engine.network.run, engine.network.steps = wait, lambda *_: []
        body = {"prompt": "a" * 30, "max_tokens": 3, "ignore_end_token": True, "stream": True}
        with httpx.stream("POST", f"{served.url}/generate", json=body) as first:
            assert entered.wait(20)
            # No head comes as long as it waits.
            second = http.client.HTTPConnection(httpx.URL(served.url).netloc.decode())
            second.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            wait_for(lambda: engine.waiting == 1)
            second.close()
            wait_for(lambda: any(job.cancelled for job in engine._arriving))
            go_on.set()
            text = first.read().decode()
        assert "event: done" in text
        served.wait_until_idle()
        assert served.models.metrics.registry.get_sample_value(
            "topkapi_prompt_tokens_total", {"model_name": "queue"}
        ) == len(served.models.get().checkpoint.tokenizer.encode("a" * 30))


def test_a_full_thread_of_embeddings_says_when_to_come_again(watched, monkeypatch) -> None:
    monkeypatch.setattr("topkapi.service.embedding.MOST_WAITING", 0)
    answer = watched.post("/v1/embeddings", input="a")
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
