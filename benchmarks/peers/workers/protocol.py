"""How a peer is driven: a process of its own reads what to generate, a line of JSON each, and answers when each token
came.

This file and its siblings run in the peer's own environment, which has no Topkapi (but for Topkapi's own).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[float]]]
"""Continues every prompt by so many tokens, and returns for each when its tokens came, in seconds from the start."""


def memory_mib(which: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (the most since `forget_peak`) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    return 0.0


def forget_peak() -> None:
    """Count the greatest resident memory from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def say(**what: Any) -> None:
    """One line for whoever drives this process; libraries print to standard error, as `drive` sees to."""
    print(json.dumps(what), file=_ANSWERS, flush=True)


_ANSWERS = sys.stdout


def drive(version: str, load: Callable[[], Generate]) -> None:
    """Load, say so, and generate until standard input ends. To be called when everything is imported."""
    sys.stdout = sys.stderr
    python_mib = memory_mib("VmRSS")
    started = time.perf_counter()
    generate = load()
    say(version=version, load_s=time.perf_counter() - started, python_mib=python_mib, resident_mib=memory_mib("VmRSS"))
    for line in sys.stdin:
        wanted = json.loads(line)
        forget_peak()
        times = generate(wanted["prompts"], wanted["tokens"])
        say(times=times, resident_mib=memory_mib("VmHWM"))
