"""Install the torch release that requirements.lock pins, with whatever its build needs, and see that it imports.

    python install_torch.py [PIP ARGUMENT ...]

The lock holds what every build of torch needs. What one build alone needs, as the default one of Linux its gigabytes
of CUDA libraries, comes as torch's own dependencies. On Linux without an NVIDIA driver the CPU build is taken where its
index answers. Arguments choose another build: --extra-index-url https://download.pytorch.org/whl/cu130
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import urllib.request
from pathlib import Path

LOCK = Path(__file__).resolve().parent / "requirements.lock"
# Beside the default index, not instead of it: its builds call themselves 2.x.y+cpu, which is newer than 2.x.y.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_ARGUMENTS = ["--extra-index-url", CPU_INDEX]
ANSWER_SECONDS = 5


def has_nvidia_driver() -> bool:
    """Whether torch's CUDA build would find a driver to talk to."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/proc/driver/nvidia/version").exists()
    return True


def answers(address: str) -> bool:
    """Whether `address` can be read from here."""
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def choices(given: list[str]) -> list[list[str]]:
    """The pip arguments to try, best first: those `given`, or what suits this machine."""
    if given:
        return [given]
    if platform.system() != "Linux" or has_nvidia_driver():
        return [[]]
    return [CPU_ARGUMENTS, []] if answers(f"{CPU_INDEX}/torch/") else [[]]


def install(requirement: str, arguments: list[str]) -> bool:
    """Install `requirement` and what it depends on; returns whether that went well."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    return subprocess.run([*pip, requirement, *arguments]).returncode == 0


def main(given: list[str]) -> int:
    """Returns the exit code; what went wrong is said on standard error."""
    (requirement,) = (line for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
    for arguments in choices(given):
        print("Installing", requirement, *arguments, flush=True)
        if install(requirement, arguments):
            break
    else:
        print(f"error: {requirement} could not be installed; pip says why above", file=sys.stderr)
        return 1
    tried = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
    if tried.returncode != 0:
        last = (tried.stderr.strip().splitlines() or [f"it ended with code {tried.returncode}"])[-1]
        print(
            f'error: {requirement} is installed, but "import torch" fails: {last}\n'
            f'hint: choose another build, such as TORCH_ARGS="--extra-index-url {CPU_INDEX}"',
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
