"""What the machine is, and how fast it reads memory."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .engines import CORES

BUSY = 0.2
"""Cores that others use while nothing is measured, above which the machine is not idle."""

INSTRUCTION_SETS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "i8mm",
)


def described() -> dict[str, Any]:
    """Processor, instruction sets that matter here, cores, memory, system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for line in lines if ":" in line for key, value in [line.split(":", 1)]}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    model = f", family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return {
        "processor": name + model,
        "instruction_sets": [each for each in INSTRUCTION_SETS if each in flags],
        "cores": CORES,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
    }


def read_bandwidth(size: int, seconds: float = 1.0) -> float:
    """Bytes a second that all cores together read, going over `size` bytes again and again as a network's passes do.

    Where the last cache holds so much, that is what they read from. BLAS's product of vectors does the reading, which
    is one pass over both of its operands, and lets go of Python meanwhile.
    """
    each = size // CORES // 8
    arrays = [(np.ones(each, np.float32), np.ones(each, np.float32)) for _ in range(CORES)]
    rates, together = [], threading.Barrier(CORES)

    def read(arrays: tuple[np.ndarray, np.ndarray], passes: int) -> None:
        together.wait()
        for _ in range(passes):
            np.dot(*arrays)

    with ThreadPoolExecutor(CORES) as threads:
        passes, spent = 1, 0.0
        while spent < seconds:
            started = time.perf_counter()
            list(threads.map(read, arrays, [passes] * CORES))
            took = time.perf_counter() - started
            rates.append(passes * each * 8 * CORES / took)
            spent += took
            passes = max(passes, int(0.1 * passes / took))
    return statistics.median(rates[1:] or rates)


def cores_used(seconds: float = 1.0) -> float:
    """Cores that were at work meanwhile, on average, by whatever runs; called while nothing of ours does. (The load
    average would count what was just stopped for the measurement.)"""

    def now() -> tuple[float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        # user nice system idle iowait irq softirq steal
        return sum(fields[:8]), fields[3] + fields[4]

    try:
        (total, idle), _, (later, idle_later) = now(), time.sleep(seconds), now()
    except OSError:
        return 0.0
    return CORES * (1 - (idle_later - idle) / max(1, later - total))


if __name__ == "__main__":
    print(read_bandwidth(int(sys.argv[1])))
