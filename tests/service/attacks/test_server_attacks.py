"""Attacks on `topkapi serve` as it is run: engines that break or hang, and whatever may keep a process from ending."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from tests.driver import free_port
from topkapi.service.server import ENGINE_FAILED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENDLESS = {"prompt": "a", "max_tokens": 2000, "ignore_end_token": True}
SOON = 5.0
"""Seconds within which `/ready` must be right."""

HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

BROKEN = """
import os, resource, signal, sys, time
import topkapi.engine.steps as network, topkapi.engine.scheduler as scheduler
run, plan, clock = network.DecoderNetwork.run, scheduler.Scheduler.plan, time.time
if os.path.exists(sys.argv[1] + "/full"):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
def jumping():
    jump = sys.argv[1] + "/jump"
    return clock() + (float(open(jump).read() or 0) if os.path.exists(jump) else 0)
time.time = jumping
def no_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken, before[1]))
    try:
        return bytearray(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
def sabotaged(self, works):
    while os.path.exists(sys.argv[1] + "/hang"):
        time.sleep(0.05)
    if os.path.exists(sys.argv[1] + "/memory"):
        no_memory()
    return run(self, works)
def broken(self):
    if os.path.exists(sys.argv[1] + "/once"):
        os.remove(sys.argv[1] + "/once")
        raise SystemExit("the plan")
    if os.path.exists(sys.argv[1] + "/always"):
        raise RuntimeError("the plan")
    return plan(self)
network.DecoderNetwork.run, scheduler.Scheduler.plan = sabotaged, broken
network.DecoderNetwork.steps = lambda *_: []
from topkapi.service.commands.cli import main
sys.exit(main(["serve", *sys.argv[2:]]))
"""


class Process:
    """A server in a process of its own; files in `sabotage` say what goes wrong.

    Its engine hangs while there is one named `hang`, and breaks `once` or `always`; there is no `memory`; the clock has
    made a `jump` of as many seconds; with `full` at the start no file can be written.
    """

    def __init__(
        self, sabotage: Path, *arguments: str, port: int | None = None, stderr: IO[str] | int = subprocess.STDOUT
    ) -> None:
        self.sabotage, self.port = sabotage, port or free_port()
        command = [sys.executable, "-c", BROKEN, str(sabotage), *arguments, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        self.url = f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> httpx.Response | None:
        """The answer, or None where nobody listens."""
        try:
            return httpx.get(self.url + path, timeout=20)
        except httpx.TransportError:
            return None

    def ready(self) -> int | None:
        """The status of `/ready`."""
        answer = self.get("/ready")
        return None if answer is None else answer.status_code

    def wait_for(self, condition: Callable[[], object], seconds: float = 400) -> None:
        """Wait until something is so; fails when that takes too long, or the process ends first."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came about"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A bare connection on which `sent` has been sent."""
        bare = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        bare.sendall(sent)
        return bare

    def end(self, by: int, within: float) -> str:
        """Send a signal; what the process printed, once it has ended in time and with success."""
        began = time.monotonic()
        self.process.send_signal(by)
        printed = self.process.communicate(timeout=60)[0]
        assert (self.process.returncode, time.monotonic() - began < within) == (0, True), printed
        return printed


@pytest.fixture
def serving(tmp_path, tiny_checkpoint) -> Iterator[Callable[..., Process]]:
    processes = []

    def start(
        *arguments: str, wait: bool = True, studio: bool = False, checkpoint: Path | None = None, **process_of: Any
    ) -> Process:
        shown = "--studio" if studio else "--no-studio"
        served = str(checkpoint or tiny_checkpoint("attacked", context=2048))
        # What runs is ended at once: test_draining.py has how it is finished.
        process = Process(tmp_path, served, shown, "--drain-seconds", "0", *arguments, **process_of)
        processes.append(process)
        if wait:
            process.wait_for(lambda: process.ready() == 200)
        return process

    yield start
    for process in processes:
        process.process.kill()
        process.process.wait()
        assert process.process.stdout is not None
        process.process.stdout.close()


@contextmanager
def streaming(server: Process, count: int) -> Iterator[list[str]]:
    """So many streams under way; at the end of the block, the text of each."""
    texts: list[str] = []
    begun = [threading.Event() for _ in range(count)]

    def read(event: threading.Event) -> None:
        with httpx.stream("POST", f"{server.url}/generate", json=ENDLESS | {"stream": True}, timeout=60) as answer:
            lines = []
            for line in answer.iter_lines():
                lines.append(line)
                event.set()
            texts.append("\n".join(lines))

    threads = [threading.Thread(target=read, args=(event,)) for event in begun]
    for thread in threads:
        thread.start()
    assert all(event.wait(30) for event in begun)
    yield texts
    for thread in threads:
        thread.join(30)
    assert len(texts) == count


def test_an_engine_that_breaks_once_begins_anew(serving) -> None:
    server = serving()
    with streaming(server, 4) as texts:
        (server.sabotage / "once").touch()
    assert all("event: error" in text and "engine_stopped" in text and "SystemExit" in text for text in texts)
    server.wait_for(lambda: server.ready() == 200, SOON)
    assert httpx.post(f"{server.url}/generate", json={"prompt": "a", "max_tokens": 3}, timeout=30).status_code == 200
    assert 'topkapi_engine_restarts{model_name="attacked"} 1.0' in httpx.get(f"{server.url}/metrics").text
    server.end(signal.SIGTERM, 5)


def test_an_engine_that_breaks_again_and_again_ends_the_process(serving) -> None:
    server = serving()
    (server.sabotage / "always").touch()
    end = time.monotonic() + 60
    while server.process.poll() is None:
        assert time.monotonic() < end
        try:
            answer = httpx.post(f"{server.url}/generate", json={"prompt": "a"}, timeout=20)
            assert answer.status_code == 503 and answer.json()["error"]["type"] in ("engine_stopped", "cancelled")
        except httpx.TransportError:
            continue
        time.sleep(0.2)
    assert server.process.returncode == ENGINE_FAILED
    assert "to be started anew" in server.process.communicate()[0]


def test_a_network_that_hangs_ends_its_clients_and_then_the_process(serving) -> None:
    server = serving("--step-timeout", "2")
    with streaming(server, 3) as texts:
        began = time.monotonic()
        (server.sabotage / "hang").touch()
        slowest = 0.0
        while server.ready() != 503:
            assert time.monotonic() - began < 2 + SOON
            asked = time.monotonic()
            assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
            slowest = max(slowest, time.monotonic() - asked)
        reason = httpx.get(f"{server.url}/ready").json()["reason"]
    assert "more than 2 s" in reason and slowest < 0.5
    assert all("event: error" in text and "more than 2 s" in text for text in texts)
    printed = server.process.communicate(timeout=30)[0]
    assert server.process.returncode == ENGINE_FAILED and "more than 2 s" in printed


def test_one_that_hangs_can_be_stopped(serving) -> None:
    server = serving()
    with streaming(server, 3) as texts:
        (server.sabotage / "hang").touch()
        server.end(signal.SIGTERM, 5)
    assert all("event: done" in text and '"finish_reason": "cancelled"' in text for text in texts)


def test_whatever_is_open_the_process_ends_in_time_and_cuts_nothing_off(serving) -> None:
    """Idle connections, kept ones, halves of heads and bodies, slow readers, and a text that is being read."""
    server = serving()
    text = json.dumps({"text": "a b c " * 100_000, "per_token": False}).encode()
    unread = json.dumps(ENDLESS | {"stream": True, "logprobs": 20, "n": 8}).encode()
    with ExitStack() as stack:
        for sent in (
            *[b""] * 20,
            *[HEAD] * 20,
            *[HEAD + b"Content-Length: 100000\r\n\r\n{"] * 5,
            *[b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 5,
            HEAD + b"Content-Length: %d\r\n\r\n" % len(unread) + unread,
            HEAD.replace(b"/generate", b"/score") + b"Content-Length: %d\r\n\r\n" % len(text) + text,
        ):
            stack.enter_context(server.connect(sent))
        with streaming(server, 4) as texts:
            printed = server.end(signal.SIGTERM, 5)
    assert all("event: done" in text and '"finish_reason": "cancelled"' in text for text in texts)
    assert "Traceback" not in printed


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_time_while_it_loads(serving, by) -> None:
    server = serving(wait=False)
    server.wait_for(lambda: server.ready() is not None)
    assert "Traceback" not in server.end(by, 5)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_an_open_studio_does_not_keep_it_from_ending(serving, by) -> None:
    from playwright.sync_api import sync_playwright

    browser = os.environ.get("TOPKAPI_TEST_BROWSER") or shutil.which("chromium")
    server = serving(studio=True)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]) as launched,
    ):
        page = launched.new_page()
        page.goto(server.url)
        # The page is whole, and its connections are open: the studio asks for nothing more by itself.
        page.wait_for_selector("#message textarea", timeout=60_000)
        printed = server.end(by, 5)
    assert "Traceback" not in printed and "Error" not in printed, printed


def test_dribbling_and_idle_connections_leave_room_for_others(serving) -> None:
    """More of them than there may be: the next is told so, and a moment later there is room again."""
    server = serving("--request-timeout", "2", "--idle-timeout", "2", "--max-connections", "50")
    over = threading.Event()
    with ExitStack() as stack:
        bare = [stack.enter_context(server.connect(HEAD if number % 2 else b"")) for number in range(60)]

        def dribble() -> None:
            while not over.wait(0.2):
                for each in bare:
                    try:
                        each.sendall(b"X")
                    except OSError:
                        continue

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            server.wait_for(lambda: server.ready() == 503, 10)
            server.wait_for(lambda: server.ready() == 200, 20)
            for each in bare[:50]:
                assert each.recv(12) in (b"HTTP/1.1 408", b"")
        finally:
            over.set()
            thread.join()
    server.end(signal.SIGTERM, 5)


def test_a_full_queue_says_about_how_long_it_takes(serving) -> None:
    server = serving("--max-queue", "5")
    statuses: list[int] = []

    def call(answers: int) -> None:
        long = {"prompt": "a", "n": answers, "max_tokens": 1000, "ignore_end_token": True}
        statuses.append(httpx.post(f"{server.url}/generate", json=long, timeout=300).status_code)

    def counted(name: str) -> int:
        text = httpx.get(f"{server.url}/metrics", timeout=20).text
        found = re.search(rf'^topkapi_num_requests_{name}{{model_name="attacked"}} ([0-9.]+)$', text, re.MULTILINE)
        return 0 if found is None else int(float(found[1]))

    # One request takes all the room there is; sent one by one, some would find the queue full before a step began.
    threads = [threading.Thread(target=call, args=(answers,)) for answers in (32, 1, 1, 1, 1, 1)]
    for number, thread in enumerate(threads):
        thread.start()
        server.wait_for(lambda number=number: (counted("running"), counted("waiting")) == (1, number), 60)
    began = time.monotonic()
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=300)
    for thread in threads:
        thread.join(300)
    took = time.monotonic() - began
    assert refused.status_code == 429 and statuses == [200] * 6, (refused.text, statuses)
    said = int(refused.headers["retry-after"])
    assert said > 1 and 0.2 < said / took < 5, (said, took)
