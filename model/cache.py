"""Keys and values of the tokens a network has read, so that none is computed twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig
from model.transformer import Decoder

# A prompt is read in chunks of this many tokens, always from its start, so that a row's arithmetic depends on the
# prompt alone and not on how a scheduler happened to cut it.
PREFILL_CHUNK = 256


class SequenceCache:
    """Keys and values of one sequence: per layer `[1, K, capacity, D]`, grown by doubling up to the context length."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, capacity: int = 256) -> None:
        self.length = 0
        self._limit = config.context_length
        self._shape = (config.num_layers, 2, 1, config.num_kv_heads)
        self._head_dim = config.head_dim
        capacity = min(capacity, self._limit)
        self._store = torch.empty((*self._shape, capacity, config.head_dim), dtype=dtype, device=device)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all."""
        capacity = self._store.shape[-2]
        if length <= capacity:
            return
        grown = min(max(length, 2 * capacity), self._limit)
        store = self._store.new_empty((*self._shape, grown, self._head_dim))
        store[..., : self.length, :] = self._store[..., : self.length, :]
        self._store = store

    def fork(self) -> SequenceCache:
        """A copy that grows on its own from here."""
        copy = SequenceCache.__new__(SequenceCache)
        copy.__dict__.update(self.__dict__)
        copy._store = self._store.clone()
        return copy

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of new tokens over the cache and themselves; see `model.transformer.Attend`, with B = 1."""
        start, end = self.length, self.length + q.shape[2]
        keys, values = self._store[layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        keys, values = keys[:, :, :end], values[:, :, :end]
        mask = None
        if q.shape[2] > 1 and start > 0:
            mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        return functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=q.shape[2] > 1 and start == 0,
            enable_gqa=q.shape[1] != keys.shape[1],
        )  # fmt: skip


def new_cache(model: Decoder) -> SequenceCache:
    """An empty cache in the dtype that `model` computes attention in."""
    weight = model.layers[0].self_attn.v_proj  # type: ignore[union-attr]
    dtype = weight.compute_dtype or weight.weight.dtype  # type: ignore[union-attr]
    return SequenceCache(model.config, dtype=dtype, device=model.device)  # type: ignore[arg-type]


@torch.inference_mode()
def extend(model: Decoder, cache: SequenceCache, token_ids: list[int]) -> Tensor:
    """Read `token_ids` after what the cache holds; returns their final states `[T, hidden_size]`."""
    start = cache.length
    cache.reserve(start + len(token_ids))
    tokens = torch.tensor([token_ids], dtype=torch.int64, device=model.device)
    positions = torch.arange(start, start + len(token_ids), device=model.device).unsqueeze(0)
    hidden = model.hidden(tokens, positions, cache.attend)
    cache.length += len(token_ids)
    return hidden[0]
