"""Each program as something that can be started, asked to continue N prompts at once, and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .figures import Figures, of_times

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PeerError(Exception):
    """A program did not do what it was asked to; the message has the end of what it said."""


@dataclass(frozen=True)
class Load:
    """What is asked for: `prompts` at once, each continued by `tokens`."""

    prompts: Sequence[Sequence[int]]
    tokens: int


@dataclass
class Facts:
    """What is known about a program once it is loaded, and the most memory it needed for each number of streams.

    `python_mib` is what Python and the libraries need before anything is loaded; 0 where there is no Python.
    """

    version: str = ""
    load_s: float = 0.0
    python_mib: float = 0.0
    resident_mib: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """One program with one set of weights."""

    name: str
    facts: Facts

    def start(self) -> None:
        """Load. Raises `PeerError`."""

    def run(self, load: Load) -> Figures:
        """Generate, and measure. Raises `PeerError`."""

    def close(self) -> None:
        """End the program."""


def environment() -> dict[str, str]:
    """That of a child: without settings that keep a program from all cores, and without a way to a model hub."""
    limits = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in limits}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "DO_NOT_TRACK"), "1")
    return kept | offline | {"TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """A script of `workers/` in the environment of `python`, kept loaded between runs, when it does nothing."""

    def __init__(self, name: str, python: Path | str, script: str, *arguments: str, ours: bool = False) -> None:
        self.name, self.facts = name, Facts()
        self._command = [str(python), str(HERE / "workers" / script), *arguments]
        self._environment = environment() | ({"PYTHONPATH": str(ROOT)} if ours else {})
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=self._environment,
        )  # fmt: skip
        said = self._answer()
        self.facts = Facts(said["version"], said["load_s"], said["python_mib"], {"loaded": said["resident_mib"]})

    def run(self, load: Load) -> Figures:
        assert self._process is not None and self._process.stdin is not None, "started"
        print(json.dumps({"prompts": load.prompts, "tokens": load.tokens}), file=self._process.stdin, flush=True)
        said = self._answer()
        check_times(self.name, said["times"], load)
        note_memory(self.facts, load, said["resident_mib"])
        return of_times(said["times"])

    def close(self) -> None:
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.communicate(timeout=20)
            self._process = None
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None, "started"
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise PeerError(f"{self.name} ended: {self._errors.read()[-1500:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaCpp:
    """A build of llama.cpp or of a fork, by its own benchmark of batches, which is run anew each time.

    It reads all prompts before it generates, and says how long each took: a first token comes when all are read. It
    chooses no tokens, which flatters it a little.
    """

    def __init__(self, name: str, build: Path, file: Path) -> None:
        self.name, self.facts, self._build, self._file = name, Facts(), build, file
        self._program = build / "bin" / "llama-batched-bench"
        self._options: list[str] = []

    def start(self) -> None:
        said = self._say("--help")
        self._options = ["-fa", "on"] if "-fa on" in said or "[on|off|auto]" in said else ["-fa", "1"]
        # The fork repacks rows at load when asked to; llama.cpp does it by itself.
        self._options += ["-rtr"] if "--run-time-repack" in said else []
        version = next((line for line in self._say("--version").splitlines() if "version" in line), "")
        self.facts = Facts(f"{self.name} {version.removeprefix('version: ')}", resident_mib={})

    def run(self, load: Load) -> Figures:
        streams, prompt = len(load.prompts), len(load.prompts[0])
        context = streams * (prompt + load.tokens) + 64
        command = [
            str(self._program), "-m", str(self._file), "-c", str(context), "-b", "2048", "-ub", "512",
            "-npp", str(prompt), "-ntg", str(load.tokens), "-npl", str(streams), "-t", str(CORES),
            *self._options, "--output-format", "jsonl",
        ]  # fmt: skip
        started = time.perf_counter()
        # The fork leaves a log where it is run.
        with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as answers:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=answers, stderr=answers, env=environment(), cwd=scratch
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - started
            answers.seek(0)
            printed = answers.read()
        said = _seconds_said(printed)
        if process.returncode or said is None:
            raise PeerError(f"{self.name}: {' '.join(command)}\n{printed[-1500:]}")
        reading, generating = said
        scale = 1024 if sys.platform.startswith("linux") else 1024**2
        note_memory(self.facts, load, usage.ru_maxrss / scale)
        generated = streams * load.tokens
        # What is neither reading nor generating: loading, and a few tokens to warm up.
        self.facts.load_s = max(0.0, seconds - reading - generating)
        return {
            "decode_tokens_per_s": generated / generating,
            "end_to_end_tokens_per_s": generated / (reading + generating),
            "first_token_p50_s": reading,
            "first_token_p99_s": reading,
        }

    def close(self) -> None:
        pass

    def _say(self, flag: str) -> str:
        try:
            # They leave a log where they run.
            with tempfile.TemporaryDirectory() as scratch:
                done = subprocess.run([self._program, flag], capture_output=True, text=True, timeout=60, cwd=scratch)
        except OSError as error:
            raise PeerError(f"{self.name}: {error}") from None
        return done.stdout + done.stderr


def _seconds_said(printed: str) -> tuple[float, float] | None:
    """How long prompts and tokens took: of an object in a line, or, as forks print it, of a row of a table."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            said = json.loads(line)
            return said["t_pp"], said["t_tg"]
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        # PP, TG, B, N_KV, T_PP s, S_PP t/s, T_TG s, S_TG t/s, T s, S t/s
        if len(cells) == 10 and cells[0].isdigit():
            return float(cells[4]), float(cells[6])
    return None


def check_times(name: str, times: Sequence[Sequence[float]], load: Load) -> None:
    """Raise `PeerError` unless each stream has exactly as many tokens as it should."""
    counts = {len(each) for each in times}
    if len(times) != len(load.prompts) or counts != {load.tokens}:
        raise PeerError(f"{name} generated {sorted(counts)} tokens, not {load.tokens}")


def note_memory(facts: Facts, load: Load, mib: float) -> None:
    streams = str(len(load.prompts))
    facts.resident_mib[streams] = max(facts.resident_mib.get(streams, 0.0), mib)
