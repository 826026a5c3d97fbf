"""`topkapi bench` over several numbers of streams, in this process or against a running server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError
from topkapi.service.commands.bench_client import Server
from topkapi.service.commands.bench_shape import Shape, check_shapes
from topkapi.service.commands.bench_times import (
    PERCENTS,
    Figure,
    Times,
    busy,
    decode_rate,
    end_to_end_rate,
    gaps,
    load_average,
    percentiles,
    unsteady,
)

Generate = Callable[[list[list[int]], int], Awaitable[Times]]
"""Continues all prompts at once by so many tokens, and returns when the tokens of each came."""


@dataclass(frozen=True)
class Measured:
    """What is measured: its name, the size of its vocabulary, how it generates, and what else there is to say of it."""

    name: str
    vocabulary: int
    generate: Generate
    facts: dict[str, Any]


async def over_http(server: Server, name: str | None, streams: Sequence[int], shape: Shape) -> Measured:
    """The model called `name` (None: the first one) of a running server. Raises `SettingsError` where it isn't there or
    has no room for the shape."""
    models = {each["name"]: each for each in await server.models()}
    if not models or (name is not None and name not in models):
        raise SettingsError(
            f"{server} serves {', '.join(models) or 'nothing'}, not {name}", field="checkpoint",
            hint="name one of these, or none for the first",
        )  # fmt: skip
    model = models[name or next(iter(models))]
    check_shapes(streams, shape, model["context_length"], model["name"])
    seeds = iter(range(10**9))

    async def generate(prompts: list[list[int]], tokens: int) -> Times:
        return await server.generate([
            {"model": model["name"], "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_end_token": True,
             "seed": next(seeds)}
            for prompt in prompts
        ])  # fmt: skip

    facts: dict[str, Any] = {name: model[name] for name in ("dtype", "kernels", "deterministic") if name in model}
    return Measured(model["name"], model["vocab_size"], generate, {"url": str(server), **facts})


async def sweep(
    measured: Measured, streams: Sequence[int], shape: Shape, said: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """The figures of each number of streams, in the order of `streams`, as they are printed as JSON.

    Each repeat goes over all numbers, so that other work on the machine falls on all of them. Raises `SettingsError`
    where a stream does not have exactly as many tokens as were asked for.
    """
    found: dict[int, list[Times]] = {count: [] for count in streams}
    chance = random.Random(0)

    def prompts(count: int) -> list[list[int]]:
        return [[chance.randrange(measured.vocabulary) for _ in range(shape.prompt_tokens)] for _ in range(count)]

    said("warming up")
    await measured.generate(prompts(1), 2)
    began = time.monotonic()
    for repeat in range(shape.repeats):
        left = (time.monotonic() - began) / repeat * (shape.repeats - repeat) if repeat else None
        for count in streams:
            said(
                f"repeat {repeat + 1} of {shape.repeats}, {count} streams"
                + (f", about {duration(left)} left" if left else "")
            )
            times = await measured.generate(prompts(count), shape.tokens)
            if any(len(each) != shape.tokens for each in times):
                got = ", ".join(sorted({str(len(each)) for each in times}))
                raise SettingsError(f"streams of {shape.tokens} tokens had {got}: nothing can be said of them")
            found[count].append(times)
    return [figures(count, found[count]) for count in streams]


def figures(streams: int, repeats: Sequence[Times]) -> dict[str, Any]:
    """Rates of the repeats and percentiles over all their streams, None for what so few don't tell."""
    decode = [rate for times in repeats if (rate := decode_rate(times)) is not None]
    first = [1000 * each[0] for times in repeats for each in times]
    between = [1000 * gap for times in repeats for gap in gaps(times)]
    return {
        "streams": streams,
        "decode_tokens_per_s": asdict(Figure.of(decode)) if len(decode) == len(repeats) else None,
        "end_to_end_tokens_per_s": asdict(Figure.of([end_to_end_rate(times) for times in repeats])),
        "first_token_ms": percentiles(first),
        "between_tokens_ms": percentiles(between),
    }


def bench_server(
    url: str, name: str | None, streams: Sequence[int], shape: Shape, said: Callable[[str], None]
) -> dict[str, Any]:
    """A sweep against a running server, as it is printed as JSON."""

    async def run() -> dict[str, Any]:
        load = load_average()
        measured = await over_http(Server.at(url), name, streams, shape)
        return result(measured, shape, load, await sweep(measured, streams, shape, said))

    return asyncio.run(run())


def result(measured: Measured, shape: Shape, load: float | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is printed as JSON: `load` is the load average before anything was measured."""
    rates = {
        f"{row['streams']} streams": None
        if row["decode_tokens_per_s"] is None
        else Figure(**row["decode_tokens_per_s"])
        for row in rows
    }
    return {
        "model": measured.name,
        **measured.facts,
        "prompt_tokens": shape.prompt_tokens,
        "tokens": shape.tokens,
        "repeats": shape.repeats,
        "load_average": load,
        "warnings": busy(load) + unsteady(rates),
        "sweep": rows,
    }


@contextlib.contextmanager
def progress(as_json: bool) -> Iterator[Callable[[str], None]]:
    """What the block says goes to standard error: one line that is rewritten on a terminal, and lines elsewhere; where
    both outputs are for programs, nothing."""
    if not sys.stderr.isatty():
        yield lambda line: None if as_json else print(line, file=sys.stderr, flush=True)
        return
    try:
        yield lambda line: print(f"\r\033[K{line} …", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """As a person would say it."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, seconds):.0f} s"


def told(
    found: dict[str, Any], as_json: bool, plot: Path | None, lines: Callable[[dict[str, Any]], str] | None = None
) -> None:
    """Print a result as JSON or as `lines` of it (None: `table`), and draw it where `plot` says. Its warnings go to
    standard error for whoever reads there; JSON has them too."""
    for warning in [] if as_json and not sys.stderr.isatty() else found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if plot is not None:
        from topkapi.service.commands.bench_plot import draw

        draw(found, plot)
    print(json.dumps(found, indent=2) if as_json else (lines or table)(found))


def table(found: dict[str, Any]) -> str:
    """The sweep as lines to read."""
    facts = [str(found[name]) for name in ("dtype", "kernels", "url") if name in found]
    lines = [
        f"{found['model']} ({', '.join(facts)})",
        f"{found['prompt_tokens']} prompt tokens, {found['tokens']} generated, {found['repeats']} repeats",
        f"{'':8s}{'decode':>9s}{'least':>9s}{'greatest':>9s}{'all':>9s}"
        f"  {'first token, ms':^26s}  {'between tokens, ms':^26s}",
        f"{'streams':8s}{'tok/s':>9s}{'':18s}{'tok/s':>9s}"
        + 2 * ("  " + " ".join(f"{f'p{percent}':>8s}" for percent in PERCENTS)),
    ]
    for row in found["sweep"]:
        decode = row["decode_tokens_per_s"] or dict.fromkeys(("median", "least", "greatest"))
        cells = [decode["median"], decode["least"], decode["greatest"], row["end_to_end_tokens_per_s"]["median"]]
        times = ["  " + " ".join(_cell(row[name][f"p{percent}"], 8) for percent in PERCENTS)
                 for name in ("first_token_ms", "between_tokens_ms")]  # fmt: skip
        lines.append(f"{row['streams']:<8d}{''.join(_cell(value, 9) for value in cells)}{''.join(times)}")
    if any(None in (row["decode_tokens_per_s"], *row["first_token_ms"].values(), *row["between_tokens_ms"].values())
           for row in found["sweep"]):  # fmt: skip
        lines.append(
            "-: too little to tell. A p90 takes 10 streams over all repeats and a p99 100 (--repeats), a decode rate a "
            "stretch with every stream at work (--tokens)"
        )
    return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.1f}"
