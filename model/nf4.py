"""NF4: a matrix as 4-bit numbers with a scale for every 64 of them (QLoRA, Dettmers et al. 2023, section 3).

The 16 values are quantiles of the normal distribution, which weights nearly follow. Half a byte per number and a
float32 scale per block are 4.5 bits; the scales are not quantised again. The matrix is made anew for every product, so
that training keeps only the small form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Appendix E of the paper, as its authors' library has them."""

BLOCK = 64
_EPSILON = 1e-30


class NF4:
    """A matrix `[outputs, inputs]` in blocks of 64 numbers, row after row: the largest of each is kept exactly."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        flat = weight.detach().float().flatten()
        blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        self.scales = blocks.abs().amax(dim=1, keepdim=True)
        values = torch.tensor(VALUES, device=weight.device)
        borders = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / self.scales.clamp_min(_EPSILON), borders, out_int32=True).view(-1, 2)
        self.pairs = (codes[:, 0] * 16 + codes[:, 1]).to(torch.uint8)
        first, second = torch.meshgrid(values, values, indexing="ij")
        # What each byte stands for: its two numbers.
        self._table = torch.stack((first, second), dim=-1).view(256, 2)

    @property
    def nbytes(self) -> int:
        """Bytes that the numbers and their scales take."""
        return self.pairs.nbytes + self.scales.nbytes

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that are held, `[outputs, inputs]`."""
        blocks = functional.embedding(self.pairs.int(), self._table).view(-1, BLOCK) * self.scales
        return blocks.flatten()[: self.shape.numel()].view(self.shape).to(dtype)


class NF4Product:
    """`rows` by a matrix held as NF4, computed in `dtype` (None: the matrix's own) and differentiable in the rows."""

    held_in = "nf4"
    exact = False

    def __init__(self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype | None = None) -> None:
        self.input_dtype = dtype or weight.dtype
        self._held = NF4(weight)
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes."""
        return self._held.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        product: Tensor = _Product.apply(rows, self._held)  # type: ignore[no-untyped-call]
        return product if self._bias is None else product + self._bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """The backward pass makes the matrix again: kept from the forward one, every layer's would be there at once."""

    @staticmethod
    def forward(context: Any, rows: Tensor, held: NF4) -> Tensor:
        context.held = held
        return functional.linear(rows, held.matrix(rows.dtype))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.held.matrix(gradient.dtype), None
