"""What adapters cost: streams that each have one of their own, beside as many of the base, in one process.

    python -m benchmarks.adapters checkpoints/topkapi-chat --streams 8 --rank 16 --dtype int8

Rounds take turns, so that what else the machine does meets both alike; printed are medians, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch

from topkapi.engine.engine import Engine
from topkapi.engine.request import GenerateJob
from topkapi.model.adapter import named_linears
from topkapi.model.decoding.parameters import resolve
from topkapi.model.live_adapter import LiveAdapter, LowRank
from topkapi.model.serving import prepare, reading
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.transformer import Decoder


def random_adapter(model: Decoder, rank: int, seed: int) -> dict[str, LowRank]:
    """Random numbers beside every matrix of the layers; made before these are given up."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name, linear in named_linears(model):
        outputs, inputs = linear.weight.shape
        down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        matrices[name] = down, torch.randn(outputs, rank, generator=generator) * 0.01
    return matrices


def seconds(engine: Engine, adapters: Sequence[LiveAdapter | None], prompt: Sequence[int], count: int) -> float:
    """How long the streams take for `count` tokens each, their prompts read before."""
    parameters = resolve({"max_tokens": count, "seed": 1, "ignore_end_token": True})
    for number, adapter in enumerate(adapters):
        engine.submit(GenerateJob([*prompt, number + 1], parameters, adapter=adapter), lambda events: None)
    engine.step()
    began = time.perf_counter()
    while engine.step():
        pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    model = load_checkpoint(given.checkpoint, **reading(given.dtype)).model
    matrices = [random_adapter(model, given.rank, seed) for seed in range(given.streams)]
    prepare(model, given.dtype)
    own: list[LiveAdapter | None] = [LiveAdapter(model, each) for each in matrices]
    engine = Engine(model, name="bench", max_running=given.streams)
    measure = partial(seconds, engine, prompt=list(range(5, 37)), count=given.tokens)
    kinds: dict[str, list[LiveAdapter | None]] = {
        "the base": [None] * given.streams, "one adapter": own[:1] * given.streams, "one each": own,
    }  # fmt: skip
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(given.rounds + 1):
        for kind, adapters in kinds.items():
            took = measure(adapters)
            if turn:
                found[kind].append(given.streams * given.tokens / took)
    base = statistics.median(found["the base"])
    print(f"{given.checkpoint}, {model.held_in}, {given.streams} streams, rank {given.rank}: tokens per second")
    for kind, rates in found.items():
        rate = statistics.median(rates)
        print(f"  {kind}: {rate:.0f} ({min(rates):.0f} to {max(rates):.0f}), {rate / base:.2f} of the base's")


if __name__ == "__main__":
    main()
