"""Attention of the tokens at hand, and over a cache, with the same bits for a query whatever is computed beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Keys are weighed and summed in blocks of this many, in order. Unused ones are zeros, which change no sum.
KEY_BLOCK = 128
# Products with fewer rows than this take other code paths (a matrix times a vector), which round differently.
LEAST_ROWS = 4


def causal_attention(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention over the tokens at hand, as `model.transformer.Attend` says; for training and for scoring."""
    length = q.shape[2]
    if softcap is None and (window is None or window >= length):
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
    return masked_attention(q, k, v, in_sight(length, window, q.device), softcap, dropout)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, sees: Tensor, softcap: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention where `sees`, broadcast to `[B, H, T, T]`, says whether a token (row) sees another."""
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, dropout_p=dropout, enable_gqa=grouped)
    if grouped:
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    scores = ((scores / softcap).tanh() * softcap).masked_fill(~sees, float("-inf"))
    weights = functional.dropout(scores.softmax(dim=-1), dropout) if dropout else scores.softmax(dim=-1)
    return torch.matmul(weights.to(v.dtype), v)


def in_sight(length: int, window: int | None, device: torch.device) -> Tensor:
    """`[length, length]`: whether a token (row) sees another, within `window` tokens with its own."""
    sees = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return sees if window is None else sees.triu_(1 - window)


def block_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    query_tile: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention whose result for a query row depends on that row, its keys and values, and nothing else.

    `q [B, K, M, D]`, `keys [B, K, blocks, D, KEY_BLOCK]`, `values [B, K, N, D]` float32 with N a multiple of 16;
    `hidden`, broadcast to `[B, K, M, N]`, marks the keys a row does not see. Returns `[B, K, M, D]`. `query_tile`
    computes that many rows at a time, where products of other sizes do not agree. `softcap` bounds the scores.
    """
    rows = q.shape[2]
    tile = query_tile or _attended_rows(rows)
    q = torch.nn.functional.pad(q * q.shape[-1] ** -0.5, (0, 0, 0, -rows % tile))
    tiles = [
        _tile_attention(q[:, :, start : start + tile], keys, values, hidden, start, min(tile, rows - start), softcap)
        for start in range(0, rows, tile)
    ]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)


def _tile_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, start: int, rows: int, softcap: float | None
) -> Tensor:
    """The first `rows` of a tile of queries; the products need them all, nothing else does."""
    length = values.shape[2]
    spans = [(at, min(at + KEY_BLOCK, length)) for at in range(0, length, KEY_BLOCK)]
    weights = q.new_zeros(*q.shape[:-1], len(spans) * KEY_BLOCK)
    for index, (at, end) in enumerate(spans):
        weights[..., at:end] = torch.matmul(q, keys[:, :, index, :, : end - at])
    own = weights[:, :, :rows, :length]
    if softcap is not None:
        own.div_(softcap).tanh_().mul_(softcap)
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
