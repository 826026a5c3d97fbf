"""Commands in children that may be killed, several that train together (see kill_driver.py), and servers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., dict[str, Any]]


@contextmanager
def driver(scratch: Path) -> Iterator[Run]:
    """Yield a function that runs a `topkapi` command as kill_driver.py does: `run(*arguments, **request)`."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "kill_driver.py"), str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )

    def ask(*arguments: object, **options: Any) -> dict[str, Any]:
        assert process.stdin and process.stdout
        request = {"arguments": [str(argument) for argument in arguments], "port": free_port(), **options}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    assert process.stdin
    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait(10)


@contextmanager
def serving(*arguments: object, timeout: float = 300) -> Iterator[httpx.Client]:
    """A client of `topkapi serve` with these arguments, a process of its own that is ready and ends with success."""
    port = free_port()
    run = "import sys; from topkapi.service.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "serve", *map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=timeout) as client:
            end = time.monotonic() + 120
            while not is_ready(client):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            yield client
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def is_ready(client: httpx.Client) -> bool:
    """Whether the server answers that it serves."""
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
