"""Causal attention for training on a processor, a tile of queries at a time.

A tile sees no key behind its last query, so half of the products are never made; the weights of a tile stay in the
caches, and are kept in the precision of the products for the gradient.
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
    fused = q.dtype != torch.bfloat16 or q.device.type != "cpu"
    if dropout or fused or torch.compiler.is_compiling():
        return causal_attention(layer, q, k, v, dropout=dropout)
    return tiled_attention(layer, q, k, v)


def tiled_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without dropout, as `causal_attention` takes and returns it.

    In bfloat16 it is faster than PyTorch 2.13's on a processor, in float32 mostly slower.
    """
    mixed: Tensor = _TiledAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return mixed


class _TiledAttention(torch.autograd.Function):
    """`q [B, H, T, D]`, `k` and `v [B, K, T, D]` with K key-value heads -> `[B, H, T, D]`.

    The heads of a group stand below one another in every product, so that keys and values are not repeated for them.
    """

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        groups = k.shape[1]
        scaled = (q * size**-0.5).view(batch, groups, heads // groups, length, size)
        mixed = torch.empty_like(scaled)
        ahead = torch.full((TILE, TILE), float("-inf"), dtype=q.dtype).triu_(1)
        kept = []
        for start, end in _tiles(length):
            scores = torch.matmul(_rows(scaled, start, end), k[:, :, :end].transpose(2, 3))
            own = scores.view(batch, groups, -1, end - start, end)[..., start:]
            own.add_(ahead[: end - start, : end - start])
            kept.append(scores.softmax(dim=-1))
            mixed[..., start:end, :] = torch.matmul(kept[-1], v[:, :, :end]).view(batch, groups, -1, end - start, size)
        context.save_for_backward(scaled, k, v, *kept)
        return mixed.view(batch, heads, length, size)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled, k, v, *kept = context.saved_tensors
        batch, groups, shared, length, size = scaled.shape
        gradient = gradient.view(scaled.shape)
        of_q = torch.empty_like(scaled)
        # A key's gradient is a sum over tiles: in float32.
        of_k, of_v = (torch.zeros(each.shape, dtype=torch.float32) for each in (k, v))
        for (start, end), weights in zip(_tiles(length), kept, strict=True):
            below = _rows(gradient, start, end)
            of_v[:, :, :end] += torch.matmul(weights.transpose(2, 3), below)
            of_weights = torch.matmul(below, v[:, :, :end].transpose(2, 3))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_k[:, :, :end] += torch.matmul(of_scores.transpose(2, 3), _rows(scaled, start, end))
            of_q[..., start:end, :] = torch.matmul(of_scores, k[:, :, :end]).view(batch, groups, shared, -1, size)
        of_q.mul_(size**-0.5)
        return of_q.view(batch, groups * shared, length, size), of_k.to(k.dtype), of_v.to(v.dtype)


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Rows of `x [B, K, G, T, D]`, those of a group's heads below one another: `[B, K, G * (end - start), D]`."""
    return x[..., start:end, :].flatten(2, 3)
