"""Matrices of GGUF files in the blocks that they are stored in, which the native core computes with as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy
import torch

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
"""The kinds of blocks that the core takes, with GGUF's numbers for them. Scales within the K-quants' large blocks are
rounded to half precision when they are unpacked, which changes a weight by less than a two-thousandth."""

Rows = numpy.ndarray[Any, numpy.dtype[numpy.uint8]]


@dataclass(frozen=True)
class Blocks:
    """A matrix of `[outputs, inputs]` as `rows [outputs, bytes of a row]` of blocks of a `kind`.

    Stands for a tensor where stored ones are renamed, turned and parted; `turned` is whether that saw its transpose.
    """

    kind: str
    inputs: int
    rows: Rows
    turned: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        shape = len(self.rows), self.inputs
        return torch.Size(reversed(shape)) if self.turned else torch.Size(shape)

    @property
    def ndim(self) -> int:
        return 2

    def t(self) -> Blocks:
        """Its transpose."""
        return replace(self, turned=not self.turned)

    def contiguous(self) -> Blocks:
        """Itself."""
        return self

    def chunk(self, parts: int) -> list[Blocks]:
        """As many matrices with its rows one after another."""
        assert not self.turned, "blocks lie along the inputs"
        return [replace(self, rows=rows) for rows in numpy.split(self.rows, parts)]

    def split(self, sizes: list[int]) -> list[Blocks]:
        """Matrices of so many of its rows one after another."""
        assert not self.turned, "blocks lie along the inputs"
        return [replace(self, rows=rows) for rows in numpy.split(self.rows, list(accumulate(sizes))[:-1])]

    def __getitem__(self, order: torch.Tensor) -> Blocks:
        """The rows of these numbers, in this order."""
        assert not self.turned, "blocks lie along the inputs"
        return replace(self, rows=numpy.ascontiguousarray(self.rows[order.numpy()]))

    def interleaved(self, heads: int) -> Blocks:
        """The two halves of each head's rows one after the other, which llama's converter put in turn."""
        return self[torch.arange(len(self.rows)).view(heads, -1, 2).transpose(1, 2).flatten()]


def blocks_of(tensor: Any) -> Blocks | None:
    """A stored matrix, copied out of the file; None for a kind that is not computed with."""
    if tensor.tensor_type.name not in KINDS or len(tensor.shape) != 2:
        return None
    inputs, outputs = (int(size) for size in tensor.shape)
    return Blocks(tensor.tensor_type.name, inputs, numpy.array(tensor.data, dtype=numpy.uint8).reshape(outputs, -1))
