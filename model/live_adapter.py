"""LoRA beside a network that is served: rows of one pass have different adapters, or none.

Each row's sums are of its own adapter's numbers alone and in one order, so that its bits do not depend on what is read
beside it. The native core computes them where there is one (`model/native/passes.cpp`), else what stands here, which
is the reference that tests hold the core to. Numbers are float32 whatever the network's matrices are held in.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from topkapi.model.linear import Linear
from topkapi.model.transformer import Block, Decoder

# Rows that PyTorch multiplies together, always as many: its sums depend on how many there are.
TILE = 16
LANES = 16
"""What the core rounds the rank, and outputs, up to."""

LowRank = tuple[Tensor, Tensor]
"""`down [rank, inputs]` and `up [outputs, rank]` of one matrix; the adapter's scale is part of the latter."""

_numbers = itertools.count(1)


class LiveAdapter:
    """An adapter as the network it is for computes it.

    `number` is this one's alone: keys and values that were computed with it are of no use to any other, not even to the
    same files loaded anew. `matrices` are by names of `Decoder`'s modules, such as `layers.0.self_attn.q_proj`.
    """

    def __init__(self, model: Decoder, matrices: Mapping[str, LowRank]) -> None:
        self.number = next(_numbers)
        self.core = None if model.core is None else model.core.adapter(matrices)
        self.products: dict[str, tuple[Linear, Linear]] = {}
        if model.core is None:
            _make_places(model)
            self.products = {
                name: (_product(down, model.device), _product(up, model.device))
                for name, (down, up) in matrices.items()
            }


def memory_bytes(matrices: Mapping[str, LowRank]) -> int:
    """About how many bytes a live adapter of these matrices takes."""
    total = 0
    for down, up in matrices.values():
        rank, inputs = down.shape
        total += inputs * _rounded(rank) + _rounded(len(up)) * rank
    return total * torch.float32.itemsize


def _rounded(value: int) -> int:
    return -(-value // LANES) * LANES


def _product(matrix: Tensor, device: torch.device) -> Linear:
    outputs, inputs = matrix.shape
    with torch.device("meta"):
        product = Linear(inputs, outputs)
    product.weight = nn.Parameter(matrix.detach().to(device, torch.float32).contiguous(), requires_grad=False)
    product.tile = TILE if _same_anywhere(product) else 1
    return product


def _same_anywhere(product: Linear) -> bool:
    """Whether a row's bits are the same wherever it stands among `TILE` rows; alone they always are."""
    rows = torch.randn(TILE, product.weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows = rows.to(product.weight.device)
    results = product(rows)
    return all(torch.equal(product(rows.roll(by, 0)).roll(-by, 0), results) for by in (1, 3, TILE // 2))


Groups = Sequence[tuple[Tensor, LiveAdapter]]
"""Rows of a pass `[n]` int64, and the adapter that they have."""


class _Pass(threading.local):
    """What the pass on this thread mixes. Other threads run passes of the same network meanwhile."""

    groups: Groups = ()


_pass = _Pass()


@contextmanager
def mixing(groups: Groups) -> Iterator[None]:
    """What PyTorch computes within has these adapters on these of its rows."""
    _pass.groups = groups
    try:
        yield
    finally:
        _pass.groups = ()


class Place(nn.Module):
    """What stands beside a `Linear` whose outputs are those of the modules `names`, `sizes` of them each."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__()
        self.names, self.sizes = tuple(names), tuple(sizes)

    def forward(self, x: Tensor, y: Tensor, linear: Linear) -> Tensor:
        """`x [..., inputs]` and what `linear` made of it, `y [..., outputs]` -> the same with adapters in it."""
        if not _pass.groups:
            return y
        rows, results = x.flatten(0, -2), y.flatten(0, -2).clone()
        for numbers, adapter in _pass.groups:
            given, end = rows[numbers].float(), 0
            for name, size in zip(self.names, self.sizes, strict=True):
                begin, end = end, end + size
                if name in adapter.products:
                    down, up = adapter.products[name]
                    added = results[numbers, begin:end].float() + up(down(given))
                    results[numbers, begin:end] = added.to(results.dtype)
        return results.view(y.shape)


def _make_places(model: Decoder) -> None:
    """Have every matrix of the layers look for adapters, if they don't yet."""
    config = model.config
    for number, layer in enumerate(model.layers):
        block = cast(Block, layer)
        attention, mlp, at = block.self_attn, block.mlp, f"layers.{number}"
        projections = dict(zip(("q_proj", "k_proj", "v_proj"), attention.sizes, strict=True))
        inner = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        _make_place(attention, f"{at}.self_attn", projections, attention.qkv_proj)
        _make_place(attention, f"{at}.self_attn", {"o_proj": config.hidden_size})
        _make_place(mlp, f"{at}.mlp", inner, mlp.gate_up_proj)
        _make_place(mlp, f"{at}.mlp", {"down_proj": config.hidden_size})


def _make_place(owner: nn.Module, at: str, sizes: Mapping[str, int], stacked: Linear | None = None) -> None:
    """One beside each matrix of `owner` that `sizes` names, or beside what they were `stacked` to."""
    if stacked is not None:
        places = [(stacked, list(sizes))]
    else:
        # A family without a gate has none here.
        places = [(linear, [name]) for name in sizes if (linear := getattr(owner, name)) is not None]
    for linear, names in places:
        if linear.adapter is None:
            linear.adapter = Place([f"{at}.{name}" for name in names], [sizes[name] for name in names])
