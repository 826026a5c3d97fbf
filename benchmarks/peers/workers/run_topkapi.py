"""Topkapi in the process, without its server: `run_topkapi.py CHECKPOINT DTYPE`."""

from __future__ import annotations

import asyncio
import sys

from protocol import Generate, drive

from topkapi.service.commands.bench import generating
from topkapi.service.models import Models
from topkapi.service.settings import Settings
from topkapi.service.version import VERSION


def load() -> Generate:
    """As `topkapi serve` would, without limits of requests."""
    model = Models(Settings.read(dtype=None if sys.argv[2] == "stored" else sys.argv[2])).load(sys.argv[1])
    generate = generating(model)
    return lambda prompts, tokens: asyncio.run(generate(prompts, tokens))


if __name__ == "__main__":
    drive(f"Topkapi {VERSION}", load)
