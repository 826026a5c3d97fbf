"""What decode attention costs: `python benchmarks/attention.py`.

First the scores of 32 sequences in one layer of GPT-2's shape, keys as one row per token or in blocks with one row per
component. Then a step of 32 sequences of different lengths through one layer, all together or split where they differ
(`model.cache.SPLIT_NUMBERS`). One thread, median CPU time in milliseconds, the variants in turn.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from topkapi.model import cache
from topkapi.model.attention import KEY_BLOCK, LEAST_ROWS
from topkapi.model.cache import SlotCache, Work, read
from topkapi.model.config import ModelConfig
from topkapi.model.transformer import Decoder, initialise

SEQUENCES, HEADS, HEAD_DIM, CAPACITY, LAYERS = 32, 12, 64, 1024, 4


def medians(variants: dict[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name, variant in variants.items():
            began = time.thread_time()
            variant(repeat)
            times[name].append((time.thread_time() - began) * 1000)
    return {name: statistics.median(each) for name, each in times.items()}


def scores() -> None:
    as_rows = torch.randn(LAYERS, SEQUENCES, HEADS, CAPACITY, HEAD_DIM)
    blocks = torch.randn(LAYERS, SEQUENCES, HEADS, CAPACITY // KEY_BLOCK, HEAD_DIM, KEY_BLOCK)
    q = torch.randn(SEQUENCES, HEADS, LEAST_ROWS, HEAD_DIM)

    def rowed(layer: int, length: int) -> None:
        torch.matmul(q, as_rows[layer % LAYERS, :, :, :length].transpose(-1, -2))

    def blocked(layer: int, length: int) -> None:
        for at in range(0, length, KEY_BLOCK):
            torch.matmul(q, blocks[layer % LAYERS, :, :, at // KEY_BLOCK, :, : length - at])

    for length in (96, 160, 512):
        found = medians(
            {
                "rows": lambda layer, length=length: rowed(layer, length),
                "blocks": lambda layer, length=length: blocked(layer, length),
            },
            repeats=16,
        )
        print(f"scores, {length:4} keys: rows {found['rows']:.2f}, blocks {found['blocks']:.2f}", flush=True)


def lengths() -> None:
    config = ModelConfig(
        family="gpt2", vocab_size=64, hidden_size=HEADS * HEAD_DIM, intermediate_size=64, num_layers=1,
        num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM, context_length=CAPACITY,
    )  # fmt: skip
    model = Decoder(config)
    initialise(model, torch.Generator().manual_seed(0))
    slots, split = SlotCache(model, SEQUENCES), cache.SPLIT_NUMBERS
    choose = random.Random(0)
    cases = {
        "64 to 960 tokens": [choose.randint(64, 960) for _ in range(SEQUENCES)],
        "one of 900, others 60": [900] + [60] * (SEQUENCES - 1),
        "100 to 130 tokens": [choose.randint(100, 130) for _ in range(SEQUENCES)],
    }

    def step(limit: int, held: list[int], repeat: int) -> None:
        cache.SPLIT_NUMBERS = limit
        read(model, slots, [Work(slot, length + repeat, [5]) for slot, length in enumerate(held)])

    for name, held in cases.items():
        found = medians(
            {
                "together": lambda repeat, held=held: step(10**12, held, repeat),
                "split": lambda repeat, held=held: step(split, held, repeat),
            },
            repeats=12,
        )
        print(f"{name}: together {found['together']:.1f}, split {found['split']:.1f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        scores()
        lengths()
