"""While checkpoints load, the server is alive and says that it is not ready; then it is, or ends and says why."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from topkapi.model.errors import CheckpointError
from topkapi.service.app import add_studio, create_api
from topkapi.service.commands.launch import bind
from topkapi.service.models import Models
from topkapi.service.requests import Gate
from topkapi.service.server import Server
from topkapi.service.settings import Settings


@contextmanager
def starting(make_ready, **settings) -> Iterator[tuple[httpx.Client, Server, threading.Thread]]:
    """A server that listens while `make_ready(models, app)` runs, with a client."""
    chosen = Settings(**{"studio": False, **settings})
    models = Models(chosen)
    app = create_api(models, chosen)
    gate = Gate(models, app)
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(gate, log_level="warning", timeout_graceful_shutdown=1)
    server = Server(config, models, listener, lambda: gate.open(lambda: make_ready(models, app)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as client:
        yield client, server, thread
    server.should_exit = True
    thread.join(10)
    listener.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("studio", [False, True])
def test_it_is_alive_before_it_is_ready(tiny_checkpoint, studio) -> None:
    go_on = threading.Event()

    def make_ready(models: Models, app) -> None:
        assert go_on.wait(20)
        models.load(str(tiny_checkpoint("late")))
        add_studio(app, models, models.settings)

    with starting(make_ready, studio=studio) as (client, _, _):
        health = client.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["models"]) == (503, "loading", [])
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        refused = client.post("/generate", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "loading")
        assert int(refused.headers["retry-after"]) >= 1 and "retry-after" in ready.headers
        go_on.set()
        end = time.monotonic() + 20
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.get("/ready").json()["models"] == ["late"]
        assert client.post("/generate", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        if studio:
            assert "gradio" in client.get("/").text


@contextmanager
def loading(**settings) -> Iterator[httpx.Client]:
    """A client of a server that never gets ready."""
    over = threading.Event()

    def make_ready(models: Models, app) -> None:
        over.wait(60)

    with starting(make_ready, **settings) as (client, _, _):
        yield client
        over.set()


ERRORS = {
    "/generate": lambda body: body["error"]["type"] == "loading",
    "/no/such/path": lambda body: body["error"]["type"] == "loading",
    "/v1/chat/completions": lambda body: body["error"]["code"] == "loading" and "param" in body["error"],
    "/v1/no/such/path": lambda body: body["error"]["code"] == "loading" and "param" in body["error"],
    "/v1/messages": lambda body: (body["type"], body["error"]["type"]) == ("error", "api_error"),
    "/generate_stream": lambda body: body["error_type"] == "incomplete_generation",
    "/completion": lambda body: (body["error"]["code"], body["error"]["type"]) == (503, "unavailable_error"),
}


@pytest.mark.parametrize("root_path", [None, "/lab"])
def test_while_it_loads_every_dialect_is_told_in_its_own_shape(root_path) -> None:
    with loading(root_path=root_path) as client:
        for prefix in {"", root_path or ""}:
            for path, is_its_own in ERRORS.items():
                answer = client.post(prefix + path, json={})
                assert answer.status_code == 503 and is_its_own(answer.json()), (path, answer.text)
                assert "being loaded" in answer.text and int(answer.headers["retry-after"]) >= 1, path
            assert client.get(prefix + "/ready").json()["status"] == "loading"


def test_names_and_pages_are_checked_from_the_first_moment() -> None:
    with loading(allowed_hosts="llm.example.org", cors_origins="http://friend.example") as client:
        for path in ("/health", "/ready", "/v1/messages", "/no/such/path"):
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 421, path
            assert client.get(path, headers={"Host": "llm.example.org"}).status_code == 503, path
            assert client.post(path, json={}, headers={"Origin": "http://evil.example"}).status_code == 403, path
        assert client.post("/v1/messages", json={}, headers={"Host": "evil.example"}).json()["type"] == "error"
        friend = {"Origin": "http://friend.example", "Access-Control-Request-Method": "POST"}
        asked = client.options("/generate", headers=friend)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, friend["Origin"])


def listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=20).status_code == 503
    except httpx.TransportError:
        return False


def test_a_signal_while_it_loads_ends_the_process_cleanly(tiny_checkpoint) -> None:
    slow = (
        "import time, topkapi.service.models as models; load = models.load_checkpoint\n"
        "def later(*a, **k): time.sleep(60); return load(*a, **k)\n"
        "models.load_checkpoint = later\n"
        "from topkapi.service.commands.cli import main; import sys\n"
        "sys.exit(main(['serve', '--port', sys.argv[2], sys.argv[1]]))"
    )
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", slow, str(tiny_checkpoint("slow")), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Topkapi")
    end = time.monotonic() + 60
    while not listens(port):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert (process.returncode, rest) == (0, "")


def test_what_cannot_be_loaded_ends_the_server_and_is_told() -> None:
    def make_ready(models: Models, app) -> None:
        raise CheckpointError("nothing there")

    with starting(make_ready) as (_, server, thread):
        thread.join(10)
        assert not thread.is_alive()
    assert isinstance(server.failure, CheckpointError)


def test_it_can_be_stopped_while_it_loads() -> None:
    go_on = threading.Event()

    def make_ready(models: Models, app) -> None:
        go_on.wait(20)
        raise CheckpointError("too late to matter")

    with starting(make_ready) as (client, server, thread):
        assert client.get("/ready").status_code == 503
        began = time.monotonic()
        server.should_exit = True
        thread.join(10)
        assert time.monotonic() - began < 10 and not thread.is_alive()
    go_on.set()
    assert server.failure is None
