"""Causal attention for training on a processor, a tile of queries at a time.

A tile sees no key behind its last query, so half of the products are never made; the weights of a tile stay in the
caches, and are kept in the precision of the products for the gradient. An operator of its own, so that a compiled
network calls it instead of unrolling its tiles for every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.transformer import causal_attention

# Queries per tile; see docs/LOG.md.
TILE = 128


def training_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """What `causal_attention` computes, in whichever way is the fastest where the tensors are."""
    if dropout or q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return causal_attention(layer, q, k, v, dropout=dropout)
    return tiled_attention(layer, q, k, v)


def tiled_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without dropout, as `causal_attention` takes and returns it.

    In bfloat16 it is faster than PyTorch 2.13's on a processor, in float32 mostly slower.
    """
    mixed: Tensor = _forward(q, k, v)[0]
    return mixed


@torch.library.custom_op("topkapi::tiled_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`q [B, H, T, D]`, `k` and `v [B, K, T, D]` with K key-value heads -> `[B, H, T, D]` and the weights of all tiles,
    one after another.

    The heads of a group stand below one another in every product, so that keys and values are not repeated for them.
    """
    batch, heads, length, size = q.shape
    groups = k.shape[1]
    scaled = _grouped(q, groups)
    mixed = torch.empty_like(scaled)
    kept = q.new_empty(_weight_count(q))
    ahead = torch.full((TILE, TILE), float("-inf"), dtype=q.dtype).triu_(1)
    for (start, end), weights in zip(_tiles(length), _weights(kept, q, groups), strict=True):
        scores = torch.matmul(_rows(scaled, start, end), k[:, :, :end].transpose(2, 3))
        own = scores.view(batch, groups, -1, end - start, end)[..., start:]
        own.add_(ahead[: end - start, : end - start])
        torch.softmax(scores, dim=-1, out=weights)
        mixed[..., start:end, :] = torch.matmul(weights, v[:, :, :end]).view(batch, groups, -1, end - start, size)
    return mixed.view(batch, heads, length, size), kept


@torch.library.custom_op("topkapi::tiled_attention_backward", mutates_args=())
def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `q`, `k` and `v` from that of the result."""
    groups, (length, size) = k.shape[1], q.shape[2:]
    scaled = _grouped(q, groups)
    gradient = gradient.reshape(scaled.shape)
    of_q = torch.empty_like(scaled)
    # A key's gradient is a sum over tiles: in float32.
    of_k, of_v = (torch.zeros(each.shape, dtype=torch.float32) for each in (k, v))
    for (start, end), weights in zip(_tiles(length), _weights(kept, q, groups), strict=True):
        below = _rows(gradient, start, end)
        of_v[:, :, :end] += torch.matmul(weights.transpose(2, 3), below)
        of_weights = torch.matmul(below, v[:, :, :end].transpose(2, 3))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_k[:, :, :end] += torch.matmul(of_scores.transpose(2, 3), _rows(scaled, start, end))
        rows = torch.matmul(of_scores, k[:, :, :end])
        of_q[..., start:end, :] = rows.view(*scaled.shape[:3], end - start, size)
    of_q.mul_(size**-0.5)
    return of_q.view(q.shape), of_k.to(k.dtype), of_v.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_weight_count(q))


@_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(gradient, *context.saved_tensors)
    return gradients


_forward.register_autograd(_gradients, setup_context=_keep)


def _grouped(q: Tensor, groups: int) -> Tensor:
    """Scaled queries `[B, K, H / K, T, D]`, contiguous."""
    batch, heads, length, size = q.shape
    scaled: Tensor = q * size**-0.5
    return scaled.reshape(batch, groups, heads // groups, length, size).contiguous()


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def _weight_count(q: Tensor) -> int:
    return q.shape[0] * q.shape[1] * sum((end - start) * end for start, end in _tiles(q.shape[2]))


def _weights(kept: Tensor, q: Tensor, groups: int) -> list[Tensor]:
    """The weights of each tile, `[B, K, H / K * rows, keys]`, as parts of `kept`."""
    batch, heads, length, _ = q.shape
    shapes = [(batch, groups, heads // groups * (end - start), end) for start, end in _tiles(length)]
    parts = torch.split(kept, [b * g * rows * keys for b, g, rows, keys in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Rows of `x [B, K, G, T, D]`, those of a group's heads below one another: `[B, K, G * (end - start), D]`."""
    return x[..., start:end, :].flatten(2, 3)
