"""Topkapi through its HTTP server, as N clients would use it at once: streams of server-sent events."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from topkapi.model.errors import SettingsError
from topkapi.service.commands.bench_client import Server
from topkapi.service.version import VERSION

from .engines import ROOT, Facts, Load, PeerError, check_times, environment, note_memory
from .figures import Figures, of_times

START_S = 120


class Served:
    """`topkapi serve CHECKPOINT --dtype DTYPE` with whatever else it does by default."""

    def __init__(self, name: str, checkpoint: Path, dtype: str, python_mib: float = 0.0) -> None:
        self.name, self.facts = name, Facts(python_mib=python_mib)
        self._checkpoint, self._dtype = checkpoint, dtype
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        self._port, self._seeds = _free_port(), itertools.count()

    def start(self) -> None:
        main = "import sys; from topkapi.service.commands.cli import main; sys.exit(main())"
        dtype = [] if self._dtype == "stored" else ["--dtype", self._dtype]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", main, "serve", str(self._checkpoint), "--port", str(self._port), *dtype],
            stdout=self._log, stderr=self._log, env=environment() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() - started > START_S:
                self._log.seek(0)
                raise PeerError(f"{self.name} did not start: {self._log.read()[-1500:]}")
            time.sleep(0.02)
        self.facts.load_s = time.perf_counter() - started
        self.facts.resident_mib["loaded"] = self._memory("VmRSS")
        self.facts.version = f"Topkapi {VERSION}"

    def run(self, load: Load) -> Figures:
        assert self._process is not None, "started"
        (Path("/proc") / str(self._process.pid) / "clear_refs").write_text("5")
        bodies = [
            {
                "prompt": prompt, "max_tokens": load.tokens, "temperature": 0, "ignore_end_token": True,
                "seed": next(self._seeds),
            }
            for prompt in load.prompts
        ]  # fmt: skip
        try:
            times = asyncio.run(Server("127.0.0.1", self._port).generate(bodies))
        except SettingsError as error:
            raise PeerError(f"{self.name}: {error}") from None
        check_times(self.name, times, load)
        note_memory(self.facts, load, self._memory("VmHWM"))
        return of_times(times)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._process = None
        self._log.close()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _memory(self, which: str) -> float:
        assert self._process is not None, "started"
        lines = (Path("/proc") / str(self._process.pid) / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
