"""SIGTERM: what runs is finished, nothing new is taken, and the process ends with success; over a real socket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

LONG = {"prompt": "a", "max_tokens": 1800, "ignore_end_token": True, "stream": True}


class Process:
    """`topkapi serve` with a network that waits for a file before each pass, if told to."""

    def __init__(self, checkpoint: Path, hold: Path, *flags: str) -> None:
        code = (
            "import sys, time, pathlib\n"
            "import topkapi.engine.steps as network\n"
            "run, hold = network.DecoderNetwork.run, pathlib.Path(sys.argv.pop(1))\n"
            "def slowly(self, works):\n"
            "    while hold.exists(): time.sleep(0.01)\n"
            "    time.sleep(0.002)\n"
            "    return run(self, works)\n"
            "network.DecoderNetwork.run, network.DecoderNetwork.steps = slowly, lambda *_: []\n"
            "from topkapi.service.commands.cli import main\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        command = [
            sys.executable,
            "-c",
            code,
            str(hold),
            "serve",
            str(checkpoint),
            "--port",
            "0",
            "--no-studio",
            *flags,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        assert self.process.stdout is not None and self.process.stderr is not None
        said = self.process.stderr if "json" in flags else self.process.stdout
        line = said.readline()
        self.first = json.loads(line) if "json" in flags else {}
        while "http://" not in line:
            line = said.readline()
            assert line, self.process.communicate()[1]
        self.url = re.search(r"http://[\d.]+:\d+", line)[0]  # type: ignore[index]

    def ready(self) -> tuple[int, str]:
        answer = httpx.get(f"{self.url}/ready", timeout=20)
        return answer.status_code, answer.json()["status"]


@contextmanager
def process(*arguments: Any) -> Iterator[Process]:
    running = Process(*arguments)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


class Reading(threading.Thread):
    """A stream that is read to its end in a thread; `begun` once it has an event."""

    def __init__(self, url: str, path: str, body: dict[str, Any]) -> None:
        super().__init__()
        self.request, self.begun, self.lines, self.status = (url + path, body), threading.Event(), [], 0
        self.start()

    def run(self) -> None:
        url, body = self.request
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                self.lines.append(line)
                self.begun.set()


REFUSED = {
    "/generate": lambda body: body["error"]["type"] == "cancelled",
    "/v1/chat/completions": lambda body: body["error"]["type"] == "server_error" and "param" in body["error"],
    "/v1/messages": lambda body: (body["type"], body["error"]["type"]) == ("error", "api_error"),
    "/generate_stream": lambda body: body["error_type"] == "incomplete_generation",
    "/completion": lambda body: body["error"]["type"] == "unavailable_error",
}


def test_what_runs_is_finished_and_nothing_new_is_taken(tiny_checkpoint, tmp_path) -> None:
    hold = tmp_path / "hold"
    with process(tiny_checkpoint("drained", context=2048), hold) as server:
        chat = {"model": "drained", "max_tokens": 300, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        native, claude = Reading(server.url, "/generate", LONG), Reading(server.url, "/v1/messages", chat)
        assert native.begun.wait(30) and claude.begun.wait(30)
        hold.touch()
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while server.ready() != (503, "stopping"):
            assert time.monotonic() < end, "ready turns false at once"
        for path, is_its_own in REFUSED.items():
            refused = httpx.post(server.url + path, json={"prompt": "a"}, timeout=20)
            assert refused.status_code == 503 and is_its_own(refused.json()), (path, refused.text)
            assert "stopping" in refused.text and int(refused.headers["retry-after"]) > 0
        # Alive, and seen to be so.
        assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
        assert "topkapi_draining 1.0" in httpx.get(f"{server.url}/metrics", timeout=20).text
        hold.unlink()
        native.join(60)
        claude.join(60)
        errors = server.process.communicate(timeout=30)[1]
        assert server.process.returncode == 0 and "Traceback" not in errors, errors
    whole = json.loads(next(line for line in reversed(native.lines) if line.startswith("data: "))[6:])
    assert (whole["outputs"][0]["finish_reason"], len(whole["outputs"][0]["token_ids"])) == ("length", 1800)
    assert "event: message_stop" in claude.lines


@pytest.mark.slow
def test_a_lost_stream_is_finished_while_it_drains(tiny_checkpoint, tmp_path) -> None:
    hold = tmp_path / "hold"
    with process(tiny_checkpoint("resumed", context=2048), hold) as server:
        with httpx.stream("POST", f"{server.url}/generate", json=LONG | {"max_tokens": 900}, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
        hold.touch()
        server.process.send_signal(signal.SIGTERM)
        name = first.removeprefix("id: ").partition(":")[0]
        with httpx.stream("GET", f"{server.url}/streams/{name}", timeout=60) as answer:
            assert answer.status_code == 200
            hold.unlink()
            rest = list(answer.iter_lines())
        assert "event: done" in rest and server.process.wait(30) == 0


@pytest.mark.slow
def test_what_takes_longer_ends_as_cancelled_and_a_second_signal_waits_for_nothing(tiny_checkpoint, tmp_path) -> None:
    hold, checkpoint = tmp_path / "hold", tiny_checkpoint("cut", context=2048)
    for flags, signals in ((("--drain-seconds", "0.3"), 1), (("--drain-seconds", "600"), 2)):
        with process(checkpoint, hold, *flags) as server:
            stream = Reading(server.url, "/generate", LONG)
            assert stream.begun.wait(30)
            server.process.send_signal(signal.SIGTERM)
            if signals == 2:
                hold.touch()
                end = time.monotonic() + 20
                while server.ready() != (503, "stopping"):
                    assert time.monotonic() < end
                server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            stream.join(20)
            last = json.loads(next(line for line in reversed(stream.lines) if line.startswith("data: "))[6:])
            assert last["outputs"][0]["finish_reason"] == "cancelled"


@pytest.mark.slow
def test_everything_that_a_process_says_is_json(tiny_checkpoint, tmp_path) -> None:
    public = ["--host", "0.0.0.0", "--insecure"]
    with process(tiny_checkpoint("json"), tmp_path / "hold", "--log-format", "json", "--access-log", *public) as server:
        httpx.post(f"{server.url}/generate", json={"prompt": "a", "max_tokens": 1}, timeout=20)
        server.process.send_signal(signal.SIGTERM)
        said, errors = server.process.communicate(timeout=30)
    assert server.first["level"] == "warning" and "there are no keys" in server.first["message"]
    lines = [json.loads(line) for line in errors.splitlines()]
    assert said == "" and [line["path"] for line in lines if "path" in line] == ["/generate"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_nothing_to_do_it_ends_at_once(tiny_checkpoint, tmp_path, number) -> None:
    with (
        process(tiny_checkpoint("idle"), tmp_path / "hold", "--drain-seconds", "600") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        # A connection that is kept open is nothing that runs.
        assert client.get("/health").status_code == 200
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
