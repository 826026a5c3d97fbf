"""Decoding with the same weights here and with transformers' `generate`, in turn, in one process.

    python benchmarks/transformers_generate.py [CHECKPOINT] [--dtype DTYPE] [--streams N] [--tokens N] [--repeats N]

Greedy, prompts of equal length, none ends early; a single stream and `--streams` at once (transformers: one batch).
Prints tokens per second of each, and ours over theirs of each pair (median, least, greatest), by the clock and by CPU
time, which says more on a busy machine. Without a checkpoint directory, GPT-2's shape with random weights.
`--dtype int8` compares with transformers in bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from topkapi.model.storage.checkpoint import save_checkpoint
from topkapi.service.commands.bench_model import random_checkpoint
from topkapi.service.generation import Generation, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.settings import DtypeName, Settings


async def ours(model: LoadedModel, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds for all prompts at once, prefill included, by the clock and of CPU time."""
    wanted = {"temperature": 0, "max_tokens": tokens, "ignore_end_token": True}
    generations = [Generation(plan(model, [prompt], wanted)) for prompt in prompts]

    async def follow(generation: Generation) -> None:
        async with generation:
            await generation.finish()

    began = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(follow, generations))
    return time.perf_counter() - began[0], time.process_time() - began[1]


@torch.inference_mode()
def theirs(model: Any, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds for all prompts in one batch, prefill included, by the clock and of CPU time."""
    ids = torch.tensor(prompts)
    began = time.perf_counter(), time.process_time()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
        pad_token_id=0,
    )  # fmt: skip
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--dtype", default="bfloat16", choices=get_args(DtypeName))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(arguments.checkpoint or Path(scratch) / "random")
        if arguments.checkpoint is None:
            made = random_checkpoint(torch.bfloat16)
            save_checkpoint(
                directory, model=made.model, tokenizer=made.tokenizer, chat=None, generation={}, details={}
            )  # fmt: skip
        held = torch.float32 if arguments.dtype == "float32" else torch.bfloat16
        other = AutoModelForCausalLM.from_pretrained(directory, dtype=held).eval()
        models = Models(Settings.read(dtype=arguments.dtype))
        model = models.load(str(directory))
    print(f"{model.name} ({model.dtype}), {arguments.threads} threads; tokens/s, prefill included")
    generator = torch.Generator().manual_seed(0)
    for streams in (1, arguments.streams):
        shape = (streams, arguments.prompt_tokens)
        pairs = []
        # The first pair warms up and is not counted.
        for repeat in range(arguments.repeats + 1):
            prompts = torch.randint(model.checkpoint.config.vocab_size, shape, generator=generator).tolist()
            pair = asyncio.run(ours(model, prompts, arguments.tokens)), theirs(other, prompts, arguments.tokens)
            pairs += [pair] if repeat else []
        for at, measure in enumerate(("clock", "CPU")):
            mine, yours = ([streams * arguments.tokens / pair[side][at] for pair in pairs] for side in (0, 1))
            ratios = [one / other for one, other in zip(mine, yours, strict=True)]
            print(
                f"{streams:3} streams, {measure:5}: ours {statistics.median(mine):.1f}, theirs "
                f"{statistics.median(yours):.1f}; ours / theirs {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )
    models.close()


if __name__ == "__main__":
    main()
