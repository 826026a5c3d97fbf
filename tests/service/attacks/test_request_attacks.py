"""Attacks on a real server, `topkapi serve` in its own process: nothing freezes, and /health answers throughout."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 0.5
"""What /health may take at most."""

JSON = {"Content-Type": "application/json"}
MIB = 2**20


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def filled(begin: str, entry: str, end: str, size: int = 31 * MIB) -> bytes:
    """A body of about `size` bytes: the same entry again and again."""
    return (begin + entry * ((size - len(begin) - len(end)) // len(entry)) + end).encode()


ATTACKS: dict[str, tuple[str, Callable[[], bytes], set[int]]] = {
    "30 million characters": ("/generate", lambda: body(prompt="a" * 30_000_000), {422}),
    "a megabyte": ("/generate", lambda: body(prompt="a" * 1_000_000), {422}),
    "30 million characters to a dialect": ("/v1/completions", lambda: body(prompt="a b " * 7_500_000), {400}),
    "a conversation of 30 million": (
        "/v1/chat/completions", lambda: body(messages=[{"role": "user", "content": "<|im_end|>" * 3_000_000}]), {400}),
    "a text to score without a border": ("/score", lambda: body(text="a" * 7_900_000), {422}),
    "a text to tokenize": ("/tokenize", lambda: body(text="The quick brown fox. " * 75_000), {200}),
    "one line of Chinese": ("/tokenize", lambda: body(text="文字化け" * 160_000), {200}),
    "white space": ("/tokenize", lambda: body(text=" " * 1_900_000 + "x"), {200}),
    "ids to detokenize": ("/detokenize", lambda: filled('{"token_ids": [1', ",1", "]}", 7 * MIB), {200}),
    "100,000 prompts": ("/generate", lambda: body(prompt=["a"] * 100_000, max_tokens=1), {422}),
    "300,000 stop strings": ("/generate", lambda: body(prompt="a", stop=["ab"] * 300_000), {422}),
    "10 MB of words": ("/generate", lambda: body(prompt="a", bad_words=["word " * 400] * 5000), {422}),
    "all the words there may be": (
        "/generate", lambda: body(prompt="a", max_tokens=5, bad_words=[f"{n} {'w' * 240}" for n in range(4096)]), {200},
    ),
    "all the breakers": (
        "/generate",
        lambda: body(prompt="a", max_tokens=2, dry_multiplier=1, dry_breakers=[f"{n}{'e' * 60}" for n in range(128)]),
        {200},
    ),
    "bans": ("/generate", lambda: body(prompt="a", banned_token_ids=[1] * 3_000_000), {422}),
    "a bias for everything": (
        "/generate", lambda: body(prompt="a", logit_bias={str(n): 1 for n in range(500_000)}), {422},
    ),
    "many parts": (
        "/v1/chat/completions",
        lambda: filled('{"messages": [{"role": "user", "content": [', '{"type": "text", "text": "a"},', '""]}]}'),
        {400},
    ),
    "many messages": (
        "/v1/chat/completions", lambda: filled('{"messages": [', '{"role": "user", "content": "a"},', "1]}"), {400}),
    "unknown fields": (
        "/generate", lambda: body(prompt="a", **{f"f{n}": n for n in range(60_000)}), {422}),
    "an enormous tool": (
        "/v1/chat/completions",
        lambda: body(messages=[{"role": "user", "content": "a"}],
                     tools=[{"type": "function", "function": {"name": "f", "description": "a" * 20_000_000}}]), {400}),
    "an enormous schema": ("/generate", lambda: body(prompt="a", json_schema={"enum": ["a"] * 2_000_000}), {422}),
    "an enormous grammar": ("/generate", lambda: body(prompt="a", grammar="\n" * 10_000_000), {422}),
    "a grammar of brackets": ("/generate", lambda: body(prompt="a", grammar="[" * 65_000), {422}),
    "a grammar of quotes": ("/v1/completions", lambda: body(prompt="a", grammar='"' + '\\"' * 32_000), {400}),
    "60,000 nested groups": (
        "/completion", lambda: body(prompt="a", grammar="root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000), {400},
    ),
    "a bounded text deep in a schema": (
        "/generate",
        lambda: body(prompt="a", max_tokens=2, json_schema={"type": "object", "properties": {"patch": {
            "type": "object", "properties": {"script": {"anyOf": [{"type": "string", "maxLength": 65_536}]}}}}}),
        {200},
    ),
    "choices": (
        "/generate", lambda: body(prompt="a", max_tokens=2, choice=[f"{n} {'c' * 200}" for n in range(1900)]), {200},
    ),
    "numbers": ("/score", lambda: filled('{"token_ids": [1', ",1", "]}"), {422}),
    "lists": ("/score", lambda: filled('{"token_ids": [1', ",[]", "]}"), {400}),
    "objects": ("/score", lambda: filled('{"pairs": [{}', ",{}", "]}"), {400}),
    "texts": ("/score", lambda: filled('{"text": [""', ',""', "]}"), {422}),
    "nulls": ("/score", lambda: filled('{"text": [null', ",null", "]}"), {422}),
    "escapes": ("/generate", lambda: filled('{"prompt": "', "\\u00e9", '"}'), {422}),
    "nesting": ("/generate", lambda: b'{"prompt": ' + b"[" * 1_000_000, {400}),
    "a huge number": ("/generate", lambda: b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", {400}),
    "a body too large": ("/generate", lambda: body(prompt="a" * 40_000_000), {413}),
    "a large report": ("/score", lambda: body(text="word " * 20_000, top=30), {200}),
    "many answers": ("/v1/completions", lambda: body(prompt=["a"] * 64, n=8, max_tokens=4, logprobs=400), {200}),
}  # fmt: skip


class Server:
    """A server in a process of its own, whose /health is asked all the time."""

    def __init__(self, checkpoint: Path) -> None:
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        command = [
            sys.executable,
            "-m",
            "topkapi.service.commands.cli",
            "serve",
            str(checkpoint),
            "--port",
            "0",
            "--no-studio",
            "--drain-seconds",
            "0",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = ""
        while "Ready" not in line:
            line = self.process.stdout.readline()
            assert line, "the server ended before it was ready"
        self.url = re.search(r"http://[\d.:]+", line)[0]  # type: ignore[index]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    @contextmanager
    def watched(self) -> Iterator[list[float]]:
        """How long each /health took, as long as the block lasts."""
        took: list[float] = []
        over = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=self.url, timeout=60) as client:
                while not over.wait(0.02):
                    began = time.monotonic()
                    assert client.get("/health").status_code == 200
                    took.append(time.monotonic() - began)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield took
        finally:
            over.set()
            thread.join()
            with httpx.Client(base_url=self.url, timeout=60) as client:
                began = time.monotonic()
                assert client.get("/health").status_code == 200
                took.append(time.monotonic() - began)


@pytest.fixture(scope="module")
def server(tiny_checkpoint) -> Iterator[Server]:
    running = Server(tiny_checkpoint("attacked"))
    yield running
    running.end()


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_freezes(server, name) -> None:
    path, make, expected = ATTACKS[name]
    content = make()
    with server.watched() as took, httpx.Client(base_url=server.url, timeout=300) as client:
        answer = client.post(path, content=content, headers=JSON)
    assert answer.status_code in expected, (answer.status_code, answer.text[:300])
    assert max(took) < SECONDS, f"/health took {max(took):.2f} s"


def test_all_at_once_nothing_freezes_and_small_requests_are_served(server) -> None:
    chosen = [ATTACKS[name] for name in ("a text to tokenize", "numbers", "texts", "escapes", "30 million characters")]
    contents = [(path, make()) for path, make, _ in chosen]

    def attack(path: str, content: bytes) -> None:
        with httpx.Client(base_url=server.url, timeout=300) as client:
            client.post(path, content=content, headers=JSON)

    threads = [threading.Thread(target=attack, args=each) for each in contents]
    with server.watched() as took, httpx.Client(base_url=server.url, timeout=300) as client:
        for thread in threads:
            thread.start()
        served = client.post("/generate", json={"prompt": "Once", "max_tokens": 4})
        others = sum(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join()
    assert served.status_code == 200 and others > 0
    assert max(took) < 2 * SECONDS, f"/health took {max(took):.2f} s"


def test_what_nobody_waits_for_ends_and_so_does_the_server(tiny_checkpoint) -> None:
    """A client that leaves in the middle of a long text, then SIGTERM while others are at it."""
    running = Server(tiny_checkpoint("left"))
    address = running.url.removeprefix("http://").split(":")
    content = body(text=["The quick brown fox jumps over the lazy dog. " * 170_000] * 3, per_token=False)
    head = (
        "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with running.watched() as took:
        for _ in range(3):
            connection = socket.create_connection((address[0], int(address[1])))
            connection.sendall(head.encode() + content)
            connection.close()
        with httpx.Client(base_url=running.url, timeout=60) as client:
            # It would have to wait for the others, were they not given up.
            answer = client.post("/tokenize", json={"text": "word " * 80_000})
        assert answer.status_code == 200
    assert max(took) < SECONDS
    connections = [socket.create_connection((address[0], int(address[1]))) for _ in range(2)]
    for connection in connections:
        connection.sendall(head.encode() + content)
    began = time.monotonic()
    assert running.end() == 0
    assert time.monotonic() - began < 5
    for connection in connections:
        connection.close()
