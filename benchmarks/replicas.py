"""What replicas bring and cost: the same streams against one process, and against several, over HTTP.

    python -m benchmarks.replicas checkpoints/topkapi-chat --replicas 2 --streams 1 8 32 --rounds 3

One process computes with all cores, replicas with their part of them each. Servers take turns, each started anew with
nothing else running, so that what else the machine does meets both alike; printed are medians of the rounds, and the
ratio of the tokens/s. Needs `pip install 'topkapi[ray]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topkapi.service.commands.bench_shape import Shape
from topkapi.service.commands.bench_sweep import bench_server

START_SECONDS = 180


@contextlib.contextmanager
def served(checkpoint: str, *flags: str) -> Iterator[str]:
    """`topkapi serve` with these flags: its address."""
    command = [sys.executable, "-m", "topkapi.service.commands.cli", "serve", checkpoint, "--port", "0", "--no-studio"]
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen([*command, *flags], stdout=output, stderr=output, env=os.environ)
        try:
            end = time.monotonic() + START_SECONDS
            while not (found := re.search(r"Ready at (\S+)", log.read_text(errors="replace"))):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')}")
                time.sleep(0.1)
            yield found[1]
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def figures(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians of what the rounds found for one number of streams: tokens/s, and milliseconds; None where there were too
    few to tell."""
    picked = {
        "tokens/s": [row["end_to_end_tokens_per_s"]["median"] for row in rows],
        "first p50": [row["first_token_ms"]["p50"] for row in rows],
        "first p90": [row["first_token_ms"]["p90"] for row in rows],
        "between p50": [row["between_tokens_ms"]["p50"] for row in rows],
        "between p90": [row["between_tokens_ms"]["p90"] for row in rows],
    }
    return {name: None if None in found else statistics.median(found) for name, found in picked.items()}


def told(name: str, value: float | None) -> str:
    """A figure below its name."""
    return f"{'-':>{len(name)}}" if value is None else f"{value:{len(name)}.{0 if name == 'tokens/s' else 1}f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="what is served")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="of each number of streams in a round")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    shape = Shape(max(given.streams), given.tokens, given.prompt_tokens, given.repeats)
    kinds = {"one process": [], f"{given.replicas} replicas": ["--replicas", str(given.replicas)]}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number in range(given.rounds):
        for kind, flags in list(kinds.items())[:: -1 if number % 2 else 1]:
            print(f"round {number + 1} of {given.rounds}: {kind}", file=sys.stderr, flush=True)
            with served(given.checkpoint, "--dtype", given.dtype, *flags) as url:
                rows = bench_server(url, None, given.streams, shape, lambda line: None)["sweep"]
            for row in rows:
                found.setdefault((kind, row["streams"]), []).append(row)
    medians = {key: figures(rows) for key, rows in found.items()}
    if given.json:
        print(json.dumps([{"server": kind, "streams": count, **row} for (kind, count), row in medians.items()]))
        return
    print("streams  server       " + "  ".join(next(iter(medians.values()))) + "  ratio")
    for count in given.streams:
        alone = medians["one process", count]["tokens/s"]
        for kind in kinds:
            row = medians[kind, count]
            shown = "  ".join(told(name, value) for name, value in row.items())
            print(f"{count:7}  {kind:11}  {shown}  {row['tokens/s'] / alone:5.2f}")


if __name__ == "__main__":
    main()
