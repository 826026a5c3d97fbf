"""Every precision on every instruction set that this machine has: `python benchmarks/precisions.py`.

GPT-2's shape with random weights, on one thread unless OMP_NUM_THREADS says otherwise: tokens a second of one stream
and of 32 (cache filled to 64), and of a prompt of 128. Each instruction set is a process of its own, since the core
chooses once; in it the precisions take turns, and the fastest run of each counts. `PyTorch` is what serves without the
core, and `PyTorch, AVX2` the same with what oneDNN has for older processors. `scalar`, which is what the others are
tested against, computes a layer of a third of the width. A `!` marks what is slower than float32, which nothing should
be; `-` is refused.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PRECISIONS = ("float32", "bfloat16", "int8", "int4", "w8a8", "w4a8")
SHAPES = {"1 stream": 1, "32 streams": 32, "prefill": 128}
FILLED, SECONDS, LEAST = 64, float(os.environ.get("SECONDS_EACH", "0.4")), 2
OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def measure() -> dict[str, dict[str, float]]:
    """Tokens a second by precision and shape, on the instruction set of this process."""
    import torch

    from topkapi.model.cache import SlotCache, Work, read, wanted_logits
    from topkapi.model.config import ModelConfig
    from topkapi.model.errors import CheckpointError
    from topkapi.model.invariance import calibrate
    from topkapi.model.quantize import quantize
    from topkapi.model.serving import prepare, stored_dtype
    from topkapi.model.transformer import Decoder, initialise
    from topkapi.service.commands.bench_model import random_checkpoint

    if os.environ.get("TOPKAPI_NATIVE") == "scalar":
        stored = Decoder(ModelConfig(
            family="gpt2", vocab_size=512, hidden_size=256, intermediate_size=1024, num_layers=1, num_heads=4,
            num_kv_heads=4, head_dim=64, context_length=1024, qkv_bias=True, output_bias=True, mlp_bias=True,
        ))  # fmt: skip
        initialise(stored, torch.Generator().manual_seed(0))
        stored.requires_grad_(False)
    else:
        stored = random_checkpoint(torch.float32).model

    def runs(precision: str) -> dict[str, Callable[[], object]]:
        kind = stored_dtype(precision)
        model: Decoder = copy.deepcopy(stored)
        if precision == "bfloat16":
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.bfloat16()
            model.tie()
        if kind == torch.int8:
            quantize(model)
        prepare(model, precision)
        calibrate(model)
        cache = SlotCache(model, slots=32, capacity=FILLED + max(SHAPES.values()))
        for slot in range(32):
            read(model, cache, [Work(slot, 0, list(range(FILLED)))])

        def step(count: int) -> None:
            works = [Work(slot, FILLED, [slot]) for slot in range(count)]
            wanted_logits(model, read(model, cache, works))

        def prompt(count: int) -> None:
            wanted_logits(model, read(model, cache, [Work(0, 0, list(range(count)))]))

        return {
            name: (lambda count=count: prompt(count)) if name == "prefill" else (lambda count=count: step(count))
            for name, count in SHAPES.items()
        }

    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        made: dict[str, dict[str, Callable[[], object]]] = {}
        for precision in PRECISIONS:
            try:
                made[precision] = runs(precision)
            except CheckpointError:
                continue
        for name, count in SHAPES.items():
            best = dict.fromkeys(made, float("inf"))
            began, rounds = time.perf_counter(), 0
            while rounds < LEAST or time.perf_counter() - began < SECONDS * len(made):
                for precision, calls in made.items():
                    started = time.perf_counter()
                    calls[name]()
                    best[precision] = min(best[precision], time.perf_counter() - started)
                rounds += 1
            for precision, seconds in best.items():
                found.setdefault(precision, {})[name] = count / seconds
    return found


def main() -> None:
    if "--worker" in sys.argv:
        print(json.dumps(measure()))
        return
    from topkapi.model.native import levels

    places: dict[str, dict[str, str]] = {level: {"TOPKAPI_NATIVE": level} for level in levels()}
    places |= {"PyTorch": {"TOPKAPI_NATIVE": "0"}, "PyTorch, AVX2": {"TOPKAPI_NATIVE": "0"} | OLDER}
    wanted = [name for name in sys.argv[1:] if name in places] or list(places)
    print("| instructions | precision | " + " | ".join(SHAPES) + " |\n|---|---|" + "---:|" * len(SHAPES))
    for name in wanted:
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | places[name]
        command = [sys.executable, __file__, "--worker"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        for precision in PRECISIONS:
            cells = [_cell(found, precision, shape) for shape in SHAPES]
            print(f"| {name} | {precision} | " + " | ".join(cells) + " |", flush=True)


def _cell(found: dict[str, Any], precision: str, shape: str) -> str:
    if precision not in found:
        return "-"
    speed = found[precision][shape]
    # Within a few percent a measurement says nothing.
    return f"{speed:,.1f}" + (" !" if speed < 0.95 * found["float32"][shape] else "")


if __name__ == "__main__":
    main()
