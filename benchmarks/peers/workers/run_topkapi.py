"""Topkapi in the process, without its server: `run_topkapi.py CHECKPOINT DTYPE`."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time

from protocol import Generate, drive

from topkapi.service.generation import Generation, plan
from topkapi.service.models import Models
from topkapi.service.settings import Settings
from topkapi.service.version import VERSION


def load() -> Generate:
    """As `topkapi serve` would, without limits of requests."""
    model = Models(Settings.read(dtype=None if sys.argv[2] == "stored" else sys.argv[2])).load(sys.argv[1])
    seeds = itertools.count()

    async def follow(prompt: list[int], tokens: int, began: float) -> list[float]:
        wanted = {"temperature": 0, "max_tokens": tokens, "ignore_end_token": True, "seed": next(seeds)}
        times = []
        generation = Generation(plan(model, [prompt], wanted))
        async with generation:
            async for delta in generation.steps():
                if delta.token is not None:
                    times.append(time.perf_counter() - began)
        return times

    async def together(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        began = time.perf_counter()
        return list(await asyncio.gather(*(follow(prompt, tokens, began) for prompt in prompts)))

    return lambda prompts, tokens: asyncio.run(together(prompts, tokens))


if __name__ == "__main__":
    drive(f"Topkapi {VERSION}", load)
