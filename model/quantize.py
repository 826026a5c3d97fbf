"""int8: matrices held as 8-bit integers with a scale per output, inputs quantised row by row as they come.

Symmetric, by absolute maximum (LLM.int8(): Dettmers et al. 2022, without its outlier columns; ZeroQuant: Yao et al.
2022). Sums are of integers, so they are exact in every order: a row's bits can't depend on its neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache, partial

import torch
from torch import Tensor

from topkapi.model.errors import CheckpointError
from topkapi.model.packing import hold
from topkapi.model.transformer import Decoder

LARGEST = 127
# cuBLASLt multiplies int8 matrices whose sides are multiples of 8, and more than 16 rows.
CUDA_MULTIPLE = 8
CUDA_LEAST_ROWS = 32


class Int8Product(ABC):
    """`rows` float32 by a matrix of int8 with float32 scales; subclasses say how integers are multiplied.

    With `two_bytes`, what the first byte of an input leaves over is quantised too: rows whose largest number dwarfs the
    others lose little then, for twice the rows to multiply.
    """

    input_dtype = torch.float32
    held_in = "int8"
    exact = True

    def __init__(self, weight: Tensor, bias: Tensor | None, *, two_bytes: bool = False) -> None:
        self._two_bytes = two_bytes
        integers, scales = quantized(weight.float())
        self._scales, self._bias = scales.view(-1).contiguous(), bias
        self._pack(integers)

    def __call__(self, rows: Tensor) -> Tensor:
        integers, scales = quantized(rows)
        if self._two_bytes:
            rest, rest_scales = quantized(rows - integers * scales)
            high, low = self._multiply(torch.cat((integers, rest))).chunk(2)
            product = high.mul_(scales).add_(low.mul_(rest_scales))
        else:
            product = self._multiply(integers).mul_(scales)
        return product if self._bias is None else product.add_(self._bias)

    @abstractmethod
    def _pack(self, integers: Tensor) -> None:
        """Hold `integers [outputs, inputs]` the way that `_multiply` wants them."""

    @abstractmethod
    def _multiply(self, integers: Tensor) -> Tensor:
        """`integers [M, inputs]` int8 times the matrix, times the matrix's scales, float32."""


class BlockedInt8(Int8Product):
    """oneDNN's packed integers. Its kernels take unsigned rows: 128 is added, and what that adds taken off again."""

    def _pack(self, integers: Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self._zero_points = torch.zeros(len(integers), dtype=torch.int32)

    def _multiply(self, integers: Tensor) -> Tensor:
        # Adding 128 is turning the highest bit over.
        unsigned = integers.bitwise_xor_(-128).view(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned,
            1.0,
            128,
            self._packed,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product


class PlainInt8(Int8Product):
    """`torch._int_mm`, for CUDA: on a CPU it is oneDNN's product once more, or takes ten times as long as float32."""

    def _pack(self, integers: Tensor) -> None:
        self._columns = integers.t()
        if integers.device.type == "cuda" and any(side % CUDA_MULTIPLE for side in integers.shape):
            outputs, inputs = integers.shape
            raise CheckpointError(
                f"int8 on CUDA needs matrices whose sides are multiples of {CUDA_MULTIPLE}, this one is "
                f"{outputs} x {inputs}",
                hint="use --dtype bfloat16, or the CPU",
            )

    def _multiply(self, integers: Tensor) -> Tensor:
        count = len(integers)
        if integers.device.type == "cuda":
            missing = max(CUDA_LEAST_ROWS - count, -count % CUDA_MULTIPLE)
            integers = torch.nn.functional.pad(integers, (0, 0, 0, missing))
        return torch._int_mm(integers, self._columns)[:count] * self._scales


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows [M, N]` float32 as int8 `[M, N]` and scales `[M, 1]`, so that their product is `rows` up to half a scale.

    A row with NaN or infinity gets a scale that is not finite, so that what comes of it is seen to be damaged.
    """
    scales = rows.abs().amax(dim=-1, keepdim=True) / LARGEST
    # A row of zeros stays one; the smallest number keeps the division from making NaN of it.
    integers = torch.mul(rows, 1 / scales.clamp_min(1e-30)).round_().to(torch.int8)
    return integers, scales


def quantize(model: Decoder) -> None:
    """Hold every matrix of `model` as int8, for inference and for good; vectors and the embedding's table stay.

    Raises `CheckpointError` where this machine has no exact and fast product of int8 matrices, or none of these sizes.
    """
    product = int8_product(model.device.type)
    hold(model, lambda linear: partial(product, two_bytes=linear.outlying))


@cache
def int8_product(device: str) -> type[Int8Product]:
    """The int8 product that is exact and fast on `device`, found by trial: some processors saturate while they add.

    Raises `CheckpointError` where there is none. On a CPU oneDNN's is exact with VNNI and saturates without;
    what is exact there, `torch._int_mm` or the halves of each byte apart, takes as long as float32 or far longer.
    """
    product = BlockedInt8 if device == "cpu" else PlainInt8
    try:
        exact = _is_exact(product, torch.device(device))
    except (RuntimeError, NotImplementedError, AttributeError):
        exact = False
    if exact:
        return product
    raise CheckpointError(
        "int8 needs a processor that adds the products of bytes without saturating (x86 with VNNI or AMX); on this one "
        "it would be inexact, or slower than float32"
        if device == "cpu"
        else f"{device} has no exact product of int8 matrices",
        hint="leave dtype out, or use float32" if device == "cpu" else "use bfloat16 or float32",
    )


def _is_exact(make_product: type[Int8Product], device: torch.device) -> bool:
    """Whether sums as large as they get, and ordinary ones, come out as integers in float64 do."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(-LARGEST, LARGEST + 1, (48, 256), generator=generator).float()
    rows = torch.randint(-LARGEST, LARGEST + 1, (40, 256), generator=generator).float()
    # A largest element in each row makes its scale 1, so that the integers are the numbers themselves.
    matrix[0], matrix[1], rows[0], rows[1] = LARGEST, -LARGEST, LARGEST, -LARGEST
    matrix[:, 0], rows[:, 0] = LARGEST, LARGEST
    exact = (rows.double() @ matrix.double().t()).float()
    product = make_product(matrix.to(device), None)
    return all(torch.equal(product(rows[:count].to(device)).cpu(), exact[:count]) for count in (1, 2, 7, 40))
