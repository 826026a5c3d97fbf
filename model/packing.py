"""Weights held once, in the form the kernel wants: for serving, where they are read for every token and never change.

A kernel that gets a matrix as rows copies it into blocks first, on every call: for a single token that costs more than
the product. Here the blocks are made once (oneDNN's packed weights). Matrices that read the same input are stacked.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor

from topkapi.model.linear import Linear, MakeProduct
from topkapi.model.transformer import Decoder, FeedForward, SelfAttention


class PackedProduct:
    """A float32 or bfloat16 matrix in oneDNN's blocks; computes in its own dtype."""

    exact = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.input_dtype = weight.dtype
        self.held_in = str(weight.dtype).removeprefix("torch.")
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product


def can_pack(weight: Tensor) -> bool:
    """Whether this machine computes with `weight` in blocks."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bfloat16


def pack(model: Decoder) -> None:
    """Hold every matrix of `model` for serving, where this machine has a form for that and it has none yet."""
    linears = [module for module in model.modules() if isinstance(module, Linear) and module.product is None]
    if linears and all(can_pack(linear.weight) for linear in linears):
        hold(model, lambda linear: PackedProduct)


def hold(model: Decoder, chosen: Callable[[Linear], MakeProduct]) -> None:
    """Hold every matrix of `model` that is still a plain parameter as what is `chosen` for it makes it.

    The table of the embedding stays as it is, also where the output matrix is the same: rows are looked up in it.
    """
    for module in list(model.modules()):
        if isinstance(module, SelfAttention | FeedForward):
            module.stack()
    for module in list(model.modules()):
        if isinstance(module, Linear) and module.product is None:
            module.hold(chosen(module))
