"""What guessing costs where text does not repeat, and saves where it does.

    python benchmarks/prompt_lookup.py [CHECKPOINT] [--dtype DTYPE] [--repeats N] [--tokens N] [--streams N]

The same requests run with and without prompt lookup, in turn, through the engine that serves; they give the same
tokens. Prints, per kind of text, tokens per step, the share of guesses that were right, and the time with lookup over
the time without, of each pair: median, least and greatest, by the clock and by the process's CPU time, which says more
on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from topkapi.model.serving import stored_dtype
from topkapi.service.commands.bench_model import random_checkpoint
from topkapi.service.generation import Generation, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.settings import DtypeName, Settings

LOOKUP = 10
KINDS: dict[str, dict[str, Any]] = {
    "sampled, does not repeat": {"temperature": 1.0},
    "sampled, no pair twice": {"temperature": 1.0, "no_repeat_ngram_size": 2},
    "greedy, repeats itself": {"temperature": 0},
}


async def run(model: LoadedModel, prompts: list[list[int]], parameters: dict[str, Any]) -> dict[str, Any]:
    counters = model.engine.counters
    began, busy, steps, guessed, accepted = (
        time.perf_counter(), time.process_time(), counters.steps, counters.guessed_tokens, counters.accepted_tokens
    )  # fmt: skip
    generations = [Generation(plan(model, [prompt], parameters | {"seed": at})) for at, prompt in enumerate(prompts)]

    async def follow(generation: Generation) -> list[int]:
        async with generation:
            await generation.finish()
        return [token.token_id for token in generation.outputs[0].tokens]

    tokens = await asyncio.gather(*map(follow, generations))
    return {
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
        "busy": time.process_time() - busy,
        "steps": counters.steps - steps,
        "guessed": counters.guessed_tokens - guessed,
        "accepted": counters.accepted_tokens - accepted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", help="default: random weights in GPT-2's shape")
    parser.add_argument("--dtype", default="auto", choices=get_args(DtypeName))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = Models(Settings.read(dtype=arguments.dtype))
    if arguments.checkpoint is None:
        model = models.add("random", random_checkpoint(stored_dtype(arguments.dtype)))
    else:
        model = models.load(arguments.checkpoint)
    text = model.checkpoint.tokenizer.encode("\n".join(topics[topic] for topic in sorted(topics)[:40]))
    size = arguments.prompt_tokens
    print(f"{model.name} ({model.dtype}), {arguments.streams} streams, {arguments.tokens} tokens after {size}")
    print(f"{'':28s}tokens/step  right   time: median (least to greatest)   CPU time: the same")
    for kind, parameters in KINDS.items():
        wanted = parameters | {"max_tokens": arguments.tokens, "ignore_end_token": True}
        clock, busy, steps, guessed, accepted, total = [], [], 0, 0, 0, 0
        for repeat in range(arguments.repeats):
            firsts = [
                ((repeat * arguments.streams + at) * 7 * size) % (len(text) - size) for at in range(arguments.streams)
            ]
            prompts = [text[first : first + size] for first in firsts]
            pair = {}
            for lookup in (0, LOOKUP) if repeat % 2 else (LOOKUP, 0):
                pair[lookup] = asyncio.run(run(model, prompts, wanted | {"prompt_lookup": lookup}))
            plain, guessing = pair[0], pair[LOOKUP]
            assert plain["tokens"] == guessing["tokens"], "guessing changed the tokens"
            clock.append(guessing["seconds"] / plain["seconds"])
            busy.append(guessing["busy"] / plain["busy"])
            steps += guessing["steps"]
            guessed += guessing["guessed"]
            accepted += guessing["accepted"]
            total += arguments.tokens
        right = f"{accepted / guessed:5.0%}" if guessed else " none"
        shown = [f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in (clock, busy)]
        print(f"{kind:28s}{total / steps:11.2f}  {right}   {shown[0]:31s}   {shown[1]}", flush=True)
    models.close()


if __name__ == "__main__":
    main()
