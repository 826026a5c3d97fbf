"""`topkapi serve --replicas 2` on Ray Serve, in processes of their own: one is killed while it answers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from topkapi.service.commands import launch
from topkapi.service.commands.cli import main


@pytest.mark.parametrize(("flags", "told"), [
    (["--replicas", "2"], "topkapi[ray]"),
    (["--max-replicas", "2"], "topkapi[ray]"),
    (["--replicas", "3", "--max-replicas", "2"], "--max-replicas is 2, and --replicas 3"),
    (["--replicas", "2", "--hub-models"], "with --hub-models requests load checkpoints"),
    (["--replicas", "2", "--follow"], "with --follow runs replace checkpoints"),
    (["--replicas", "0"], "--replicas must be"),
])  # fmt: skip
def test_what_replicas_cannot_have_is_said_at_once(flags, told, monkeypatch, capsys, tiny_checkpoint) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert main(["serve", str(tiny_checkpoint("alone")), "--port", "0", *flags]) == 2
    assert told in capsys.readouterr().err


@contextmanager
def served(checkpoint: Path, *flags: str) -> Iterator[str]:
    """`topkapi serve` with these flags: its address."""
    pytest.importorskip("ray", reason="needs ray[serve]")
    command = [sys.executable, "-m", "topkapi.service.commands.cli", "serve", str(checkpoint),
               "--port", "0", "--no-studio", "--threads", "1", *flags]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"Ready at (http://[\d.]+:\d+)", line):
                    break
            yield found[1]  # type: ignore[index]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            log.seek(0)
            assert "SIGTERM" not in log.read(), "Ray's handler has come first"
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def url(tiny_checkpoint: Callable[..., Path]) -> Iterator[str]:
    with served(tiny_checkpoint("ray", context=2048), "--replicas", "2") as found:
        yield found


LONG = {"prompt": "one", "max_tokens": 1500, "ignore_end_token": True, "stream": True}


def names(url: str) -> set[str]:
    return set(re.findall(r'replica="(\w+)"', httpx.get(f"{url}/metrics", timeout=30).text))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_replica_that_is_killed_takes_its_own_requests_alone(url: str) -> None:
    ends: list[tuple[str, str]] = []
    begun = threading.Barrier(9)

    def read(seed: int) -> None:
        with httpx.stream("POST", f"{url}/generate", json=LONG | {"seed": seed}, timeout=120) as answer:
            lines = answer.iter_lines()
            replica = next(lines).rpartition(":")[0].rpartition("-")[2]
            begun.wait(60)
            ends.append((replica, [line for line in lines if line.startswith("event: ")][-1]))

    assert len(before := names(url)) == 2
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for reader in readers:
        reader.start()
    begun.wait(60)
    listed = subprocess.run(["pgrep", "-f", r"^ray::.*RayReplica|^ray::ServeReplica"], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
    for reader in readers:
        reader.join(120)
    by_replica = {replica: {end for other, end in ends if other == replica} for replica, _ in ends}
    assert sorted(map(sorted, by_replica.values())) == [["event: done"], ["event: error"]]
    assert httpx.post(f"{url}/generate", json=LONG | {"stream": False, "max_tokens": 2}, timeout=60).status_code == 200
    end = time.monotonic() + 120
    while len(names(url)) < 2:
        assert time.monotonic() < end, "no replica took the place of the one that was lost"
        time.sleep(0.5)
    assert names(url) != before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_there_are_as_many_replicas_as_requests_ask_for(tiny_checkpoint: Callable[..., Path]) -> None:
    """Ray Serve looks at the mean of half a minute, and starts another one after half a minute more."""
    flags = ["--max-replicas", "2", "--requests-per-replica", "2", "--replica-seconds", "1"]
    with served(tiny_checkpoint("ray", context=2048), *flags) as url:
        over = threading.Event()
        ends: list[str] = []

        def ask(number: int) -> None:
            while not over.is_set():
                number += 100
                answer = httpx.post(f"{url}/generate", json=LONG | {"seed": number}, timeout=120)
                ends.append(re.findall("^event: .*", answer.text, re.MULTILINE)[-1])

        assert len(names(url)) == 1
        askers = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for asker in askers:
            asker.start()
        wait_for(lambda: len(names(url)) == 2)
        over.set()
        for asker in askers:
            asker.join(120)
        # One goes on asking while the other replica is ended, which ends what it has begun.
        over.clear()
        last = threading.Thread(target=ask, args=(50,))
        last.start()
        wait_for(lambda: len(names(url)) == 1)
        over.set()
        last.join(120)
        assert set(ends) == {"event: done"}


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 150
    while not done():
        assert time.monotonic() < end
        time.sleep(0.5)
