"""Which precision a run's products are computed in, where the machine is to decide: what it is faster at, measured."""

from __future__ import annotations

import time
from typing import Literal

import torch

from topkapi.model.linear import Linear
from topkapi.training.optimisation.device import prepare_torch
from topkapi.training.optimisation.distributed import told
from topkapi.training.recipes.recipe import TrainingRecipe
from topkapi.training.run.console import Console

Precision = Literal["fp32", "bf16"]

WORTH = 1.05
"""How many times as fast bfloat16 must be to be taken: it loses digits, and a measurement some percent."""

WARNED = 1.1
"""How many times as long bfloat16 must take for whoever asked for it to be told."""

# Rows, inputs and outputs of the product: large enough for a processor's matrix units. Each precision in turn, so
# often; and once where a few rows show that there are none, for bfloat16 then takes a second each time.
_ROWS, _SIDE, _ROUNDS = 256, 1024, 4
_FEW_ROWS, _HOPELESS = 16, 4


def settled(recipe: TrainingRecipe, console: Console) -> TrainingRecipe:
    """`recipe` with the precision that a run which begins will have for good: never `auto`.

    One that asks for `auto` takes the faster; one that asks for bfloat16 gets it, and is warned by the measured ratio
    where float32 is faster. All processes of a run decide alike.
    """
    if recipe.precision == "fp32":
        return recipe
    ratio = told(speed_up(prepare_torch(recipe)))
    if recipe.precision == "bf16":
        if ratio * WARNED < 1:
            console.warn(
                [f"bf16 takes {1 / ratio:.1f} times as long as fp32 on this machine: --precision auto or fp32"]
            )
        return recipe
    chosen = choice(ratio)
    console.message(
        f"precision {chosen}: products in bf16 take {1 / ratio:.2g} times as long as in fp32 on this machine"
    )
    return recipe.model_copy(update={"precision": chosen})


def choice(ratio: float) -> Precision:
    """The precision to train in where bfloat16 is `ratio` times as fast as float32."""
    return "bf16" if ratio >= WORTH else "fp32"


def speed_up(device: torch.device) -> float:
    """How many times as fast a product, its gradients included, is in bfloat16 as in float32 on `device`."""
    linear = Linear(_SIDE, _SIDE).to(device)
    torch.nn.init.ones_(linear.weight)
    few, many = (torch.ones(count, _SIDE, device=device, requires_grad=True) for count in (_FEW_ROWS, _ROWS))
    hopeless = _speed_up(linear, few, 2) * _HOPELESS < 1
    return _speed_up(linear, many, 1 if hopeless else _ROUNDS)


def _speed_up(linear: Linear, rows: torch.Tensor, rounds: int) -> float:
    best: dict[torch.dtype | None, float] = {}
    for _ in range(rounds):
        for dtype in (None, torch.bfloat16):
            linear.compute_dtype = dtype
            began = time.perf_counter()
            linear(rows).sum().backward()
            if rows.device.type == "cuda":
                torch.cuda.synchronize(rows.device)
            best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - began)
    return best[None] / best[torch.bfloat16]
