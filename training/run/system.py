"""What the machine does during a run: processor, memory and GPU, every few seconds, into `system.jsonl`.

The file is apart from `metrics.jsonl`, which says the same whenever and wherever the run is repeated.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 5.0

Sample = Callable[[], dict[str, Any]]


@contextmanager
def recorded(
    path: Path,
    notice: Callable[[str], None],
    interval: float = INTERVAL_SECONDS,
    tell: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Iterator[None]:
    """Append a line to `path` at the beginning of the block, every `interval` seconds, and at its end, and `tell` it.

    Without psutil, `notice` is told so and nothing is recorded.
    """
    try:
        sample = sampler()
    except ImportError:
        notice("system metrics are not recorded: pip install 'topkapi[train]'")
        yield
        return
    ended = threading.Event()

    def record() -> None:
        found = {"time": round(time.time(), 3), **sample()}
        tell(found)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
        except OSError:
            # A full disk stops the run at its next save; this file is not worth it.
            pass

    def keep_recording() -> None:
        while not ended.wait(interval):
            record()

    record()
    thread = threading.Thread(target=keep_recording, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        record()


def sampler() -> Sample:
    """A function that looks at the machine once. Raises `ImportError` without psutil.

    Percentages of all processors (`cpu_percent`, since the call before) and of this process (100 is one core), bytes of
    memory, and for each GPU that NVML sees its use in percent, memory in bytes and power in watts.
    """
    import psutil  # type: ignore[import-untyped]

    process, gpus = psutil.Process(), _gpus()
    psutil.cpu_percent()
    process.cpu_percent()

    def sample() -> dict[str, Any]:
        found: dict[str, Any] = {
            "cpu_percent": psutil.cpu_percent(),
            "process_cpu_percent": process.cpu_percent(),
            "process_memory": process.memory_info().rss,
            "memory_available": psutil.virtual_memory().available,
        }
        if gpus:
            found["gpus"] = [gpu() for gpu in gpus]
        return found

    return sample


def _gpus() -> list[Sample]:
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        # No driver, or no GPU.
        return []


def _gpu(nvml: Any, handle: Any) -> Sample:
    # Some of these are not there on some devices, or not for every user.
    questions: dict[str, Callable[[], float]] = {
        "use_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_used": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }

    def sample() -> dict[str, Any]:
        found: dict[str, Any] = {"name": nvml.nvmlDeviceGetName(handle)}
        for name, ask in questions.items():
            try:
                found[name] = ask()
            except nvml.NVMLError:
                found[name] = None
        return found

    return sample
