"""A server whose checkpoints are in replicas: the same answers, its own rules before them, and what a lost one leaves.

The replicas are those that Ray Serve runs, in this process: what carries requests to them is tried in test_ray.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Message

from tests.tiny import run_by
from topkapi.service.api.http.middleware import COMMENT
from topkapi.service.app import create_api
from topkapi.service.commands.launch import bind
from topkapi.service.keys import Key, digest_of, line_of
from topkapi.service.models import Models
from topkapi.service.quotas import Limits
from topkapi.service.replicas.front import ReplicaLost, holder_of, stand_before
from topkapi.service.replicas.replica import Passed, Replica, for_replicas
from topkapi.service.server import Server
from topkapi.service.settings import Settings


class Local:
    """Replicas in this process, which are asked in turn; those in `lost` answer `survived` batches more."""

    def __init__(self, checkpoint: Path, settings: Settings, count: int) -> None:
        self.models: list[Models] = []
        self.replicas: dict[str, Replica] = {}
        for number in range(count):
            models = Models(for_replicas(settings, 1))
            models.replica = f"r{number}"
            models.load(str(checkpoint))
            self.models.append(models)
            self.replicas[models.replica] = Replica(models)
        self.asked: list[str] = []
        self.lost: dict[str, int] = {}
        self.away = False

    async def ask(self, request: Passed, replica: str | None) -> AsyncGenerator[list[Message], None]:
        if self.away:
            await asyncio.Event().wait()
        names = list(self.replicas)
        name = replica if replica in names else names[len(self.asked) % len(names)]
        self.asked.append(name)
        batches = 0
        async with aclosing(self.replicas[name].answer(request)) as answer:
            async for batch in answer:
                if batches >= self.lost.get(name, 10**9):
                    raise ReplicaLost("it is gone", hint="send the request again")
                batches += 1
                yield batch

    async def metrics(self, seconds: float) -> dict[str, str]:
        return {name: replica.metrics() for name, replica in self.replicas.items()}

    @property
    def running(self) -> int:
        return sum(model.engine.running + model.engine.waiting for models in self.models for model in models)


class Replicated:
    def __init__(self, url: str, local: Local, client: httpx.Client, models: Models) -> None:
        self.url, self.local, self.client, self.models = url, local, client, models

    def post(self, path: str, /, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)


@contextmanager
def replicated(checkpoint: Path, count: int = 2, **given: Any) -> Iterator[Replicated]:
    settings = Settings.read(port=0, **({"studio": False} | given))
    models = Models(settings)
    local = Local(checkpoint, settings, count)
    app = create_api(models, settings)
    stand_before(local, app, models)
    listener = bind("127.0.0.1", 0)
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1), models, listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=60) as client:
        yield Replicated(url, local, client, models)
    server.should_exit = True
    thread.join(10)
    listener.close()
    for each in local.models:
        each.close(0)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("front", context=2048)


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[Replicated]:
    with replicated(checkpoint) as running:
        yield running


@pytest.fixture
def front(shared: Replicated) -> Iterator[Replicated]:
    shared.local.asked.clear()
    shared.local.lost.clear()
    yield shared
    shared.local.lost.clear()
    shared.local.away = False


ASK = {"prompt": "one two", "max_tokens": 8, "seed": 3, "ignore_end_token": True}
LONG = {"prompt": "one two", "max_tokens": 1500, "seed": 3, "ignore_end_token": True, "stream": True}
CHAT = {"model": "front", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


def test_whichever_replica_answers_the_tokens_are_the_same(front: Replicated) -> None:
    answers = [front.post("/generate", **ASK).json() for _ in range(4)]
    assert {answer["outputs"][0]["text"] for answer in answers} == {answers[0]["outputs"][0]["text"]}
    assert set(front.local.asked) == {"r0", "r1"}
    assert [answer["id"].rpartition("-")[2] for answer in answers] == front.local.asked
    assert holder_of(answers[0]["id"]) == front.local.asked[0]


def test_every_dialect_and_route_is_answered(front: Replicated) -> None:
    assert front.post("/v1/chat/completions", **CHAT).json()["object"] == "chat.completion"
    assert front.post("/v1/messages", **CHAT).json()["type"] == "message"
    assert front.post("/generate", inputs="one").json()["generated_text"] is not None
    assert front.client.get("/models").json()["models"][0]["name"] == "front"
    assert front.client.get("/ready").json()["models"] == ["front"]
    assert front.client.get("/docs").status_code == 200
    assert front.client.get("/nowhere").json()["error"]["type"] == "not_found"
    assert front.post("/v1/chat/completions", **CHAT, nonsense=1).json()["error"]["param"] == "nonsense"


def test_a_stream_comes_event_by_event_under_the_name_that_was_given(front: Replicated) -> None:
    with front.client.stream("POST", "/generate", json=LONG, headers={"X-Request-Id": "mine"}) as answer:
        assert answer.headers["X-Request-Id"] == "mine"
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines).startswith("id: gen-") and next(lines) == "event: token"
        assert front.local.running == 1, "the rest is still to be computed"


def test_who_leaves_is_computed_no_further(front: Replicated) -> None:
    wait_for(lambda: not front.local.running)
    with front.client.stream("POST", "/generate", json=LONG | {"resumable": False}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: not front.local.running)


def test_who_has_been_answered_is_not_noted_as_gone(front: Replicated) -> None:
    def gone() -> list[str]:
        return re.findall(r'reason="client_gone"} (\S+)', front.client.get("/metrics").text)

    before = gone()
    for _ in range(20):
        assert front.post("/generate", **ASK).status_code == 200
        assert front.post("/generate", **ASK | {"stream": True}).status_code == 200
    assert gone() == before


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lost_stream_goes_on_where_it_was_by_the_replica_that_keeps_it(front: Replicated) -> None:
    body = LONG | {"max_tokens": 40}
    whole = front.client.post("/generate", json=body).text.split("\n\n")
    third = whole[2].partition("\n")[0].removeprefix("id: ")
    for _ in range(2):
        front.local.asked.append("so that another one would be next")
        again = front.client.post("/generate", json=body, headers={"Last-Event-ID": third}).text.split("\n\n")
        assert again == whole[3:]
        name = third.rpartition(":")[0]
        assert front.client.get(f"/streams/{name}", headers={"Last-Event-ID": third}).text.split("\n\n") == whole[3:]


def test_who_has_been_answered_nothing_is_told_to_ask_again(front: Replicated) -> None:
    front.local.lost = {"r0": 1, "r1": 1}
    native = front.post("/generate", **ASK)
    assert (native.status_code, native.headers["Retry-After"]) == (503, "1")
    assert native.json()["error"]["type"] == "replica_lost" and "again" in native.json()["error"]["hint"]
    claude = front.post("/v1/messages", **CHAT)
    assert claude.status_code in (503, 529) and claude.json()["type"] == "error"
    front.local.lost = {}
    assert front.post("/generate", **ASK).status_code == 200


@pytest.mark.parametrize(("path", "body", "last"), [
    ("/generate", LONG, "event: error\ndata: "),
    ("/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 900}, 'data: {"error":'),
    ("/v1/messages", CHAT | {"stream": True, "max_tokens": 900}, "event: error\ndata: "),
])  # fmt: skip
def test_a_stream_of_a_lost_replica_ends_with_an_error_in_its_dialect(
    front: Replicated, path: str, body: dict, last: str
) -> None:
    front.local.lost = {"r0": 4, "r1": 4}
    answer = front.client.post(path, json=body)
    assert answer.status_code == 200
    event = answer.text.rstrip("\n").split("\n\n")[-1]
    assert event.startswith(last) and "it is gone" in event


def test_the_dialect_of_a_body_that_shares_its_path_is_that_of_its_end(front: Replicated) -> None:
    front.local.lost = {"r0": 4, "r1": 4}
    body = {"inputs": "one", "parameters": {"max_new_tokens": 900}}
    answer = front.client.post("/generate_stream", json=body)
    event = json.loads(answer.text.rstrip("\n").split("\n\n")[-1].removeprefix("data:"))
    assert event["error"] and "error_type" in event


def test_without_a_replica_probes_say_so_and_requests_are_refused(
    checkpoint: Path, front: Replicated, monkeypatch
) -> None:
    monkeypatch.setattr("topkapi.service.replicas.front.PROBE_SECONDS", 0.05)
    front.local.away = True
    assert front.client.get("/health").status_code == 200
    assert front.client.get("/ready").status_code == 503
    refused = front.post("/generate", headers={"X-Request-Timeout": "0.1"}, **ASK)
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1


def test_what_is_asked_while_it_drains_is_told_so(front: Replicated) -> None:
    front.models.draining = True
    try:
        ready = front.client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
    finally:
        front.models.draining = False


def test_checkpoints_are_not_changed_in_one_replica_alone(front: Replicated) -> None:
    posted, deleted = front.post, front.client.delete
    for answer in (
        posted("/models", path="x"),
        deleted("/models/front"),
        posted("/adapters", path="x"),
        deleted("/adapters/a"),
    ):
        assert answer.status_code == 409 and "replicas" in answer.json()["error"]["message"]
    assert front.client.get("/models").status_code == 200
    assert deleted("/models").status_code == 405 and "POST" in deleted("/models").headers["Allow"]


def test_the_front_says_that_a_silent_stream_is_there(checkpoint: Path, monkeypatch) -> None:
    with replicated(checkpoint, count=1, stream_keep_alive=0.1) as front:
        network = front.local.models[0].get().engine.network
        run = network.run

        def slow(*arguments: object, **options: object) -> object:
            time.sleep(0.3)
            return run(*arguments, **options)

        run_by(monkeypatch, network, slow)
        parts = front.client.post("/generate", json=LONG | {"max_tokens": 2}).text.split("\n\n")
        said = [part for part in parts if part and not part.startswith(":")]
        assert parts.count(COMMENT.decode().strip()) >= 2
        assert ["event: " + part.split("event: ")[1].split("\n")[0] for part in said] == ["event: token"] * 2 + [
            "event: done"
        ]


@pytest.mark.parametrize("silence", [0.0, 0.05])
def test_a_stream_that_waits_in_vain_has_a_status_unless_it_was_silent_too_long(
    checkpoint: Path, monkeypatch, silence: float
) -> None:
    with replicated(checkpoint, count=1, stream_keep_alive=silence, max_queue_seconds=0.3) as front:
        engine = front.local.models[0].get().engine
        entered, go_on = threading.Event(), threading.Event()
        run = engine.network.run

        def held(works: Any) -> Any:
            entered.set()
            assert go_on.wait(60)
            return run(works)

        run_by(monkeypatch, engine.network, held)
        first = threading.Thread(target=front.post, args=["/generate"], kwargs=ASK | {"n": 32})
        first.start()
        assert entered.wait(30)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(front.post, "/v1/messages", **CHAT, stream=True)
            wait_for(lambda: bool(engine._arriving) and engine._arriving[0].impatient)
            go_on.set()
            answer = waiting.result()
        first.join()
        if silence:
            assert answer.status_code == 200 and answer.text.count("event: error") == 1
        else:
            assert answer.status_code == 529 and answer.json()["error"]["type"] == "overloaded_error"
            assert int(answer.headers["Retry-After"]) >= 1
            with front.client.stream("POST", "/generate", json=LONG) as begun:
                assert begun.status_code == 200


def test_the_studio_is_the_fronts_own(checkpoint: Path) -> None:
    """Its page and what that calls are of one process, whose sessions it has."""
    with replicated(checkpoint, studio=True) as front:
        page = front.client.get("/")
        assert page.status_code == 200 and "gradio" in page.text
        for place in set(re.findall(r'(?:src|href)="\.?(/?(?:assets|studio)/[^"]+)"', page.text)):
            assert front.client.get("/" + place.lstrip("/")).status_code == 200, place
        assert front.client.get("/gradio_api/info").status_code == 200
        assert front.local.asked == []
        assert front.post("/", inputs="one", parameters={"max_new_tokens": 1}).status_code == 200
        assert len(front.local.asked) == 1


def test_what_no_route_takes_is_not_a_replicas(front: Replicated) -> None:
    for method, path, status in (("TRACE", "/metrics", 405), ("GET", "/generate", 405), ("POST", "/nothing", 404)):
        assert front.client.request(method, path).status_code == status
    assert front.local.asked == []


def test_what_is_described_is_the_fronts_own(front: Replicated) -> None:
    asked = len(front.local.asked)
    assert "/generate" in front.client.get("/openapi.json").json()["paths"]
    assert front.client.get("/docs").status_code == 200 and len(front.local.asked) == asked


def test_metrics_are_those_of_all_with_the_name_of_each(front: Replicated) -> None:
    front.post("/generate", **ASK), front.post("/generate", **ASK), front.post("/generate", nonsense=1)
    text = front.client.get("/metrics").text
    for name in ("r0", "r1"):
        assert f'topkapi_generation_tokens_total{{model_name="front",replica="{name}"}}' in text
    assert text.count("# TYPE topkapi_generation_tokens_total ") == 1
    refused = [line for line in text.splitlines() if line.startswith("topkapi_requests_refused_total{")]
    assert refused and not any("replica=" in line for line in refused), "counted where requests come in"


def test_who_leaves_has_used_what_was_computed(checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secret = "k" * 32
    keys.write_text(line_of(Key("alice", "use", digest_of(secret), Limits(tokens_per_minute=1000))) + "\n")
    with replicated(checkpoint, keys=str(keys), stream_grace=0) as front:
        mine, began = {"Authorization": f"Bearer {secret}"}, time.monotonic()
        with front.client.stream("POST", "/generate", json=LONG, headers=mine) as answer:
            tokens = 0
            for line in answer.iter_lines():
                tokens += line == "event: token"
                if tokens == 300:
                    break
        wait_for(lambda: not front.local.running)
        left = int(
            front.post("/generate", headers=mine, **ASK | {"max_tokens": 1}).headers["x-ratelimit-remaining-tokens"]
        )
        assert left <= 1000 - 300 + (time.monotonic() - began) * 1000 / 60


def test_keys_and_their_limits_hold_over_all_replicas(checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secret = "k" * 32
    limits = Limits(requests_per_minute=3, tokens_per_minute=10)
    keys.write_text(line_of(Key("alice", "use", digest_of(secret), limits)) + "\n")
    with replicated(checkpoint, keys=str(keys)) as front:
        assert front.post("/generate", **ASK).status_code == 401
        mine = {"Authorization": f"Bearer {secret}"}
        first = front.post("/generate", headers=mine, **ASK)
        assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "2")
        # 8 tokens and those of the prompt were used: more than there were.
        assert first.headers["x-ratelimit-remaining-tokens"] == "0"
        refused = front.post("/generate", headers=mine, **ASK | {"max_tokens": 1})
        message = refused.json()["error"]["message"]
        assert refused.status_code == 429 and re.search(r"10 tokens a minute, and this request reads \d", message)
        assert front.post("/generate", headers=mine, **ASK).status_code == 429
        assert "requests a minute" in front.post("/generate", headers=mine, **ASK).json()["error"]["message"]
        assert front.client.get("/metrics", headers=mine).status_code == 403
