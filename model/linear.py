"""The one matrix product of the network; precision is a property of it, not of the families."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Module):
    """`x [..., inputs] -> [..., outputs]`.

    `compute_dtype` None computes in the weight's own dtype. Set to `torch.bfloat16` while the weight is float32, it
    is mixed precision made explicit: float32 master weights, bfloat16 product, gradients in float32.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.compute_dtype: torch.dtype | None = None
        self.tile: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.tile is None:
            return functional.linear(x.to(dtype), self.weight.to(dtype), bias)
        rows = x.to(dtype).flatten(0, -2)
        count = rows.shape[0]
        rows = functional.pad(rows, (0, 0, 0, -count % self.tile))
        parts = torch.split(rows, self.tile)
        tiles = [functional.linear(part, self.weight.to(dtype), bias) for part in parts]
        return torch.cat(tiles)[:count].view(*x.shape[:-1], -1)


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make every `Linear` of `model` compute in `dtype` (None: in the dtype of its weight)."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = dtype
