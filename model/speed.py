"""How fast this machine computes with each precision: short trials, once in a process, by which one is chosen."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import get_args

import torch
from torch.nn.functional import linear

from topkapi.model import native
from topkapi.model.config import ModelConfig
from topkapi.model.packing import PackedProduct, can_pack
from topkapi.model.transformer import Decoder

WORTH_SAYING = 1.15
"""How many times as fast another precision must be for whoever serves to be told of it."""

SLOWER = 1.25
"""How many times as long as float32 a precision may take and still be offered: beside other work, ratios are off."""

# A layer of GPT-2's: its matrices are larger than the caches next to the cores. A stream's row, and those of many.
_HIDDEN, _INNER, _ROWS = 768, 3072, (1, 32)
_ROUNDS = 8


@torch.inference_mode()
def fastest(calls: list[Callable[[], object]], rounds: int = _ROUNDS) -> list[float]:
    """Seconds of the fastest of `rounds` runs of each call, which take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - began)
    return best


@cache
def pytorch_bfloat16() -> float:
    """How many times as long PyTorch takes with a bfloat16 matrix as with a float32 one, for one row or for many: on a
    processor without instructions for it, several times."""
    ratios = []
    weight = torch.full((_INNER, _HIDDEN), 0.01)
    for count in _ROWS:
        calls: list[Callable[[], object]] = []
        for held in (weight, weight.bfloat16()):
            rows = torch.ones(count, _HIDDEN, dtype=held.dtype)
            product = PackedProduct(held, None) if can_pack(held) else partial(linear, weight=held)
            calls.append(partial(product, rows))
        float32, bfloat16 = fastest(calls)
        ratios.append(bfloat16 / float32)
    return max(ratios)


@cache
def native_speed_up(held_in: native.HeldIn, other: native.HeldIn) -> float:
    """How many times as fast the native core computes one stream's token in `other` as in `held_in`."""
    before, after = fastest([_native_pass(each) for each in (held_in, other)])
    return before / after


def _native_pass(held_in: native.HeldIn) -> Callable[[], object]:
    """One layer of the native core for one token; its matrices hold the same number everywhere."""
    config = ModelConfig(
        family="gpt2", vocab_size=16, hidden_size=_HIDDEN, intermediate_size=_INNER, num_layers=1, num_heads=12,
        num_kv_heads=12, head_dim=64, context_length=16, qkv_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = Decoder(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.requires_grad_(False)
    native.hold(model, held_in)
    core = model.core
    assert core is not None, "it was just given one"
    slots = core.slots(1, 16)
    return lambda: core.run(slots, [(0, 0, [1])])


def explained(model: Decoder, dtype: str) -> str:
    """Why `model`, prepared for serving in `dtype`, is held in what it is held in, for whoever serves it."""
    held = model.held_in
    if dtype != "auto":
        return "as asked for"
    if model.core is None:
        if held == "float32" and pytorch_bfloat16() > SLOWER:
            return f"exact, and PyTorch takes {pytorch_bfloat16():.1f} times as long with bfloat16 on this machine"
        return "as stored"
    if held not in get_args(native.HeldIn):
        return "the blocks of the file"
    speed_up = native_speed_up(held, "int8")
    faster = f"; --dtype int8 would be about {speed_up:.1f} times as fast on this machine, with a small loss"
    return "as stored, without loss" + (faster if speed_up >= WORTH_SAYING and held != "int8" else "")
