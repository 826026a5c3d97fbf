"""Matrices rounded to GGUF's K-quants, of which the gguf package only reads.

A row is cut into blocks of 256 numbers. Q4_K and Q5_K have eight parts of 32: a number is `d * scale * q - dmin *
minimum` with q of 4 or 5 bits, scales and minima of 6 bits, d and dmin in half precision. Q6_K has sixteen parts of 16:
a number is `d * scale * (q - 32)` with q of 6 and scales of 8 bits. Bits lie as `dequantize_blocks` of the gguf package
reads them; scales are searched for the least weighted square of the error, as llama.cpp searches them where it has no
importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256
CHUNK = 1 << 20
"""Numbers that are rounded at a time, so that what a search takes beside them stays small."""

Bytes = NDArray[np.uint8]


def quantise(data: NDArray[np.float32], kind: str) -> Bytes:
    """The bytes of `data [rows, columns]` as a `kind` of `K_QUANTS`; columns are a multiple of `BLOCK`."""
    pack = K_QUANTS[kind]
    blocks = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).reshape(-1, BLOCK)
    packed = [pack(each) for each in torch.split(blocks, CHUNK // BLOCK)]
    return np.concatenate(packed).reshape(len(data), -1)


def _with_minimum(blocks: Tensor, bits: int, start: float, steps: int) -> tuple[Tensor, Bytes]:
    """q `[blocks, 8, 32]` of values with a minimum, and the bytes of their scales.

    The quotients that are tried lie `start` to `start + steps / 10` off the one that spans a part.
    """
    parts = blocks.reshape(-1, 8, 32)
    scales, minima = _scales_and_minima(parts, 2**bits - 1, start, steps)
    d, sixths = _six_bits(scales)
    d_minimum, sixths_of_minima = _six_bits(minima)
    scale = d.float()[:, None] * sixths
    minimum = d_minimum.float()[:, None] * sixths_of_minima
    quotient = torch.where(scale > 0, 1 / scale, 0).unsqueeze(-1)
    values = ((parts + minimum.unsqueeze(-1)) * quotient).round().clamp(0, 2**bits - 1).to(torch.uint8)
    head = [_half(d), _half(d_minimum), _packed_sixths(sixths, sixths_of_minima)]
    return values, np.concatenate(head, axis=1)


def _scales_and_minima(parts: Tensor, most: int, start: float, steps: int) -> tuple[Tensor, Tensor]:
    """The scale and the (negated) minimum of each part `[…, 32]` with the least error, weighted by a number's size."""
    weight = parts.square().mean(-1, keepdim=True).sqrt() + parts.abs()
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1)
    sum_w, weighted = weight.sum(-1), weight * parts
    sum_x, square = weighted.sum(-1), (weighted * parts).sum(-1)

    def error(scale: Tensor, minimum: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, qq, xq = sums
        fitted = scale * (scale * qq + 2 * (minimum * q - xq)) + minimum * (minimum * sum_w - 2 * sum_x)
        return square + fitted

    def sums(low: Tensor, steps: float) -> tuple[Tensor, Tensor, Tensor]:
        span = (high - low).unsqueeze(-1)
        quotient = torch.where(span > 0, steps / span, 0)
        q = ((parts - low.unsqueeze(-1)) * quotient).round_().clamp_(0, most)
        weighted_q = weight * q
        return weighted_q.sum(-1), weighted_q.mul_(q).sum(-1), (weighted * q).sum(-1)

    best_scale, best_minimum = (high - low) / most, low
    best = error(best_scale, best_minimum, sums(low, most))
    for step in range(steps + 1):
        found = sums(best_minimum, most + start + 0.1 * step)
        q, qq, xq = found
        determinant = sum_w * qq - q.square()
        fits = determinant > 0
        divisor = torch.where(fits, determinant, 1)
        scale, minimum = (sum_w * xq - sum_x * q) / divisor, (qq * sum_x - q * xq) / divisor
        # Nothing is added to the smallest number; a part of positive ones has none.
        without = minimum > 0
        scale = torch.where(without, xq / qq.clamp(min=1e-30), scale)
        minimum = torch.where(without, 0, minimum)
        found_error = error(scale, minimum, found)
        better = fits & (found_error < best)
        best = torch.where(better, found_error, best)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    return best_scale.clamp(min=0), -best_minimum


def _six_bits(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """`[blocks, 8]` numbers of at least 0 as what each block multiplies, in half precision, and six bits each."""
    largest = numbers.amax(-1)
    quotient = torch.where(largest > 0, 63 / largest, 0)
    return (largest / 63).half(), (numbers * quotient[:, None]).round().clamp(0, 63)


def _packed_sixths(scales: Tensor, minima: Tensor) -> Bytes:
    """Eight scales and eight minima of six bits in twelve bytes: the upper two bits of the last four apart."""
    scale, minimum = (each.to(torch.uint8).numpy() for each in (scales, minima))
    first = scale[:, :4] | (scale[:, 4:] >> 4 << 6)
    second = minimum[:, :4] | (minimum[:, 4:] >> 4 << 6)
    third = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _half(numbers: Tensor) -> Bytes:
    halves: Bytes = numbers.half().numpy().view(np.uint8)
    return halves.reshape(len(numbers), 2)


def _nibbles(values: NDArray[np.uint8]) -> Bytes:
    """Parts `[blocks, 8, 32]`, of each two the lower four bits in one byte."""
    low = values & 15
    return (low[:, 0::2] | low[:, 1::2] << 4).astype(np.uint8).reshape(len(values), 128)


def _q4_k(blocks: Tensor) -> Bytes:
    values, head = _with_minimum(blocks, 4, -1.0, 20)
    return np.concatenate([head, _nibbles(values.numpy())], axis=1)


def _q5_k(blocks: Tensor) -> Bytes:
    found, head = _with_minimum(blocks, 5, -0.5, 15)
    values = found.numpy()
    fifth = np.bitwise_or.reduce((values >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([head, fifth, _nibbles(values)], axis=1)


def _q6_k(blocks: Tensor) -> Bytes:
    parts = blocks.reshape(-1, 16, 16)
    scales = _symmetric_scales(parts, 32)
    largest = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
    quotient = torch.where(largest != 0, -128 / largest, 0)
    d = torch.where(quotient != 0, 1 / quotient, 0).half()
    eights = (scales * quotient).round().clamp(-128, 127)
    scale = d.float() * eights
    divided = torch.where(scale != 0, 1 / scale, 0).unsqueeze(-1)
    values = (((parts * divided).round().clamp(-32, 31) + 32).to(torch.uint8)).numpy().reshape(-1, 2, 4, 32)
    low = (values[:, :, :2] & 15) | (values[:, :, 2:] & 15) << 4
    high = np.bitwise_or.reduce((values >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    own = eights.to(torch.int8).numpy().view(np.uint8)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), own, _half(d)], axis=1)


def _symmetric_scales(parts: Tensor, most: int) -> Tensor:
    """The scale of each part with the least error of q from -most to most - 1, weighted by the square of a number."""
    weight = parts.square()
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    usable = largest.abs() > 1e-15
    best = torch.full(parts.shape[:-1], -1.0)
    best_scale = torch.zeros(parts.shape[:-1])
    for step in (0, *range(-9, 0), *range(1, 10)):
        quotient = torch.where(usable, -(most + 0.1 * step) / largest, 0)
        q = (parts * quotient).round_().clamp_(-most, most - 1)
        product, square = (weight * parts * q).sum(-1), (weight * q * q).sum(-1)
        found = torch.where(square > 0, product.square() / square.clamp(min=1e-38), 0)
        better = found > best
        best = torch.where(better, found, best)
        best_scale = torch.where(better & (square > 0), product / square.clamp(min=1e-38), best_scale)
    return best_scale


K_QUANTS: dict[str, Callable[[Tensor], Bytes]] = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
"""The kinds that are made here, of blocks `[blocks, 256]`."""
