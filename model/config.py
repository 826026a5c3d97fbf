"""The shape of a network: one dataclass for every family, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from topkapi.model.config_fields import LARGEST, check_size
from topkapi.model.config_reading import unsupported_family, values_of
from topkapi.model.config_writing import written
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES, Family


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer: their base, how many numbers of a head are rotated, and their scaling, a mapping
    with `rope_type` and its factors; `context` is the longest text that the scaling was made for, in tokens.
    `backwards` they turn the other way round."""

    theta: float
    dimensions: int
    scaling: Mapping[str, Any]
    context: int
    backwards: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a network's shape and arithmetic.

    `rope_scaling` is None or a mapping with `rope_type` and its factors, as in Hugging Face configurations;
    `local_rope` is None or such a mapping with `rope_theta`, for the layers that have a window. `layer_windows` has for
    each layer how many tokens it attends to, its own included, or None for all before it; empty, no layer has a window.
    `attention_scale` multiplies the scores of attention (None: one by the square root of `head_dim`); soft caps bound
    scores and logits by tanh; logits are divided by `logit_divisor`. `activation` is the nonlinearity of feed-forward
    layers: `silu`, `gelu`, `gelu_tanh`, `relu_squared` (None: the family's). `declared_context` is what `config.json`
    says where fewer positions are computed. `end_token_ids` are all ids that end a text or a turn. `dropout` acts in
    training only.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    activation: str | None = None
    partial_rotary_factor: float = 1.0
    local_rope: Mapping[str, Any] | None = None
    unrotated_layers: tuple[int, ...] = ()
    layer_windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_divisor: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    parallel_residual: bool = False
    declared_context: int | None = None
    begin_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise unsupported_family(self.family)
        for name in LARGEST:
            check_size(name, getattr(self, name))
        for name, value in (("norm_eps", self.norm_eps), ("dropout", self.dropout)):
            if not math.isfinite(value) or value < 0:
                raise CheckpointError(f"{name} must be a number of at least 0, not {value!r}", field=name)
        if not math.isfinite(self.rope_theta) or self.rope_theta <= 0:
            raise CheckpointError(f"rope_theta must be a number above 0, not {self.rope_theta!r}", field="rope_theta")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
                field="num_kv_heads",
                hint=f"num_kv_heads may be {_divisors(self.num_heads)}",
            )
        if self.learned_positions and self.head_dim * self.num_heads != self.hidden_size:
            raise CheckpointError(
                f"in the {self.family} family hidden_size must be num_heads * head_dim",
                field="head_dim",
                hint="leave out head_dim, or choose another family",
            )
        rotated = int(self.head_dim * self.partial_rotary_factor)
        if not self.learned_positions and (rotated < 1 or (rotated == self.head_dim and rotated % 2)):
            raise CheckpointError(
                f"head_dim must be even for rotary positions, not {self.head_dim}"
                if rotated
                else f"partial_rotary_factor {self.partial_rotary_factor} leaves nothing of head_dim {self.head_dim}",
                field="head_dim" if rotated else "partial_rotary_factor",
                hint="head_dim is hidden_size by num_heads, unless it is given",
            )
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise CheckpointError(f"layer_windows must have {self.num_layers} entries", field="layer_windows")
        if len({window for window in self.layer_windows if window is not None}) > 1:
            raise CheckpointError("all windows must have the same size", field="layer_windows")
        scaling = self.rope_scaling or {}
        longest = scaling.get("original_max_position_embeddings")
        if scaling.get("rope_type") == "longrope" and longest is not None and self.context_length > longest:
            raise CheckpointError(
                f"longrope positions hold for {longest} tokens, not for {self.context_length}: beyond, transformers "
                "reads every token anew with other angles, and what a cache holds would no longer fit",
                field="context_length",
                hint=f"give at most {longest}",
            )

    @property
    def traits(self) -> Family:
        """What sets its family apart."""
        return FAMILIES[self.family]

    @property
    def learned_positions(self) -> bool:
        """Whether positions are an embedding table rather than rotary."""
        return self.traits.learned_positions

    @property
    def layer_norm(self) -> bool:
        """Whether norms are LayerNorm with a bias rather than RMSNorm."""
        return self.traits.layer_norm

    @property
    def gated_mlp(self) -> bool:
        """Whether the feed-forward layer is SiLU-gated rather than a plain GELU one."""
        return self.traits.gated_mlp

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.traits.qk_norm

    @property
    def nonlinearity(self) -> str:
        """The feed-forward layer's: `silu`, `gelu`, `gelu_tanh` or `relu_squared`."""
        return self.activation or self.traits.activation

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return self.hidden_size**0.5 if self.traits.scaled_embeddings else self.embedding_multiplier

    @property
    def context_note(self) -> str:
        """Why fewer tokens are computed than `config.json` declares, to go on a sentence; empty where all are."""
        if self.declared_context is None:
            return ""
        return (
            f"; the checkpoint declares {self.declared_context}, but beyond {self.context_length} its longrope "
            "positions have other angles, for which transformers reads every token anew"
        )

    def window(self, layer: int) -> int | None:
        """How many tokens a layer attends to, the query's own included; None: all that a context can hold."""
        window = self.layer_windows[layer] if self.layer_windows else None
        return None if window is None or window >= self.context_length else window

    def rope(self, layer: int) -> Rope | None:
        """The rotary positions of a layer, None where it has none."""
        if self.learned_positions or layer in self.unrotated_layers:
            return None
        context = self.declared_context or self.context_length
        dimensions = int(self.head_dim * self.partial_rotary_factor)
        if self.local_rope is not None and self.layer_windows and self.layer_windows[layer] is not None:
            return Rope(self.local_rope["rope_theta"], dimensions, self.local_rope, context)
        return Rope(self.rope_theta, dimensions, self.rope_scaling or {}, context, self.traits.rotated_backwards)

    def with_end_tokens(self, end_token_ids: tuple[int, ...]) -> ModelConfig:
        """The same shape with other end tokens."""
        return replace(self, end_token_ids=end_token_ids)

    def parameter_count(self) -> int:
        """Trainable parameters, each tied matrix counted once."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (query + 2 * key) + query * self.hidden_size
        attention += (query + 2 * key) * self.qkv_bias + self.hidden_size * self.output_bias
        weighted = not self.traits.weightless_norms
        attention += 2 * self.head_dim * (self.qk_norm and weighted) + (query + key) * self.traits.qk_norm_whole
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        mlp += ((2 if self.gated_mlp else 1) * self.intermediate_size + self.hidden_size) * self.mlp_bias
        norm = self.hidden_size * weighted * (2 if self.layer_norm else 1)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        embeddings += self.context_length * self.hidden_size * self.learned_positions
        norms = norm * sum(name is not None for name in self.traits.norms)
        return self.num_layers * (attention + mlp + norms) + norm + embeddings

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`.

        Raises `CheckpointError` for a family, an activation or an attention variant that Topkapi does not compute
        exactly as transformers does; nothing is approximated.
        """
        return cls(**values_of(config))

    def to_hugging_face(self) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp's converter read."""
        return written(self.traits, {each.name: getattr(self, each.name) for each in fields(self)})


def _divisors(number: int) -> str:
    found = [str(each) for each in range(1, number + 1) if number % each == 0]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))
