"""What a product with one matrix costs in each form that PyTorch offers on a CPU: `python benchmarks/products.py`.

Prints, for GPT-2's matrices and for 1 to 256 rows, the fastest CPU time of one thread in milliseconds: the matrix as
rows or packed, in float32 and bfloat16; int8 through `_int_mm`, through oneDNN's packed integers and weight-only; and
of int8, what quantising the rows takes of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from topkapi.model.packing import PackedProduct
from topkapi.model.quantize import BlockedInt8, PlainInt8, quantized

SHAPES = [(768, 768), (768, 2304), (3072, 768), (768, 50_257)]
ROWS = (1, 4, 32, 256)
# More copies than the caches hold, as a network has layers.
COPIES_MEBIBYTES = 64


def milliseconds(calls: list[Callable[[], object]]) -> float:
    times = []
    for _ in range(4):
        for call in calls:
            began = time.thread_time()
            call()
            times.append(time.thread_time() - began)
    return min(times) * 1000


def plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: functional.linear(rows, weight)


def weight_only(weight: Tensor) -> Callable[[Tensor], Tensor]:
    integers, scales = quantized(weight)
    held = scales.view(-1).bfloat16()
    return lambda rows: torch._weight_int8pack_mm(rows.bfloat16(), integers, held)


def main() -> None:
    torch.set_num_threads(1)
    forms: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
        "float32": plain,
        "packed": lambda weight: PackedProduct(weight, None),
        "bfloat16": lambda weight: plain(weight.bfloat16()),
        "packed bf16": lambda weight: PackedProduct(weight.bfloat16(), None),
        "_int_mm": lambda weight: PlainInt8(weight, None),
        "packed int8": lambda weight: BlockedInt8(weight, None),
        "weight-only": weight_only,
    }
    print(f"{'inputs':>7s}{'outputs':>8s}{'rows':>5s}" + "".join(f"{name:>13s}" for name in (*forms, "quantising")))
    with torch.inference_mode():
        for inputs, outputs in SHAPES:
            copies = max(1, min(8, COPIES_MEBIBYTES * 2**20 // (inputs * outputs * 4)))
            made = {name: [make(torch.randn(outputs, inputs)) for _ in range(copies)] for name, make in forms.items()}
            for count in ROWS:
                if count > 64 and outputs > 10_000:
                    continue
                rows = torch.randn(count, inputs)
                cost = {}
                for name, products in made.items():
                    given = rows.bfloat16() if "bf" in name else rows
                    cost[name] = milliseconds([lambda each=each, given=given: each(given) for each in products])
                cost["quantising"] = milliseconds([lambda rows=rows: quantized(rows)])
                print(
                    f"{inputs:7}{outputs:8}{count:5}" + "".join(f"{each:13.3f}" for each in cost.values()), flush=True
                )


if __name__ == "__main__":
    main()
