"""`topkapi bench`: how fast a checkpoint is served, measured through the path that every request takes.

Requests go in as from HTTP and come out as text; only the socket is left out. What is compared is measured in turn
within one run and compared pair by pair, so that other work on the machine falls on both sides.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from topkapi.engine.steps import Counters
from topkapi.model.serving import stored_dtype
from topkapi.service.commands.bench_model import random_checkpoint
from topkapi.service.commands.bench_shape import LEAST_STEPS, Shape, check_shapes
from topkapi.service.commands.bench_sweep import (
    Generate,
    Measured,
    duration,
    progress,
    result,
    sweep,
    told,
)
from topkapi.service.commands.bench_times import Figure, Times, busy, load_average, unsteady
from topkapi.service.generation import Generation, plan
from topkapi.service.models import LoadedModel, Models
from topkapi.service.settings import Settings

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

FIGURES = (
    "single_tokens_per_s", "streams_tokens_per_s", "ratio", "mixed_tokens_per_s", "single_step_ms", "streams_step_ms",
    "mixed_step_ms", "prefill_tokens_per_s", "first_token_ms", "streams_first_token_ms", "outside_share",
    "service_share",
)  # fmt: skip

PLAIN: dict[str, Any] = {"temperature": 0}


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
    def measured(self) -> bool:
        """Whether enough steps had every stream at work; where texts are short, the first ends before the last has
        begun."""
        if self.begun is None or self.ended is None:
            return False
        return self.ended.steps - self.begun.steps >= LEAST_STEPS and self.ended.clock > self.begun.clock

    @property
    def tokens_per_s(self) -> float:
        return self._difference(lambda at: at.tokens) / self._difference(lambda at: at.clock)

    @property
    def step_ms(self) -> float:
        return 1000 * self._difference(lambda at: at.clock) / self._difference(lambda at: at.steps)

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
            async for delta in generation.steps():
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


async def measure(
    model: LoadedModel, shape: Shape, said: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, float] | None]:
    """Every figure, by name: rates in tokens per second, times in milliseconds, shares of the wall time.

    None for a figure that so few tokens don't give. `said` is told what is measured and how long it will still take.
    """
    values: dict[str, list[float]] = {name: [] for name in FIGURES}

    def note(**figures: float) -> None:
        for name, value in figures.items():
            values[name].append(value)

    def left(repeat: int, seconds_single: float | None = None) -> str:
        if repeat:
            each = (time.monotonic() - began) / repeat
            return f", about {duration(each * (shape.repeats - repeat))} left"
        # Many streams take less time than one after the other would.
        if seconds_single is not None:
            return f", less than {duration(seconds_single * 2 * shape.streams * shape.repeats)} left"
        return ""

    said("warming up")
    await decode(model, Shape(tokens=2, prompt_tokens=shape.prompt_tokens), 1, [PLAIN], seed=10**6)
    began = time.monotonic()
    for repeat in range(shape.repeats):
        of = f"repeat {repeat + 1} of {shape.repeats}"
        said(f"{of}{left(repeat)}")
        started = time.monotonic()
        single = await decode(model, shape, 1, [PLAIN], seed=3 * repeat)
        if not repeat:
            said(f"{of}{left(repeat, time.monotonic() - started)}")
        many = await decode(model, shape, shape.streams, [PLAIN], seed=3 * repeat + 1)
        mixed = await decode(model, shape, shape.streams, list(STRATEGIES.values()), seed=3 * repeat + 2)
        note(
            prefill_tokens_per_s=shape.prompt_tokens / single.first_token_s[0],
            first_token_ms=1000 * single.first_token_s[0],
            streams_first_token_ms=1000 * statistics.median(many.first_token_s),
        )
        if single.measured:
            note(single_tokens_per_s=single.tokens_per_s, single_step_ms=single.step_ms)
        if many.measured:
            note(streams_tokens_per_s=many.tokens_per_s, streams_step_ms=many.step_ms)
        if single.measured and many.measured:
            note(ratio=many.tokens_per_s / single.tokens_per_s)
        if mixed.measured:
            note(
                mixed_tokens_per_s=mixed.tokens_per_s,
                mixed_step_ms=mixed.step_ms,
                outside_share=mixed.outside_share,
                service_share=mixed.service_share,
            )
    return {name: asdict(Figure.of(each)) if each else None for name, each in values.items()}


def generating(model: LoadedModel) -> Generate:
    """Requests to a loaded model, from a client's view: greedy, none ends early."""
    seeds = itertools.count()

    async def follow(prompt: list[int], tokens: int, began: float) -> list[float]:
        wanted = PLAIN | {"max_tokens": tokens, "ignore_end_token": True, "seed": next(seeds)}
        times = []
        generation = Generation(plan(model, [prompt], wanted))
        async with generation:
            async for delta in generation.steps():
                if delta.token is not None:
                    times.append(time.perf_counter() - began)
        return times

    async def generate(prompts: list[list[int]], tokens: int) -> Times:
        began = time.perf_counter()
        return list(await asyncio.gather(*(follow(prompt, tokens, began) for prompt in prompts)))

    return generate


def bench(
    settings: Settings,
    location: str | None,
    streams: Sequence[int],
    shape: Shape,
    *,
    as_json: bool,
    plot: Path | None = None,
) -> int:
    """Measure the checkpoint at `location` (None: GPT-2's shape, random weights) and print a table, or JSON.

    Of several numbers of `streams`, or with a `plot`, what a client sees of each; of one, where a step's time goes too.
    """
    load = load_average()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    models = Models(settings.model_copy(update={"max_queue_seconds": 0.0}))
    try:
        with progress(as_json) as said:
            said("loading" if location else "making random weights")
            if location is None:
                model = models.add("random", random_checkpoint(stored_dtype(settings.dtype)))
            else:
                model = models.load(location)
            check_shapes(streams, shape, model.context_length, model.name, model.engine.network.slots)
            facts = {
                "parameters": model.checkpoint.config.parameter_count(),
                "dtype": model.dtype,
                "kv_cache_dtype": model.cache_dtype,
                "kernels": model.kernels,
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "deterministic": model.engine.deterministic,
            }
            if len(streams) > 1 or plot is not None:
                measured = Measured(
                    model.name, model.checkpoint.tokenizer.vocab_size, generating(model), facts
                )  # fmt: skip
                found = result(measured, shape, load, asyncio.run(sweep(measured, streams, shape, said)))
            else:
                shape = replace(shape, streams=streams[0])
                figures = asyncio.run(measure(model, shape, said))
                spreads = {name: None if each is None else Figure(**each) for name, each in figures.items()}
                found = {
                    "model": model.name, **facts, "load_average": load, **asdict(shape),
                    "warnings": busy(load) + unsteady(spreads), "figures": figures,
                }  # fmt: skip
    finally:
        models.close()
    told(found, as_json, plot, table if "figures" in found else None)
    return 0


def table(found: dict[str, Any]) -> str:
    """The figures as lines to read."""
    streams, figures = found["streams"], found["figures"]
    rows = [
        ("single stream, decode", "single_tokens_per_s", 1, "tokens/s"),
        (f"{streams} streams, decode", "streams_tokens_per_s", 1, "tokens/s"),
        (f"{streams} streams / single stream", "ratio", 1, "times"),
        (f"{streams} streams, {len(STRATEGIES)} strategies", "mixed_tokens_per_s", 1, "tokens/s"),
        ("  outside the network", "outside_share", 100, "% of the step"),
        ("  of which the service's thread", "service_share", 100, "% of the step"),
        (f"prefill of {found['prompt_tokens']} tokens", "prefill_tokens_per_s", 1, "tokens/s"),
        ("first token, alone", "first_token_ms", 1, "ms"),
        (f"first token, {streams} at once", "streams_first_token_ms", 1, "ms"),
        ("step, single stream", "single_step_ms", 1, "ms"),
        (f"step, {streams} streams", "streams_step_ms", 1, "ms"),
    ]
    lines = [
        f"{found['model']}: {found['parameters'] / 1e6:.1f}M parameters ({found['dtype']}), "
        f"kernels: {found['kernels']}, {found['threads']} threads on {found['cores']} cores, which had "
        f"{found['load_average'] or 0:.1f} busy programs in the minute before",
        f"{found['prompt_tokens']} prompt tokens, {found['tokens']} generated, {found['repeats']} repeats",
        f"{'':34s}{'median':>10s}{'least':>10s}{'greatest':>10s}",
    ]
    for label, name, factor, unit in rows:
        figure = figures[name]
        if figure is None:
            lines.append(f"{label:34s}{'not measured':>30s}")
            continue
        values = (f"{factor * figure[each]:10.1f}" for each in ("median", "least", "greatest"))
        lines.append(f"{label:34s}{''.join(values)}  {unit}")
    if any(figures[name] is None for _, name, _, _ in rows):
        lines.append(
            f"not measured: in {found['tokens']} tokens the first text ended before every stream had begun, or soon "
            "after; give more with --tokens"
        )
    return "\n".join(lines)
