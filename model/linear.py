"""The one matrix product of the network; precision is a property of it, not of the families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Product(Protocol):
    """A product with one matrix, held in whatever form its kernel wants: `rows [M, inputs] -> [M, outputs]`.

    `input_dtype` is what the rows should come in, `held_in` names the precision of the matrix. `exact` says that a
    row's bits can't depend on how many rows are computed together, because nothing is rounded while adding.
    """

    input_dtype: torch.dtype
    held_in: str
    exact: bool

    def __call__(self, rows: Tensor) -> Tensor: ...


MakeProduct = Callable[[Tensor, Tensor | None], Product]
"""Makes the product with a matrix `[outputs, inputs]`, to which a bias `[outputs]` may be added."""


class Linear(nn.Module):
    """`x [..., inputs] -> [..., outputs]`.

    `compute_dtype` None computes in the weight's own dtype. Set to `torch.bfloat16` while the weight is float32, it
    is mixed precision made explicit: float32 master weights, bfloat16 product, gradients in float32. `outlying` says
    that a few inputs are far larger than the others, as they are behind a feed-forward's nonlinearity.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, outlying: bool = False) -> None:
        super().__init__()
        self.outlying = outlying
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.compute_dtype: torch.dtype | None = None
        self.tile: int | None = None
        self.product: Product | None = None
        self.make_product: MakeProduct | None = None
        # Trained beside the matrix while that is frozen; see `model.adapter`.
        self.adapter: nn.Module | None = None

    @property
    def input_dtype(self) -> torch.dtype:
        """What `x` is converted to."""
        return self.product.input_dtype if self.product else self.compute_dtype or self.weight.dtype

    @property
    def held_in(self) -> str:
        """The precision of the matrix: `float32`, `bfloat16`, `int8`."""
        return self.product.held_in if self.product else str(self.weight.dtype).removeprefix("torch.")

    def hold(self, make_product: MakeProduct) -> None:
        """Hold the matrix as `make_product` makes it, for inference and for good.

        The parameter keeps its shape and gives up its memory: the matrix is in one place only.
        """
        self.make_product = make_product
        self.product = make_product(self.weight.detach(), None if self.bias is None else self.bias.detach())
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.input_dtype)
        y = self._multiply(x)
        if self.adapter is None:
            return y
        adapted: Tensor = self.adapter(x, y, self)
        return adapted

    def _multiply(self, x: Tensor) -> Tensor:
        product = self.product or self._plain
        if self.tile is None:
            return product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        rows = x.flatten(0, -2)
        count = rows.shape[0]
        rows = functional.pad(rows, (0, 0, 0, -count % self.tile))
        tiles = [product(part) for part in torch.split(rows, self.tile)]
        return torch.cat(tiles)[:count].view(*x.shape[:-1], -1)

    def _plain(self, rows: Tensor) -> Tensor:
        return functional.linear(
            rows, self.weight.to(rows.dtype), None if self.bias is None else self.bias.to(rows.dtype)
        )


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make every `Linear` of `model` compute in `dtype` (None: in the dtype of its weight)."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = dtype


def stacked(linears: list[Linear]) -> Linear:
    """One `Linear` whose outputs are those of `linears` side by side."""
    device, bias = linears[0].weight.device, linears[0].bias is not None
    with torch.device("meta"):
        result = Linear(linears[0].weight.shape[1], 0, bias=bias)
    result.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
    if bias:
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        result.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    assert result.weight.device == device, "matrices that are used together lie together"
    return result
