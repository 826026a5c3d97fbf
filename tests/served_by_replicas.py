"""The HTTP suites through replicas: `SERVED_REPLICAS=2 pytest tests/service/api` serves each of their servers by
`topkapi serve --replicas 2`, in processes of its own, on one Ray that all of them share.

What compares answers can be tried so, against a copy of each checkpoint in this process. What looks into the server, or
asks for what replicas refuse, says so with the marker `one_process`, and is skipped.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import httpx

from topkapi.engine.engine import Engine
from topkapi.service.models import LoadedModel, Models
from topkapi.service.settings import Settings

REPLICAS = os.environ.get("SERVED_REPLICAS")
"""How many replicas serve the suites; None: none, the servers are in this process."""

START_SECONDS = 150
"""In which Ray, or a server on it, starts, on a busy machine too."""

MANY_CORES = 999
"""More than all replicas of a test run ask for, which share those that there are."""

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""By which Ray knows these servers: whoever else is on this machine is to run no code there."""


class Elsewhere:
    """In the place of an engine: the one that computes the answers is in another process."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"engine.{name} is in another process: mark the test one_process, and say why")


class Copies(Models):
    """The checkpoints that replicas serve, once more, for what compares; their engines are not to be had."""

    def __iter__(self) -> Iterator[LoadedModel]:
        return map(without_engine, super().__iter__())

    def get(self, name: str | None = None) -> LoadedModel:
        """As `Models.get`."""
        return without_engine(super().get(name))

    @property
    def _engines(self) -> tuple[Engine, ...]:
        return tuple(model.engine for model in super().__iter__())


def without_engine(model: LoadedModel) -> LoadedModel:
    """The checkpoint with nothing that could be taken for what computes its answers."""
    return replace(model, engine=Elsewhere())  # type: ignore[arg-type]


class Ray:
    """Ray's processes: started when they are first asked for, on loopback alone, ended with the one that starts."""

    STARTING = f"""
import sys, ray
started = ray.init(
    num_cpus={MANY_CORES}, object_store_memory=2**28, include_dashboard=False, _node_ip_address="127.0.0.1"
)
print("ray is at", started.address_info["address"], flush=True)
sys.stdin.read()
"""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """Where it listens."""
        if self._process is None:
            environment = os.environ | TOKEN | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", self.STARTING],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            self._address = _said(self._log, self._process, r"ray is at ([\d.:]+)")
        return self._address

    def end(self) -> None:
        """End it and whatever runs on it."""
        if self._process is not None:
            self._process.communicate(timeout=60)


def _said(log: Path, process: subprocess.Popen[bytes], pattern: str) -> str:
    """What the process says in its log. Fails where it ends before, or takes too long."""
    end = time.monotonic() + START_SECONDS
    while not (found := re.search(pattern, log.read_text(errors="replace"))):
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        time.sleep(0.05)
    return found[1]


@contextmanager
def serve_by_replicas(
    ray: Ray, log: Path, *checkpoints: Path, **settings: Any
) -> Iterator[tuple[str, Models, httpx.Client, Any]]:
    """`topkapi serve --replicas N` with these settings: its address, copies of its checkpoints, a client that may read
    its metrics, and what stops it."""
    chosen = Settings.read(**({"studio": False} | settings))
    copies = Copies(chosen)
    for checkpoint in checkpoints:
        copies.load(str(checkpoint))
    given = {"port": 0, "studio": False, "replicas": REPLICAS} | settings
    if "host" in given and "keys" not in given:
        given["insecure"] = True
    secret = os.environ.get("TOPKAPI_API_KEY")
    if "keys" in given:
        # Beside those of the file, for whoever waits until nothing runs.
        secret = given["api_key"] = secrets.token_hex(16)
    environment = {f"TOPKAPI_{name.upper()}": str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "topkapi.service.commands.cli", "serve", *map(str, checkpoints)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment | TOKEN | {"RAY_ADDRESS": ray.address},
        )
    try:
        url = _said(log, process, r"Ready at (http://\S+) ")
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"} if secret else {}) as watching:
            yield url, copies, watching, process.terminate
        process.terminate()
        code = process.wait(60)
        assert code == 0, f"ended with {code}: {log.read_text(errors='replace')[-3000:]}"
    finally:
        process.kill()
        process.wait()
        copies.close()
