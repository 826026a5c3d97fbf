"""Commands in children that may be killed, and several that train together; see kill_driver.py."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
