"""The device a run computes on: with how many threads, and with how much memory at most.

Freed memory stays the process's.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

from topkapi.model.errors import SettingsError
from topkapi.training.optimisation import distributed
from topkapi.training.recipes.recipe import TrainingRecipe

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


# For mallopt(3) of glibc: never give back the end of the heap, let it grow by so much, take no block from elsewhere.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEPT = {_M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 1 << 28, _M_MMAP_MAX: 0}


def keep_freed_memory() -> None:
    """Let large blocks that are freed be taken again, instead of the system's anew.

    A training step frees and takes gigabytes, and every new page of them is cleared by the system first: a fifth of a
    step's time on a CPU.
    """
    if (library := _glibc()) is not None:
        for parameter, value in _KEPT.items():
            library.mallopt(parameter, value)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


class PeakMemory:
    """The most memory taken since `reset`, in bytes. Where the system cannot forget a peak (macOS), since the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Begin anew from what is taken now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        if (library := _glibc()) is not None:
            library.malloc_trim(0)
        try:
            _CLEAR.write_text("5")
        except OSError:
            pass

    def bytes(self) -> int:
        """The peak."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        if (peak := _status("VmHWM")) is not None:
            return peak
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return taken if sys.platform == "darwin" else taken * 1024


def memory_for_a_run(device: torch.device) -> int:
    """Bytes that this process could take in all: what is free and what it has already, within its container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    found = total if available is None else available + (_status("VmRSS") or 0)
    for path in _GROUP_LIMITS:
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            found = min(found, int(limit))
    return found


def _status(name: str) -> int | None:
    return _field(_STATUS, name)


def _field(path: Path, name: str) -> int | None:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def prepare_torch(recipe: TrainingRecipe, threads: int | None = None) -> torch.device:
    """Set the number of threads (`threads` of a resumed run wins) and choose the device."""
    wanted = threads or recipe.threads
    if wanted:
        torch.set_num_threads(wanted)
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise SettingsError(f"device {name!r} is not supported", field="device", hint="use cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("there is no CUDA device", field="device", hint="use --device cpu")
    if name == "cuda" and distributed.size() > 1:
        # Each process its own device, which NCCL wants to be the current one.
        number, there = distributed.local_rank(), torch.cuda.device_count()
        if number >= there:
            raise SettingsError(
                f"torchrun started more processes than this machine has CUDA devices ({there})",
                field="device",
                hint=f"use --nproc-per-node {there}",
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)
