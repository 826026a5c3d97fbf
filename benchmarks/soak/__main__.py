"""A soak: `python -m benchmarks.soak checkpoints/topkapi-chat --seconds 1800`.

Serves the checkpoint in a process of its own and asks more of it than it can do (`--overload` times what it did of
late), in every dialect, streams and whole answers, while one client in ten leaves before its answer's end, one in
twenty sends what must be refused, one in twenty reads slowly, storms of requests are cancelled at once, and another
checkpoint is loaded, asked and unloaded. Some of those who are refused wait as long as they were told and come again.

Every answer is compared with that of the idle server, which was asked before. Printed is what came of each of the
promises, and the exit code is 1 where one was not kept. Where other programs use the cores, what the server can do
changes from second to second and nobody can foretell how long anything takes: `--step-seconds 0.12` lets each pass of
the network take at least so long, as a larger one's would, so that the clock decides what can be done, not they.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.cases import MALFORMED, Case, answer_of, cases, ends, failure
from benchmarks.soak.clients import Outcome, ask, probe, send
from benchmarks.soak.verdict import Record, Verdict, verdict

LEAVING, WRONG, SLOW = 0.10, 0.05, 0.05
"""The part of the clients that leave before the end, send what must be refused, and read slowly."""

PATIENT = 0.5
"""The part of the refused ones that come again after exactly as long as they were told."""

STORM_EVERY, STORM = 15.0, 32
CHANGE_EVERY = 20.0
WINDOW = 20.0
"""Seconds whose answers tell what the server can do."""

SERVER = """
import os, sys, time
import topkapi.engine.steps as network
run, least, soaking = network.DecoderNetwork.run, float(sys.argv.pop(1)), sys.argv.pop(1)
def stretched(self, works):
    until = time.monotonic() + least
    outputs = run(self, works)
    if os.path.exists(soaking):
        time.sleep(max(0.0, until - time.monotonic()))
    return outputs
if least:
    network.DecoderNetwork.run = stretched
from topkapi.service.commands.cli import main
sys.exit(main())
"""

REFUSALS = {"anthropic": 529, "sglang": 503}
"""What a dialect's own server answers instead of 429 when there is too much to do."""


@dataclass
class Soak:
    """The state of a run."""

    url: str
    pool: list[Case]
    expected: dict[int, Any]
    overload: float
    drawn: random.Random = field(default_factory=lambda: random.Random(1))
    records: list[Record] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    finished: deque[float] = field(default_factory=deque)
    running: set[asyncio.Task[None]] = field(default_factory=set)
    memory: list[tuple[float, int]] = field(default_factory=list)
    changes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    number: int = 0
    returned: int = 0
    """Clients that came again since the last one arrived."""
    capacity: float = 0.0
    """Requests per second that the server answered when every place was taken."""

    def outcome(self, kind: str, number: int | None = None, case: Case | None = None, attempt: int = 0) -> Outcome:
        """A request that is about to be sent."""
        self.number += 1
        case = case or self.pool[self.drawn.randrange(len(self.pool)) if number is None else number]
        return Outcome(f"{kind}-{self.number}", kind, case, time.time(), attempt=attempt)

    def problem(self, what: str, outcome: Outcome) -> None:
        """Note that a promise was not kept."""
        self.problems[what] += 1
        about = f"{outcome.identifier} {outcome.case.path} {outcome.status} {outcome.headers.get('failure', '')}"
        self.examples.setdefault(what, f"{about} {json.dumps(outcome.case.body)[:300]}: {outcome.body[-600:]!r}")

    def judge(self, outcome: Outcome) -> int | None:
        """Note what came of a request; the seconds after which it may come again, if it was refused."""
        case, status = outcome.case, outcome.status
        retry_after = None
        if outcome.broken or not status:
            if outcome.kind not in ("leaving", "storm"):
                self.problem("without an end", outcome)
        elif status == REFUSALS.get(case.dialect, 429):
            told = outcome.headers.get("retry-after", "")
            retry_after = int(told) if told.isdigit() else None
            if not retry_after:
                self.problem("refused without Retry-After", outcome)
        elif status != 200:
            self.problem("5xx" if status >= 500 else "refused what is right", outcome)
        elif case.ends is not None and (failed := failure(outcome.body)):
            late = "overloaded" in failed or "longer than" in failed
            self.problem("begun, then refused" if late else "a stream failed", outcome)
        elif case.ends is not None and ends(case, outcome.body) != 1:
            self.problem("a stream without exactly one end", outcome)
        elif answer_of(case, outcome.body) != self.expected[id(case)]:
            self.problem("another answer than from the idle server", outcome)
        if status == 200:
            self.finished.append(time.monotonic())
        told_of = (outcome.identifier, outcome.kind, case.dialect, status, outcome.sent_at, outcome.seconds)
        self.records.append(Record(*told_of, retry_after, outcome.attempt))
        return retry_after

    async def client(self, attempt: int = 0, number: int | None = None) -> None:
        """One client, of a kind that chance decides."""
        kind = "again" if attempt else self._kind()
        outcome = self.outcome(kind, number, attempt=attempt)
        leave_after = self.drawn.uniform(0, 3) if kind == "leaving" else None
        await ask(self.url, outcome, leave_after=leave_after, slowly=kind == "slow")
        wait = self.judge(outcome)
        if wait is not None and (attempt or self.drawn.random() < PATIENT) and attempt < 3:
            await asyncio.sleep(wait)
            self.returned += 1
            await self.client(attempt + 1, self.pool.index(outcome.case))

    def _kind(self) -> str:
        drawn = self.drawn.random()
        return "leaving" if drawn < LEAVING else "slow" if drawn < LEAVING + SLOW else "plain"

    async def malformed(self) -> None:
        """One client whose request must be refused."""
        path, body = self.drawn.choice(MALFORMED)
        outcome = self.outcome("malformed", case=Case("", path, {}))
        await ask(self.url, outcome, raw=body)
        if outcome.broken or not 400 <= outcome.status < 500 or outcome.status == 429:
            self.problem("malformed, and not told so", outcome)
        self.records.append(
            Record(outcome.identifier, "malformed", "", outcome.status, outcome.sent_at, outcome.seconds, None, 0)
        )

    async def storm(self) -> None:
        """Many requests at once, all of them cancelled before long."""

        async def one() -> None:
            outcome = self.outcome("storm")
            await ask(self.url, outcome, leave_after=self.drawn.uniform(0, 0.5))
            self.judge(outcome)

        await asyncio.gather(*(one() for _ in range(STORM)))

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Let a coroutine go on by itself."""
        task = asyncio.get_running_loop().create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.result())

    def rate(self) -> float:
        """Requests per second: so many times what was answered of late, or at the beginning, if that was more."""
        now = time.monotonic()
        while self.finished and now - self.finished[0] > WINDOW:
            self.finished.popleft()
        return self.overload * max(self.capacity, len(self.finished) / WINDOW)


async def warm_up(soak: Soak) -> None:
    """As many clients as keep every place taken, so that it is known what the server can do."""
    until = time.monotonic() + WINDOW

    async def one() -> None:
        while time.monotonic() < until:
            outcome = soak.outcome("warming")
            await ask(soak.url, outcome)
            soak.judge(outcome)

    await asyncio.gather(*(one() for _ in range(48)))


async def arrive(soak: Soak, until: float) -> None:
    """Clients arrive at random, independently of one another."""
    while time.monotonic() < until:
        await asyncio.sleep(soak.drawn.expovariate(soak.rate()))
        if soak.returned:
            # Who comes again is part of what is offered.
            soak.returned -= 1
            continue
        soak.begin(soak.malformed() if soak.drawn.random() < WRONG else soak.client())


async def storms(soak: Soak, until: float) -> None:
    """A storm now and then."""
    while time.monotonic() + STORM_EVERY < until:
        await asyncio.sleep(STORM_EVERY)
        soak.begin(soak.storm())


async def changes(soak: Soak, second: list[Case], until: float) -> None:
    """Another checkpoint is loaded, asked and unloaded, again and again."""
    while time.monotonic() + CHANGE_EVERY < until:
        began = time.monotonic()
        for method, path, body, right in (
            ("POST", "/models", {"path": "second", "name": "second"}, 201),
            ("DELETE", "/models/second", None, 204),
        ):
            if method == "DELETE":
                asked = [soak.outcome("second", case=case) for case in soak.drawn.sample(second, 6)]
                await asyncio.gather(*(ask(soak.url, each) for each in asked))
                for each in asked:
                    soak.judge(each)
            status, said = await asyncio.to_thread(send, soak.url, method, path, body)
            soak.changes[method] += 1
            if status != right:
                soak.problem("a change failed", Outcome("change", method, Case("", path, {}), 0, status, body=said))
        await asyncio.sleep(max(0.0, CHANGE_EVERY - (time.monotonic() - began)))


async def measure(soak: Soak, process: int, until: float) -> None:
    """Look at the memory of the server once a second."""
    while time.monotonic() < until:
        text = Path(f"/proc/{process}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
        soak.memory.append((time.monotonic(), int(found[1]) * 1024 if found else 0))
        await asyncio.sleep(1)


@contextmanager
def served(options: argparse.Namespace, room: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """`topkapi serve` as a process: its address, the process, and its log."""
    log = room / "log"
    flags = ["--port", "0", "--no-studio", "--log-format", "json", "--access-log", "--model-directory", str(room)]
    flags += ["--max-queue-seconds", str(options.queue_seconds), "--write-timeout", "20", *options.flag]
    command = [sys.executable, "-c", SERVER, str(options.step_seconds), str(room / "soaking")]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "serve", f"soaked={options.checkpoint}", *flags], stderr=file)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"Ready at (http://[^ ]+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield found[1], process, log
    finally:
        process.kill()
        process.wait()


async def expectations(url: str, pool: list[Case]) -> dict[int, Any]:
    """What the idle server answers. It must answer the same when it is asked again."""
    expected = {}
    for case in pool:
        for attempt in range(2):
            outcome = await ask(url, Outcome(f"idle-{id(case)}-{attempt}", "idle", case, time.time()))
            if outcome.status != 200:
                raise SystemExit(f"the idle server refuses {case}: {outcome.body!r}")
            answer = answer_of(case, outcome.body)
            if expected.setdefault(id(case), answer) != answer:
                raise SystemExit(f"the idle server answers {case} in two ways:\n{expected[id(case)]}\n{answer}")
    return expected


async def run(options: argparse.Namespace, url: str, process: int, probed: str) -> Soak:
    """The soak itself."""
    pool, second = cases("soaked", options.cases), cases("second", 2)
    # The routes that name no checkpoint ask the first one.
    second = [case for case in second if "model" in case.body]
    status, said = send(url, "POST", "/models", {"path": "second", "name": "second"})
    if status != 201:
        raise SystemExit(said.decode())
    expected = await expectations(url, pool) | await expectations(url, second)
    send(url, "DELETE", "/models/second")
    soak = Soak(url, pool, expected, options.overload)
    prober = multiprocessing.get_context("spawn").Process(target=probe, args=(url, probed), daemon=True)
    prober.start()
    Path(probed).with_name("soaking").touch()
    await warm_up(soak)
    soak.capacity = len(soak.finished) / WINDOW
    until = time.monotonic() + options.seconds
    try:
        await asyncio.gather(
            arrive(soak, until), storms(soak, until), changes(soak, second, until), measure(soak, process, until)
        )
        while soak.running:
            await asyncio.sleep(0.1)
    finally:
        prober.kill()
    soak.changes["requests per second when warm"] = soak.capacity
    return soak


def idle_again(soak: Soak) -> None:
    """See that nothing is left of all that was asked."""
    end = time.monotonic() + 30
    while True:
        metrics = send(soak.url, "GET", "/metrics")[1].decode()
        left = re.findall(r"^topkapi_num_requests_(?:running|waiting)\{.*\} (?!0\.0)(.*)$", metrics, re.MULTILINE)
        if not left:
            return
        if time.monotonic() > end:
            soak.problems["work left when all clients were gone"] += 1
            return
        time.sleep(0.5)


def main() -> int:
    """Parse the options, run the soak, and print its verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--overload", type=float, default=1.5, help="times what the server can do [1.5]")
    parser.add_argument("--step-seconds", type=float, default=0, help="the least that a pass takes [0]")
    parser.add_argument("--queue-seconds", type=float, default=10, help="--max-queue-seconds of the server [10]")
    parser.add_argument("--cases", type=int, default=8, help="different requests of each dialect [8]")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--keep", type=Path, help="directory for the log and the times of /health")
    parser.add_argument("--flag", action="append", default=[], help="one more word for topkapi serve")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        shutil.copytree(options.checkpoint, room / "second")
        with served(options, room) as (url, process, log):
            soak = asyncio.run(run(options, url, process.pid, str(room / "health")))
            idle_again(soak)
            process.send_signal(signal.SIGTERM)
            soak.problems["the process did not end well"] += process.wait(60) != 0
        health = [float(line) for line in (room / "health").read_text().split("\n")[:-1]]
        found: Verdict = verdict(soak.records, soak.memory, health, log, options.queue_seconds)
        if options.keep:
            shutil.copytree(room, options.keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("second"))
    return told(options, soak, found)


def told(options: argparse.Namespace, soak: Soak, found: Verdict) -> int:
    """Print what came of it; the exit code."""
    broken = {what: count for what, count in (soak.problems + Counter(found.problems)).items() if count}
    figures = found.figures | {"of the run": dict(soak.changes), "load average": os.getloadavg()[2]}
    for what, figure in figures.items():
        print(f"{what:58} {figure}")
    for what, count in broken.items():
        print(f"NOT KEPT: {what}: {count} times. {soak.examples.get(what, '')}")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "not kept": broken, "seconds": options.seconds}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
