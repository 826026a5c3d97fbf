"""What choosing the next tokens costs: `python benchmarks/sampling.py [--rows 32] [--vocabulary 50257] [--threads 1]`.

Prints milliseconds per step for batches of one strategy each and for a batch of all of them, on logits shaped like a
language model's (a few likely tokens, a long tail): the fastest and the median of many steps, and the median of the
CPU time of the one thread, which says more on a busy machine. `TOPKAPI_NATIVE=0` measures numpy instead of the core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from topkapi.model.decoding.choosing import choose
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.scan import Scanner
from topkapi.model.decoding.stage import Row
from topkapi.model.native import levels
from topkapi.model.native.scanning import Scanner as NativeScanner

EIGHT: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k, top-p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "top-p": {"top_p": 0.9},
    "min-p": {"temperature": 1.2, "min_p": 0.05},
    "typical": {"typical_p": 0.9},
    "mirostat": {"mirostat": 2},
    "penalties, DRY": {"repetition_penalty": 1.1, "dry_multiplier": 0.8, "dry_breakers": [[13]], "top_p": 0.95},
    "greedy": {"temperature": 0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, log-probabilities": {"logprobs": 5},
    "dynamic temperature": {"dynamic_temperature_range": 0.5, "top_p": 0.95},
    "top-n-sigma": {"top_n_sigma": 1.0},
    "eta": {"eta_cutoff": 0.002},
    "XTC": {"xtc_probability": 0.5, "min_p": 0.02},
    "n-gram": {"no_repeat_ngram_size": 3},
    "trace": {"trace": True, "top_p": 0.9},
}


def language_like(rows: int, vocabulary: int) -> torch.Tensor:
    """Probabilities that fall with a power of the rank, from -1.2 (a nucleus of thousands) to -2.2 (of a dozen)."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.linspace(1.2, 2.2, rows)[torch.randperm(rows, generator=generator)]
    logits = -slopes.unsqueeze(-1) * torch.arange(1, vocabulary + 1).log()
    logits += 0.5 * torch.randn(rows, vocabulary, generator=generator)
    return torch.stack([row[torch.randperm(vocabulary, generator=generator)] for row in logits])


def milliseconds(
    logits: torch.Tensor, rows: list[Row], steps: int, scanner: Scanner | None
) -> tuple[float, float, float]:
    """Fastest and median step, and the median of the thread's own CPU time; rows grow as in an engine."""
    times, busy = [], []
    for _ in range(steps):
        start, start_busy = time.perf_counter(), time.thread_time()
        choices = choose(logits, rows, scanner=scanner)
        times.append((time.perf_counter() - start) * 1000)
        busy.append((time.thread_time() - start_busy) * 1000)
        for row, choice in zip(rows, choices, strict=True):
            row.tokens.append(choice.token_id)
    return min(times), statistics.median(times), statistics.median(busy)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens each row has before the first step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", help="measure just the batch of this name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logits = language_like(arguments.rows, arguments.vocabulary)
    prompt = torch.randint(arguments.vocabulary, (arguments.context,)).tolist()

    def rows(requests: list[dict[str, Any]]) -> list[Row]:
        return [
            Row(resolve({"seed": at, **requests[at % len(requests)]}), list(prompt), len(prompt), end_token_ids=(0,))
            for at in range(arguments.rows)
        ]

    scanner = NativeScanner(threads=arguments.threads) if levels() else None
    how = "numpy" if scanner is None else f"the core's {levels()[-1]}"
    print(f"{arguments.rows} rows of {arguments.vocabulary}, {how}, {arguments.threads} threads: ms per step")
    print(f"{'':26s} fastest  median  median CPU")
    batches = {"all eight": list(EIGHT.values())} | {name: [request] for name, request in (EIGHT | OTHERS).items()}
    with torch.inference_mode():
        for name, requests in batches.items():
            if arguments.only not in (None, name):
                continue
            fastest, median, busy = milliseconds(logits, rows(requests), arguments.steps, scanner)
            print(f"{name:26s} {fastest:7.2f} {median:7.2f} {busy:11.2f}", flush=True)


if __name__ == "__main__":
    main()
