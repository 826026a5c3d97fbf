"""The network: one decoder for every family. It knows neither batching nor caching: attention is handed in.

Follows GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023), Qwen2 and Qwen3 (Qwen team 2024, 2025) as
transformers computes them. The residual stream and every norm are float32 whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from topkapi.model.config import ModelConfig
from topkapi.model.linear import Linear, stacked

# What the number of keys at hand is rounded up to, where that changes no bits: fewer than 16 take other code paths.
KEY_STEP = 16


class Attend(Protocol):
    """Attention handed to the network by its caller.

    `q [B, H, T, D]`, `k` and `v [B, K, T, D]` with K key-value heads (H a multiple of K), rotated and normalised;
    returns `[B, H, T, D]`.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


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

    def slots(self, count: int, capacity: int) -> CoreSlots: ...

    def run(
        self, slots: Any, works: Sequence[tuple[int, int, Sequence[int]]], kept: Sequence[int] = ()
    ) -> list[Tensor]: ...

    def step(
        self,
        slots: Any,
        works: Sequence[tuple[int, int, Sequence[int]]],
        wanted: Sequence[int],
        kept: Sequence[int] = (),
    ) -> list[Tensor]: ...

    def logits(self, states: Tensor) -> Tensor: ...


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Plain causal attention over the tokens at hand; for training (with `dropout`) and for scoring."""
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


class Norm(nn.Module):
    """LayerNorm with a bias (gpt2) or RMSNorm, computed in float32: `[..., size] -> [..., size]` float32."""

    def __init__(self, size: int, eps: float, *, layer_norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if layer_norm else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x, weight = x.float(), self.weight.float()
        if self.bias is not None:
            return functional.layer_norm(x, weight.shape, weight, self.bias.float(), self.eps)
        return functional.rms_norm(x, weight.shape, weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies `[head_dim / 2]` float32 (Su et al. 2021), with linear or Llama 3 scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling: Mapping[str, Any] = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / float(scaling["factor"])
    elif scaling.get("rope_type") == "llama3":
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        wavelengths = 2 * math.pi / frequencies
        smooth = (original / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / factor + smooth * frequencies
        stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
        is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
        frequencies = torch.where(is_between, between, stretched)
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `x [B, heads, T, D]` with `cos`, `sin [B, 1, T, D / 2]`, halves paired as in Llama."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class SelfAttention(nn.Module):
    """Projections, per-head norms and positions around the attention that is handed in."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.o_proj = Linear(query, config.hidden_size, bias=config.output_bias)
        self.q_norm = Norm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.norm_eps) if config.qk_norm else None
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
        q, k, v = (each.view(batch, length, -1, self.head_dim) for each in self._project(x))
        v = v.transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed = attend(self.layer, q.to(v.dtype), k.to(v.dtype), v)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return projected


class FeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))`, or `down(gelu(up(x)))` with the tanh approximation (gpt2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias, outlying=True)
        self.gate_up_proj: Linear | None = None

    def stack(self) -> None:
        """Make the two projections of a gated input one, for inference and for good."""
        if self.gate_up_proj is None and self.gate_proj is not None:
            self.gate_up_proj = stacked([self.gate_proj, self.up_proj])
            del self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            inner = functional.silu(gate) * up
        elif self.gate_proj is not None:
            x = x.to(self.up_proj.input_dtype)
            inner = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = functional.gelu(self.up_proj(x), approximate="tanh")
        down: Tensor = self.down_proj(inner)
        return down


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.norm_eps, layer_norm=config.layer_norm)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_eps, layer_norm=config.layer_norm)
        self.mlp = FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        x = x + self._drop(self.self_attn(self.input_layernorm(x), rotary, attend))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x


class TrainedRows(nn.Module):
    """Rows of the embedding that train while its table stays frozen: those of `token_ids`, ascending.

    Where the output matrix is the same one (tied), its rows are these too; else it has trained rows of its own.
    """

    def __init__(self, token_ids: Sequence[int], table: Tensor, output: Tensor | None) -> None:
        super().__init__()
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)
        self.embedding = nn.Parameter(table.detach()[self.token_ids].float())
        self.output = None if output is None else nn.Parameter(output.detach()[self.token_ids].float())

    def embed(self, tokens: Tensor, x: Tensor) -> Tensor:
        """`x [B, T, hidden_size]`, the embedding of `tokens [B, T]`, with the trained rows in their places."""
        at = torch.searchsorted(self.token_ids, tokens).clamp_max(len(self.token_ids) - 1)
        found = (self.token_ids[at] == tokens).unsqueeze(-1)
        return torch.where(found, self.embedding[at], x)

    def score(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """`logits [..., vocab_size]` of `hidden [..., hidden_size]` with those of the trained rows in their places."""
        rows = self.embedding if self.output is None else self.output
        return logits.index_copy(-1, self.token_ids, functional.linear(hidden, rows.to(hidden.dtype)).to(logits.dtype))


class Decoder(nn.Module):
    """A causal language model of the shape `config`; parameters are uninitialised until loaded or `initialise`d."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.context_length, config.hidden_size) if config.learned_positions else None
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.norm_eps, layer_norm=config.layer_norm)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie()
        self._frequencies: Tensor | None = None
        # Whether a layer's intermediate results are computed again for its gradient instead of kept.
        self.recompute = False
        # Rows of the embedding that train while its table is frozen; see `model.adapter`.
        self.trained_rows: TrainedRows | None = None
        # What computes the network for serving in the place of everything below; see `model.native`.
        self.core: Core | None = None
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
        rotary = None
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).float()
        else:
            rotary = self._rotary(positions)
        if self.training and self.config.dropout:
            x = functional.dropout(x, self.config.dropout)
        for layer, block in enumerate(self.layers):
            if observe is not None:
                observe(layer, x)
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
        return scores

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token: `[..., hidden_size] -> [..., vocab_size]` float32."""
        return self.scores(hidden).float()

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend = causal_attention) -> Tensor:
        """`tokens`, `positions [B, T]` int64 -> logits `[B, T, vocab_size]` float32."""
        return self.logits(self.hidden(tokens, positions, attend))

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = rotary_frequencies(self.config).to(positions.device)
        angles = (positions.float().unsqueeze(-1) * self._frequencies).unsqueeze(1)
        return angles.cos(), angles.sin()


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
                module.weight.fill_(1.0)
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
