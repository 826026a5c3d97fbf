"""Causal attention for training on a processor, a tile of queries at a time.

A tile sees no key behind its last query, so half of the products are never made; the weights of a tile stay in the
caches, and are kept in the precision of the products for the gradient. An operator of its own, so that a compiled
network calls it instead of unrolling its tiles for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topkapi.model.attention import causal_attention

# Queries per tile; see docs/LOG.md.
TILE = 128
# Texts are computed side by side up to this many times the shortest one's length, and all up to this length.
LIKE_LENGTH = 1.5
SHORT_TEXT = 64


def training_attention(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """What `causal_attention` computes, in whichever way is the fastest where the tensors are."""
    narrow = window is not None and window < q.shape[2]
    if dropout or narrow or softcap is not None or not _in_tiles(q):
        return causal_attention(layer, q, k, v, window=window, softcap=softcap, dropout=dropout)
    return tiled_attention(layer, q, k, v)


def _in_tiles(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


def tiled_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without dropout, as `causal_attention` takes and returns it.

    In bfloat16 it is faster than PyTorch 2.13's on a processor, in float32 mostly slower.
    """
    mixed: Tensor = _tiled(q, k, v)[0]
    return mixed


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


_tiled = torch.library.custom_op("topkapi::tiled_attention", _forward, mutates_args=())
_tiled_backward = torch.library.custom_op("topkapi::tiled_attention_backward", _backward, mutates_args=())


@_tiled.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_weight_count(q))


@_tiled_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _tiled_backward(gradient, *context.saved_tensors)
    return gradients


_tiled.register_autograd(_gradients, setup_context=_keep)


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


def packed_attention(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each of the texts of these `lengths [N]`, which stand one after another (B = 1).

    Texts of like length are padded at their ends and computed together: no token sees what is behind it, so nobody
    sees the padding.
    """
    whole = not dropout and window is None and softcap is None
    if torch.compiler.is_compiling() and whole and q.device.type == "cpu":
        mixed: Tensor = _packed(q, k, v, lengths)
        return mixed
    plainly: Tensor = _plainly(layer, q, k, v, lengths, window, softcap, dropout)
    return plainly


# A compiler would take it apart anew for other lengths.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _plainly(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    groups, places = _packing(tuple(lengths.tolist()), q.device)
    parts = ([group.padded(each) for each in (q, k, v)] for group in groups)
    mixed = [training_attention(layer, *part, window=window, softcap=softcap, dropout=dropout) for part in parts]
    return _joined(mixed, places)


@torch.library.custom_op("topkapi::packed_attention", mutates_args=())
def _packed(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """`packed_attention` as one step of a compiled network, which would be compiled anew for other lengths."""
    groups, places = _packing(tuple(lengths.tolist()), q.device)
    return _joined([_forward(*(group.padded(each) for each in (q, k, v)))[0] for group in groups], places)


@torch.library.custom_op("topkapi::packed_attention_backward", mutates_args=())
def _packed_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    groups, places = _packing(tuple(lengths.tolist()), q.device)
    gradients = []
    for group in groups:
        below = group.padded(gradient)
        below.transpose(0, 1).flatten(1, 2).index_fill_(1, group.padding, 0.0)
        queries, keys, values = (group.padded(each) for each in (q, k, v))
        # How much room a text's weights take depends on its length, which a compiled network does not know: they are
        # computed again instead of kept.
        kept = _forward(queries, keys, values)[1]
        gradients.append(_backward(below, queries, keys, values, kept))
    of_q, of_k, of_v = (_joined(parts, places) for parts in zip(*gradients, strict=True))
    return of_q, of_k, of_v


@_packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_packed_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_packed(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _packed_gradients(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_packed_backward(gradient, *context.saved_tensors), None)


_packed.register_autograd(_packed_gradients, setup_context=_keep_packed)


class _Group(NamedTuple):
    """Texts of like length: which token stands in each of their padded rows `[texts * longest]`, which rows are
    padding, and the number of texts."""

    rows: Tensor
    padding: Tensor
    texts: int

    def padded(self, x: Tensor) -> Tensor:
        """`x [1, H, T, D]` as `[texts, H, longest, D]`."""
        rows = x[0].index_select(1, self.rows)
        return rows.view(x.shape[1], self.texts, -1, x.shape[3]).transpose(0, 1)


def _joined(parts: Sequence[Tensor], places: Tensor) -> Tensor:
    """The inverse of `_Group.padded`, of all groups together."""
    rows = torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts], dim=1)
    return rows.index_select(1, places).unsqueeze(0)


@lru_cache(maxsize=4)
def _packing(lengths: tuple[int, ...], device: torch.device) -> tuple[list[_Group], Tensor]:
    """The texts in groups, and where each token stands in the rows of all groups, one after another."""
    groups: list[_Group] = []
    total = sum(lengths)
    starts = torch.tensor((0, *lengths[:-1])).cumsum(0)
    places, end = torch.empty(total, dtype=torch.int64), 0
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        shortest = lengths[order[0]]
        together = [text for text in order if lengths[text] <= max(LIKE_LENGTH * shortest, SHORT_TEXT)]
        order = order[len(together) :]
        longest = lengths[together[-1]]
        inside = (torch.arange(longest) < torch.tensor([lengths[text] for text in together]).unsqueeze(1)).flatten()
        rows = (starts[together].unsqueeze(1) + torch.arange(longest)).clamp(max=total - 1).flatten()
        real, padding = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
        places[rows[real]] = end + real
        groups.append(_Group(rows.to(device), padding.to(device), len(together)))
        end += len(rows)
    return groups, places.to(device)
