"""The network: one decoder for every family. It knows neither batching nor caching: attention is handed in.

What sets families apart is data: where norms stand, which positions and which window a layer has, what is multiplied by
what (`model.config`, `model.families`). Each is computed as transformers does. The residual stream and every norm are
float32 whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from topkapi.model.attention import causal_attention
from topkapi.model.config import ModelConfig, Rope
from topkapi.model.layers import ACTIVATIONS, Norm, TrainedRows, norm_of
from topkapi.model.linear import Linear, stacked
from topkapi.model.rotary import rotary_angles, rotary_frequencies, rotate

__all__ = ["KEY_STEP", "Attend", "Block", "Core", "CoreSlots", "Decoder", "FeedForward", "Norm", "SelfAttention",
           "TrainedRows", "causal_attention", "initialise", "rotary_frequencies"]  # fmt: skip

# What the number of keys at hand is rounded up to, where that changes no bits: fewer than 16 take other code paths.
KEY_STEP = 16


class Attend(Protocol):
    """Attention handed to the network by its caller.

    `q [B, H, T, D]`, `k` and `v [B, K, T, D]` with K key-value heads (H a multiple of K), rotated and normalised;
    returns `[B, H, T, D]`. A query sees `window` keys, its own included (None: all up to its own); its scores are
    bounded by `softcap` with tanh before any key is hidden (None: they are not).
    """

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, softcap: float | None = None
    ) -> Tensor: ...


class CoreSlots(Protocol):
    """A cache of the native core's own."""

    def copy(self, source: int, target: int, start: int, end: int) -> None: ...


class Core(Protocol):
    """What computes a network for serving in the place of PyTorch; see `model.native`."""

    held_in: str
    level: str

    @property
    def scanner(self) -> Callable[[Sequence[Tensor]], Any]:
        """Looks through rows of logits: a `model.decoding.scan.Scanner`."""
        ...

    def slots(self, count: int, capacity: int, held_in: str = "float32") -> CoreSlots: ...

    def adapter(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Any: ...

    def token_bytes(self, held_in: str) -> int: ...

    def run(
        self, slots: Any, works: Sequence[tuple[int, int, Sequence[int]]], kept: Sequence[int] = ()
    ) -> list[Tensor]: ...

    def step(
        self,
        slots: Any,
        works: Sequence[tuple[int, int, Sequence[int]]],
        wanted: Sequence[int],
        kept: Sequence[int] = (),
        adapters: Sequence[Any] = (),
    ) -> list[Tensor]: ...

    def steps(
        self,
        slots: Any,
        works: Sequence[tuple[int, int, Sequence[int]]],
        drawing: Any,
        ahead: Any,
        adapters: Sequence[Any] = (),
    ) -> list[tuple[float, list[int]]]: ...

    def logits(self, states: Tensor) -> Tensor: ...


class SelfAttention(nn.Module):
    """Projections, norms of queries and keys, and positions around the attention that is handed in."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.o_proj = Linear(query, config.hidden_size, bias=config.output_bias)
        # Over each head, or over all of them together.
        self.whole_norm = config.traits.qk_norm_whole
        sizes = (query, key) if self.whole_norm else (config.head_dim,) * 2
        normed = self.whole_norm or config.qk_norm
        self.q_norm, self.k_norm = (norm_of(config, size) if normed else None for size in sizes)
        self.window, self.softcap = config.window(layer), config.attention_softcap
        # Attention itself divides by the square root of the size of a head.
        scale = config.attention_scale
        self.query_factor = None if scale is None else scale * config.head_dim**0.5
        self.qkv_proj: Linear | None = None
        self.sizes = (query, key, key)

    def stack(self) -> None:
        """Make the three projections of the input one, for inference and for good."""
        if self.qkv_proj is None:
            self.qkv_proj = stacked([self.q_proj, self.k_proj, self.v_proj])
            del self.q_proj, self.k_proj, self.v_proj

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv_proj is not None:
            q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
            return q, k, v
        # One cast serves the three products.
        x = x.to(self.q_proj.input_dtype)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None and self.whole_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.view(batch, length, -1, self.head_dim) for each in (q, k, v))
        v = v.transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None and not self.whole_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.query_factor is not None:
            q = q.float() * self.query_factor
        mixed = attend(self.layer, q.to(v.dtype), k.to(v.dtype), v, window=self.window, softcap=self.softcap)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return projected


class FeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias, outlying=True)
        self.gate_up_proj: Linear | None = None
        self.activation = ACTIVATIONS[config.nonlinearity]

    def stack(self) -> None:
        """Make the two projections of a gated input one, for inference and for good."""
        if self.gate_up_proj is None and self.gate_proj is not None:
            self.gate_up_proj = stacked([self.gate_proj, self.up_proj])
            del self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            inner = self.activation(gate) * up
        elif self.gate_proj is not None:
            x = x.to(self.up_proj.input_dtype)
            inner = self.activation(self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = self.activation(self.up_proj(x))
        down: Tensor = self.down_proj(inner)
        return down


class Block(nn.Module):
    """One layer: attention, then feed-forward (or both from the same state), each added to the residual stream.

    Norms stand before or behind each or both; they have transformers' names (`model.families.Norms`).
    """

    input_layernorm: Norm
    post_attention_layernorm: Norm

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_names = config.traits.norms
        for name in self.norm_names:
            if name is not None:
                self.add_module(name, norm_of(config, config.hidden_size, layer_norm=config.layer_norm))
        self.self_attn = SelfAttention(config, layer)
        self.mlp = FeedForward(config)
        self.dropout, self.parallel = config.dropout, config.parallel_residual
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        names = self.norm_names
        attended = self.self_attn(self._normed(names.before_attention, x), rotary, attend)
        attended = self._normed(names.after_attention, attended)
        between = x if self.parallel else self._added(x, attended)
        read = self.mlp(self._normed(names.before_mlp, between))
        read = self._normed(names.after_mlp, read)
        return self._added(self._added(x, attended) if self.parallel else between, read)

    def _normed(self, name: str | None, x: Tensor) -> Tensor:
        normed: Tensor = x if name is None else getattr(self, name)(x)
        return normed

    def _added(self, x: Tensor, update: Tensor) -> Tensor:
        update = self._drop(update)
        return x + update if self.multiplier == 1.0 else x.add(update, alpha=self.multiplier)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x


def _embedding(rows: int, columns: int) -> nn.Embedding:
    """An uninitialised table; where there is no memory behind it, drawing numbers for it would have PyTorch import its
    compiler, which takes a second and 100 MB."""
    return nn.Embedding(rows, columns, _weight=torch.empty(rows, columns), _freeze=False)


class Decoder(nn.Module):
    """A causal language model of the shape `config`; parameters are uninitialised until loaded or `initialise`d."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            _embedding(config.context_length, config.hidden_size) if config.learned_positions else None
        )
        self.embed_norm = norm_of(config, config.hidden_size) if config.traits.embedding_norm else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = norm_of(config, config.hidden_size, layer_norm=config.layer_norm)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie()
        ropes = [config.rope(layer) for layer in range(config.num_layers)]
        # Each kind of rotary positions once, and which of them each layer has.
        self._ropes: list[Rope] = []
        for rope in ropes:
            if rope is not None and rope not in self._ropes:
                self._ropes.append(rope)
        self._rope_of = [None if rope is None else self._ropes.index(rope) for rope in ropes]
        self._frequencies: list[tuple[Tensor, float]] = []
        # Whether a layer's intermediate results are computed again for its gradient instead of kept.
        self.recompute = False
        # Rows of the embedding that train while its table is frozen; see `model.adapter`.
        self.trained_rows: TrainedRows | None = None
        # What computes the network for serving in the place of everything below; see `model.native`.
        self.core: Core | None = None
        # What keys and values are held in while it is served: `float32`, and with a core others too.
        self.cache_dtype = "float32"
        # Set by `model.invariance.calibrate`: its verdict, row counts that agree bit for bit, queries per tile, and
        # what the number of keys at hand is rounded up to.
        self.invariant: bool | None = None
        self.row_sizes: tuple[int, ...] = ()
        self.query_tile: int | None = None
        self.key_step = KEY_STEP

    def padded_rows(self, rows: int) -> int:
        """The row count to compute `rows` rows with, so that each row's bits are those of every other count."""
        if not self.row_sizes:
            return rows
        largest = self.row_sizes[-1]
        return next((size for size in self.row_sizes if size >= rows), -(-rows // largest) * largest)

    def tie(self) -> None:
        """Make the output matrix the embedding matrix, where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.embed_tokens.weight)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.core is not None else self.embed_tokens.weight.device

    @property
    def held_in(self) -> str:
        """The precision that the layers' matrices are held in: `float32`, `bfloat16`, `int8`, `int4`."""
        if self.core is not None:
            return self.core.held_in
        block = cast(Block, self.layers[0])
        return block.mlp.down_proj.held_in

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend = causal_attention,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """`tokens`, `positions [B, T]` int64 -> the last layer's normalised state `[B, T, hidden_size]` float32.

        `observe(layer, state)` is told the state `[B, T, hidden_size]` below each layer; that below the first is the
        embedding.
        """
        x = self.embed_tokens(tokens).float()
        if self.trained_rows is not None:
            x = self.trained_rows.embed(tokens, x)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).float()
        angles = self._rotary(positions)
        if self.training and self.config.dropout:
            x = functional.dropout(x, self.config.dropout)
        for layer, block in enumerate(self.layers):
            if observe is not None:
                observe(layer, x)
            kind = self._rope_of[layer]
            rotary = None if kind is None else angles[kind]
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, attend, use_reentrant=False)
            else:
                x = block(x, rotary, attend)
        state: Tensor = self.norm(x)
        return state

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores of every token in the precision of the output matrix: `[..., hidden_size] -> [..., vocab_size]`."""
        scores: Tensor = self.lm_head(hidden)
        if self.trained_rows is not None:
            scores = self.trained_rows.score(hidden.to(self.lm_head.input_dtype), scores)
        divisor, cap = self.config.logit_divisor, self.config.logit_softcap
        if divisor != 1.0:
            scores = scores.float() / divisor
        if cap is not None:
            scores = (scores.float() / cap).tanh() * cap
        return scores

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token: `[..., hidden_size] -> [..., vocab_size]` float32."""
        return self.scores(hidden).float()

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend = causal_attention) -> Tensor:
        """`tokens`, `positions [B, T]` int64 -> logits `[B, T, vocab_size]` float32."""
        return self.logits(self.hidden(tokens, positions, attend))

    def _rotary(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of every kind of rotary positions that there is."""
        if len(self._frequencies) != len(self._ropes) or any(
            frequencies.device != positions.device for frequencies, _ in self._frequencies
        ):
            found = [rotary_angles(rope) for rope in self._ropes]
            self._frequencies = [(frequencies.to(positions.device), factor) for frequencies, factor in found]
        result = []
        for frequencies, factor in self._frequencies:
            angles = (positions.float().unsqueeze(-1) * frequencies).unsqueeze(1)
            cos, sin = angles.cos(), angles.sin()
            result.append((cos, sin) if factor == 1.0 else (cos * factor, sin * factor))
        return result


def initialise(
    model: Decoder,
    generator: torch.Generator,
    scheme: Literal["scaled_normal", "pytorch"] = "scaled_normal",
) -> None:
    """Fill `model` with random weights drawn from `generator`.

    `scaled_normal` is GPT-2's: normal with deviation 0.02, projections into the residual stream divided by
    sqrt(2 * layers). `pytorch` is what `nn.Linear` and `nn.Embedding` do by default, as the textbooks' models use.
    """
    residual_scale = 1.0 / math.sqrt(2 * model.config.num_layers)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Norm):
                if module.weight is not None:
                    module.weight.fill_(1.0 - module.offset)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0 if scheme == "pytorch" else 0.02, generator=generator)
            elif isinstance(module, Linear):
                if module is model.lm_head and model.config.tie_embeddings:
                    continue
                if scheme == "pytorch":
                    bound = 1.0 / math.sqrt(module.weight.shape[1])
                    module.weight.uniform_(-bound, bound, generator=generator)
                    if module.bias is not None:
                        module.bias.uniform_(-bound, bound, generator=generator)
                    continue
                deviation = 0.02 * (residual_scale if name.endswith(("o_proj", "down_proj")) else 1.0)
                module.weight.normal_(0.0, deviation, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
