"""Attention over a cache, with the same bits for a query whatever else is computed beside it."""

from __future__ import annotations

import torch
from torch import Tensor

# Keys are weighed and summed in blocks of this many, in order. Unused ones are zeros, which change no sum.
KEY_BLOCK = 128
# Products with fewer rows than this take other code paths (a matrix times a vector), which round differently.
LEAST_ROWS = 4


def block_attention(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, query_tile: int | None = None) -> Tensor:
    """Attention whose result for a query row depends on that row, its keys and values, and nothing else.

    `q [B, K, M, D]`, `keys [B, K, blocks, D, KEY_BLOCK]`, `values [B, K, N, D]` float32 with N a multiple of 16;
    `hidden`, broadcast to `[B, K, M, N]`, marks the keys a row does not see. Returns `[B, K, M, D]`. `query_tile`
    computes that many rows at a time, where products of other sizes do not agree.
    """
    rows = q.shape[2]
    tile = query_tile or _attended_rows(rows)
    q = torch.nn.functional.pad(q * q.shape[-1] ** -0.5, (0, 0, 0, -rows % tile))
    tiles = [
        _tile_attention(q[:, :, start : start + tile], keys, values, hidden, start, min(tile, rows - start))
        for start in range(0, rows, tile)
    ]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)


def _tile_attention(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, start: int, rows: int) -> Tensor:
    """The first `rows` of a tile of queries; the products need them all, nothing else does."""
    length = values.shape[2]
    spans = [(at, min(at + KEY_BLOCK, length)) for at in range(0, length, KEY_BLOCK)]
    weights = q.new_zeros(*q.shape[:-1], len(spans) * KEY_BLOCK)
    for index, (at, end) in enumerate(spans):
        weights[..., at:end] = torch.matmul(q, keys[:, :, index, :, : end - at])
    own = weights[:, :, :rows, :length]
    own.masked_fill_(hidden if hidden.shape[2] == 1 else hidden[:, :, start : start + rows], float("-inf"))
    own.sub_(own.amax(dim=-1, keepdim=True)).exp_()
    totals = weights[:, :, :rows].view(*own.shape[:-1], -1, KEY_BLOCK).sum(dim=-1)
    total = totals[..., 0]
    mixed = torch.matmul(weights[..., : spans[0][1]], values[:, :, : spans[0][1]])
    for index, (at, end) in enumerate(spans[1:], 1):
        total = total + totals[..., index]
        mixed += torch.matmul(weights[..., at:end], values[:, :, at:end])
    return mixed[:, :, :rows].div_(total.unsqueeze(-1))


def _attended_rows(rows: int) -> int:
    """Row count to attend with: threads share rows evenly then, and none is left with fewer than `LEAST_ROWS`."""
    return -(-rows // 64) * 64 if rows > 64 else max(LEAST_ROWS, 1 << (rows - 1).bit_length())
