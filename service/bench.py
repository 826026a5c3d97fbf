"""`topkapi bench`: how fast a checkpoint is served, measured through the path that every request takes.

Requests go in as from HTTP and come out as text; only the socket is left out. What is compared is measured in turn
within one run and compared pair by pair, so that other work on the machine falls on both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any

import torch

from model.errors import SettingsError
from service.bench_model import random_checkpoint
from service.engine.steps import Counters
from service.generation import Generation, plan
from service.models import DTYPES, LoadedModel, Models
from service.settings import Settings

STRATEGIES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k, top-p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "top-p": {"top_p": 0.9},
    "min-p": {"temperature": 1.2, "min_p": 0.05},
    "typical": {"typical_p": 0.9},
    "mirostat": {"mirostat": 2},
    "penalties, DRY": {"repetition_penalty": 1.1, "dry_multiplier": 0.8, "top_p": 0.95},
    "greedy": {"temperature": 0},
}
"""Eight ways to choose a token that have little work in common."""

PLAIN: dict[str, Any] = {"temperature": 0}


@dataclass(frozen=True)
class Shape:
    """What is measured: `streams` requests of `prompt_tokens` at once, each continued by `tokens`."""

    streams: int = 32
    tokens: int = 64
    prompt_tokens: int = 64
    repeats: int = 5


@dataclass(frozen=True)
class Figure:
    """The median of the repeats, and the least and the greatest of them."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Instant:
    """What had been done at one moment, in seconds and counts."""

    clock: float
    service_cpu: float
    network: float
    steps: int
    tokens: int

    @classmethod
    def now(cls, counters: Counters) -> Instant:
        # This thread's CPU time is what detokenising, stop strings and handing out events cost.
        cpu, tokens = time.thread_time(), counters.generated_tokens
        return cls(time.perf_counter(), cpu, counters.network_seconds, counters.steps, tokens)


@dataclass
class Decoding:
    """The stretch of a run in which every stream generates: from the last first token to the first end."""

    first_token_s: list[float] = field(default_factory=list)
    begun: Instant | None = None
    ended: Instant | None = None

    def _difference(self, of: Callable[[Instant], float]) -> float:
        assert self.begun is not None and self.ended is not None, "every stream has begun and one has ended"
        return of(self.ended) - of(self.begun)

    @property
    def tokens_per_s(self) -> float:
        return self._difference(lambda at: at.tokens) / self._difference(lambda at: at.clock)

    @property
    def step_ms(self) -> float:
        return 1000 * self._difference(lambda at: at.clock) / max(1.0, self._difference(lambda at: at.steps))

    @property
    def outside_share(self) -> float:
        """Of the wall time, what was not the network: scheduling, choosing, handing out, waiting."""
        return 1 - self._difference(lambda at: at.network) / self._difference(lambda at: at.clock)

    @property
    def service_share(self) -> float:
        """CPU time of the service's thread as a share of the wall time. It runs beside the network, on another core."""
        return self._difference(lambda at: at.service_cpu) / self._difference(lambda at: at.clock)


async def decode(
    model: LoadedModel, shape: Shape, streams: int, strategies: Sequence[dict[str, Any]], seed: int
) -> Decoding:
    """Run `streams` requests at once, dealing out `strategies` in turn; their prompts have nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    found, counters = Decoding(), model.engine.counters

    def prepared(index: int, parameters: dict[str, Any]) -> Generation:
        prompt = torch.randint(model.checkpoint.config.vocab_size, (shape.prompt_tokens,), generator=generator).tolist()
        wanted = parameters | {"max_tokens": shape.tokens, "ignore_end_token": True, "seed": index}
        return Generation(plan(model, [prompt], wanted))

    async def follow(generation: Generation) -> None:
        waiting = True
        async with generation:
            async for delta in generation.deltas():
                if waiting and delta.token is not None:
                    waiting = False
                    found.first_token_s.append(time.perf_counter() - began)
                    if len(found.first_token_s) == streams:
                        found.begun = Instant.now(counters)
                if generation.outputs[0].finish_reason is not None or _last(generation, shape):
                    found.ended = found.ended or Instant.now(counters)

    generations = [prepared(index, each) for index, each in enumerate(islice(cycle(strategies), streams))]
    began = time.perf_counter()
    await asyncio.gather(*map(follow, generations))
    return found


def _last(generation: Generation, shape: Shape) -> bool:
    return len(generation.outputs[0].tokens) == shape.tokens


async def measure(model: LoadedModel, shape: Shape, said: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Every figure, by name: rates in tokens per second, times in milliseconds, shares of the wall time."""
    values: dict[str, list[float]] = {}

    def note(**measured: float) -> None:
        for name, value in measured.items():
            values.setdefault(name, []).append(value)

    await decode(model, Shape(tokens=2, prompt_tokens=shape.prompt_tokens), 1, [PLAIN], seed=10**6)
    for repeat in range(shape.repeats):
        said(f"repeat {repeat + 1} of {shape.repeats}")
        single = await decode(model, shape, 1, [PLAIN], seed=3 * repeat)
        many = await decode(model, shape, shape.streams, [PLAIN], seed=3 * repeat + 1)
        mixed = await decode(model, shape, shape.streams, list(STRATEGIES.values()), seed=3 * repeat + 2)
        note(
            single_tokens_per_s=single.tokens_per_s,
            streams_tokens_per_s=many.tokens_per_s,
            ratio=many.tokens_per_s / single.tokens_per_s,
            mixed_tokens_per_s=mixed.tokens_per_s,
            single_step_ms=single.step_ms,
            streams_step_ms=many.step_ms,
            mixed_step_ms=mixed.step_ms,
            prefill_tokens_per_s=shape.prompt_tokens / single.first_token_s[0],
            first_token_ms=1000 * single.first_token_s[0],
            streams_first_token_ms=1000 * statistics.median(many.first_token_s),
            outside_share=mixed.outside_share,
            service_share=mixed.service_share,
        )
    return {name: asdict(Figure.of(each)) for name, each in values.items()}


def check(shape: Shape, model: LoadedModel) -> None:
    """Raise `SettingsError` naming the flag for a shape that `model` has no room for."""
    context, slots = model.context_length, model.engine.network.slots
    if shape.prompt_tokens + shape.tokens > context:
        raise SettingsError(
            f"{shape.prompt_tokens} prompt tokens and {shape.tokens} more do not fit the context of {context} tokens",
            field="tokens",
            hint="give fewer with --prompt-tokens or --tokens",
        )
    if shape.streams > slots:
        raise SettingsError(
            f"{model.name} computes up to {slots} requests together, not {shape.streams}",
            field="streams",
            hint=f"give at most --streams {slots}",
        )


def bench(arguments: argparse.Namespace) -> int:
    """Measure and print a table, or JSON."""
    given = {name: value for name in ("streams", "tokens", "prompt_tokens", "repeats")
             if (value := getattr(arguments, name)) is not None}  # fmt: skip
    shape = Shape(**given)
    _at_least(shape)
    settings = Settings.read(dtype=arguments.dtype, threads=arguments.threads, draft=arguments.draft)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    models = Models(settings)
    try:
        if arguments.checkpoint is None:
            model = models.add("random", random_checkpoint(DTYPES[settings.dtype]))
        else:
            model = models.load(arguments.checkpoint)
        check(shape, model)
        result = {
            "model": model.name,
            "parameters": model.checkpoint.config.parameter_count(),
            "dtype": model.dtype,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "deterministic": model.engine.deterministic,
            **asdict(shape),
            "figures": asyncio.run(measure(model, shape)),
        }
    finally:
        models.close()
    print(json.dumps(result, indent=2) if arguments.json else table(result))
    return 0


def _at_least(shape: Shape) -> None:
    for name, least in (("streams", 1), ("tokens", 8), ("prompt_tokens", 1), ("repeats", 1)):
        if getattr(shape, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(f"{flag} must be at least {least}, not {getattr(shape, name)}", field=name)


def table(result: dict[str, Any]) -> str:
    """The figures as lines to read."""
    streams, figures = result["streams"], result["figures"]
    rows = [
        ("single stream, decode", "single_tokens_per_s", 1, "tokens/s"),
        (f"{streams} streams, decode", "streams_tokens_per_s", 1, "tokens/s"),
        (f"{streams} streams / single stream", "ratio", 1, "times"),
        (f"{streams} streams, {len(STRATEGIES)} strategies", "mixed_tokens_per_s", 1, "tokens/s"),
        ("  outside the network", "outside_share", 100, "% of the step"),
        ("  of which the service's thread", "service_share", 100, "% of the step"),
        (f"prefill of {result['prompt_tokens']} tokens", "prefill_tokens_per_s", 1, "tokens/s"),
        ("first token, alone", "first_token_ms", 1, "ms"),
        (f"first token, {streams} at once", "streams_first_token_ms", 1, "ms"),
        ("step, single stream", "single_step_ms", 1, "ms"),
        (f"step, {streams} streams", "streams_step_ms", 1, "ms"),
    ]
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.1f}M parameters ({result['dtype']}), {result['threads']} "
        f"threads on {result['cores']} cores, which had {result['load_average']:.1f} busy programs in the last minute",
        f"{result['prompt_tokens']} prompt tokens, {result['tokens']} generated, {result['repeats']} repeats",
        f"{'':34s}{'median':>10s}{'least':>10s}{'greatest':>10s}",
    ]
    for label, name, factor, unit in rows:
        values = (f"{factor * figures[name][each]:10.1f}" for each in ("median", "least", "greatest"))
        lines.append(f"{label:34s}{''.join(values)}  {unit}")
    return "\n".join(lines)
