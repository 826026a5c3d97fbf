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
from topkapi.service.app import create_app
from topkapi.service.commands.launch import bind
from topkapi.service.gate import Gate
from topkapi.service.models import Models
from topkapi.service.server import Server
from topkapi.service.settings import Settings


@contextmanager
def starting(make) -> Iterator[tuple[httpx.Client, Server, threading.Thread]]:
    """A server that listens while `make(models)` runs, with a client."""
    models = Models(Settings(studio=False))
    gate = Gate(models)
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(gate, log_level="warning", timeout_graceful_shutdown=1)
    server = Server(config, models, listener, lambda: gate.open(lambda: make(models)))
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

    def make(models: Models):
        assert go_on.wait(20)
        models.load(str(tiny_checkpoint("late")))
        return create_app(models, Settings(studio=studio))

    with starting(make) as (client, _, _):
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
    def make(models: Models):
        raise CheckpointError("nothing there")

    with starting(make) as (_, server, thread):
        thread.join(10)
        assert not thread.is_alive()
    assert isinstance(server.failure, CheckpointError)


def test_it_can_be_stopped_while_it_loads() -> None:
    go_on = threading.Event()

    def make(models: Models):
        go_on.wait(20)
        raise CheckpointError("too late to matter")

    with starting(make) as (client, server, thread):
        assert client.get("/ready").status_code == 503
        began = time.monotonic()
        server.should_exit = True
        thread.join(10)
        assert time.monotonic() - began < 10 and not thread.is_alive()
    go_on.set()
    assert server.failure is None
