"""The shape of a network: one dataclass for every family, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from topkapi.model.config_fields import GPT2_NAMES, Fields, read_rope
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES, Family

# Far above every published network; what is beyond is a damaged or a hostile file, and building it would not end.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_layers": 2**12,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "context_length": 2**31,
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a network's shape and arithmetic.

    `rope_scaling` is None or a mapping with `rope_type` "linear" or "llama3" and its factors, as in Hugging Face
    configurations. `activation` is "gelu" where gpt2 computes that exactly. `end_token_ids` are all ids that end a text
    or a turn. `dropout` acts in training only.
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
    begin_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise _unsupported_family(self.family)
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{name} must be a whole number of at least 1, not {value!r}", field=name)
            if value > largest:
                raise CheckpointError(f"{name} must be at most {largest}, not {str(value)[:20]}", field=name)
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
        if self.head_dim % 2 and not self.learned_positions:
            raise CheckpointError(
                f"head_dim must be even for rotary positions, not {self.head_dim}",
                field="head_dim",
                hint="head_dim is hidden_size by num_heads, unless it is given",
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

    def with_end_tokens(self, end_token_ids: tuple[int, ...]) -> ModelConfig:
        """The same shape with other end tokens."""
        return replace(self, end_token_ids=end_token_ids)

    def parameter_count(self) -> int:
        """Trainable parameters, each tied matrix counted once."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (query + 2 * key) + query * self.hidden_size
        attention += (query + 2 * key) * self.qkv_bias + self.hidden_size * self.output_bias
        attention += 2 * self.head_dim * self.qk_norm
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        mlp += ((2 if self.gated_mlp else 1) * self.intermediate_size + self.hidden_size) * self.mlp_bias
        norm = self.hidden_size * (2 if self.layer_norm else 1)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        embeddings += self.context_length * self.hidden_size * self.learned_positions
        return self.num_layers * (attention + mlp + 2 * norm) + norm + embeddings

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`.

        Raises `CheckpointError` for a family, an activation or an attention variant that Topkapi does not compute
        exactly as transformers does; nothing is approximated.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise _unsupported_family(family)
        if family == "gpt2":
            # As in transformers, the common name wins over gpt2's own.
            named = {own: config[common] for common, own in GPT2_NAMES.items() if common in config}
            fields = Fields({**config, **named})
            fields.refuse_unless_neutral(FAMILIES[family].neutral)
            return _from_gpt2(fields)
        fields = Fields({**FAMILIES[family].absent, **config})
        fields.refuse_unless_neutral(FAMILIES[family].neutral)
        return _from_llama_like(family, fields)

    def to_hugging_face(self) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp's converter read."""
        ends = self.end_token_ids
        common: dict[str, Any] = {
            "model_type": self.family,
            "architectures": [self.traits.architecture],
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.begin_token_id,
            "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
        }
        if self.family == "gpt2":
            return common | {
                "n_positions": self.context_length,
                "n_embd": self.hidden_size,
                "n_layer": self.num_layers,
                "n_head": self.num_heads,
                "n_inner": self.intermediate_size,
                "activation_function": self.activation or "gelu_new",
                "layer_norm_epsilon": self.norm_eps,
                "resid_pdrop": self.dropout,
                "embd_pdrop": self.dropout,
                "attn_pdrop": self.dropout,
                # transformers always has this bias: it is stored as zeros where the network was trained without.
                "qkv_bias": self.qkv_bias,
            }
        rope = dict(self.rope_scaling) if self.rope_scaling else None
        rest: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            # Both spellings: transformers >= 5 reads rope_parameters, everything older the other two.
            "rope_theta": self.rope_theta,
            "rope_scaling": rope,
            "rope_parameters": {"rope_type": "default", **(rope or {}), "rope_theta": self.rope_theta},
        }
        if self.traits.attention_bias:
            rest["attention_bias"] = self.qkv_bias
        if self.traits.mlp_bias:
            rest["mlp_bias"] = self.mlp_bias
        return {**common, **rest, **self.traits.written}


def _divisors(number: int) -> str:
    found = [str(each) for each in range(1, number + 1) if number % each == 0]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))


def _unsupported_family(family: object) -> CheckpointError:
    return CheckpointError(
        f"model family {family!r} is not supported",
        field="model_type",
        hint=f"supported families: {', '.join(FAMILIES)}",
    )


def _begin_token(fields: Fields) -> int | None:
    found = fields.token_ids("bos_token_id")
    if isinstance(fields.values.get("bos_token_id"), list | tuple):
        raise CheckpointError("config.json: bos_token_id must be a token id or null", field="bos_token_id")
    return found[0] if found else None


def _from_gpt2(fields: Fields) -> ModelConfig:
    hidden, heads, layers = fields.whole("n_embd"), fields.whole("n_head"), fields.whole("n_layer")
    fields.check_layer_types(layers)
    context = "n_ctx" if "n_positions" not in fields.values and "n_ctx" in fields.values else "n_positions"
    return ModelConfig(
        family="gpt2",
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("n_inner", 4 * hidden, null=True),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_dim(hidden, heads),
        context_length=fields.whole(context),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, zero=True),
        qkv_bias=fields.flag("qkv_bias", True),
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        dropout=fields.number("resid_pdrop", 0.1, zero=True, most=1.0),
        activation="gelu" if fields.values.get("activation_function") == "gelu" else None,
        begin_token_id=_begin_token(fields),
        end_token_ids=fields.token_ids("eos_token_id"),
    )


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise CheckpointError(
            f"hidden_size ({hidden}) must be a multiple of the number of attention heads ({heads})",
            field="num_attention_heads",
        )
    return hidden // heads


def _from_llama_like(family: str, fields: Fields) -> ModelConfig:
    traits = FAMILIES[family]
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    layers = fields.whole("num_hidden_layers")
    fields.check_layer_types(layers)
    head_dim = traits.head_dim or (_head_dim(hidden, heads) if traits.divisible else max(hidden // heads, 1))
    context = fields.whole("max_position_embeddings")
    if traits.window:
        fields.check_window(context)
    theta, scaling = read_rope(fields, context)
    attention_bias = fields.flag("attention_bias", False) if traits.attention_bias else False
    return ModelConfig(
        family=family,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads, null=True),
        head_dim=fields.whole("head_dim", head_dim, null=True),
        context_length=context,
        norm_eps=fields.number("rms_norm_eps", 1e-6, zero=True),
        rope_theta=float(theta),
        rope_scaling=scaling,
        qkv_bias=traits.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False) if traits.mlp_bias else False,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        begin_token_id=_begin_token(fields),
        end_token_ids=fields.token_ids("eos_token_id"),
    )
