"""The shape of a network: one dataclass for every family, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from model.errors import CheckpointError

Family = Literal["gpt2", "llama", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)

ARCHITECTURES: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a network's shape and arithmetic.

    `rope_scaling` is None or a mapping with `rope_type` "linear" or "llama3" and its factors, as in Hugging Face
    configurations. `end_token_ids` are all ids that end a text or a turn. `dropout` acts in training only.
    """

    family: Family
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
    begin_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise _unsupported_family(self.family)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{name} must be a whole number of at least 1, not {value!r}", field=name)
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
                field="num_kv_heads",
                hint=f"num_kv_heads may be {_divisors(self.num_heads)}",
            )
        if self.family == "gpt2" and self.head_dim * self.num_heads != self.hidden_size:
            raise CheckpointError(
                "in the gpt2 family hidden_size must be num_heads * head_dim",
                field="head_dim",
                hint="leave out head_dim, or choose another family",
            )
        if self.head_dim % 2 and self.family != "gpt2":
            raise CheckpointError(
                f"head_dim must be even for rotary positions, not {self.head_dim}",
                field="head_dim",
                hint="head_dim is hidden_size by num_heads, unless it is given",
            )

    @property
    def learned_positions(self) -> bool:
        """Whether positions are an embedding table (gpt2) rather than rotary."""
        return self.family == "gpt2"

    @property
    def layer_norm(self) -> bool:
        """Whether norms are LayerNorm with a bias (gpt2) rather than RMSNorm."""
        return self.family == "gpt2"

    @property
    def gated_mlp(self) -> bool:
        """Whether the feed-forward layer is SiLU-gated rather than a plain GELU one (gpt2)."""
        return self.family != "gpt2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head (qwen3)."""
        return self.family == "qwen3"

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
        try:
            return _from_gpt2(config) if family == "gpt2" else _from_llama_like(family, config)
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error.args[0]!r}", field=str(error.args[0])) from None

    def to_hugging_face(self) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp's converter read."""
        ends = self.end_token_ids
        common: dict[str, Any] = {
            "model_type": self.family,
            "architectures": [ARCHITECTURES[self.family]],
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
                "activation_function": "gelu_new",
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
        if self.family in ("llama", "qwen3"):
            rest["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            rest["mlp_bias"] = self.mlp_bias
        if self.family in ("qwen2", "qwen3"):
            rest["use_sliding_window"] = False
        return common | rest


def _divisors(number: int) -> str:
    found = [str(each) for each in range(1, number + 1) if number % each == 0]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))


def _unsupported_family(family: object) -> CheckpointError:
    return CheckpointError(
        f"model family {family!r} is not supported",
        field="model_type",
        hint=f"supported families: {', '.join(FAMILIES)}",
    )


def _require(config: Mapping[str, Any], key: str, default: object, *allowed: object) -> None:
    value = config.get(key, default)
    if value not in allowed:
        raise CheckpointError(
            f"config.json asks for {key} = {value!r}, which is not supported",
            field=key,
            hint=f"supported: {', '.join(map(repr, allowed))}",
        )


def _end_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    ends = config.get("eos_token_id")
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (ends,)


def _begin_token(config: Mapping[str, Any]) -> int | None:
    begin = config.get("bos_token_id")
    return begin if isinstance(begin, int) else None


def _from_gpt2(config: Mapping[str, Any]) -> ModelConfig:
    _require(config, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    _require(config, "scale_attn_weights", True, True)
    _require(config, "scale_attn_by_inverse_layer_idx", False, False)
    _require(config, "add_cross_attention", False, False)
    hidden, heads = config["n_embd"], config["n_head"]
    return ModelConfig(
        family="gpt2",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context_length=config.get("n_positions") or config["n_ctx"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        qkv_bias=config.get("qkv_bias", True),
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=config.get("tie_word_embeddings", True),
        dropout=config.get("resid_pdrop", 0.1),
        begin_token_id=_begin_token(config),
        end_token_ids=_end_tokens(config),
    )


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and scaling, from transformers 5's `rope_parameters` or the older pair of fields."""
    parameters = dict(config.get("rope_parameters") or {})
    if not parameters:
        parameters = dict(config.get("rope_scaling") or {})
        parameters["rope_theta"] = config.get("rope_theta", 10_000.0)
    kind = parameters.setdefault("rope_type", parameters.pop("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"rotary scaling {kind!r} is not supported",
            field="rope_scaling",
            hint=f"supported: {', '.join(ROPE_TYPES)}",
        )
    theta = float(parameters.pop("rope_theta", config.get("rope_theta", 10_000.0)))
    if float(parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise CheckpointError("partial rotary positions are not supported", field="partial_rotary_factor")
    return theta, None if kind == "default" else parameters


def _from_llama_like(family: Family, config: Mapping[str, Any]) -> ModelConfig:
    _require(config, "hidden_act", "silu", "silu")
    if config.get("use_sliding_window"):
        _require(config, "use_sliding_window", False, False)
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise CheckpointError("sliding-window attention is not supported", field="layer_types")
    theta, scaling = _rope(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias", False))
    defaults: dict[str, int] = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
        context_length=config.get("max_position_embeddings", defaults[family]),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=True if family == "qwen2" else attention_bias,
        output_bias=False if family == "qwen2" else attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) if family == "llama" else False,
        tie_embeddings=config.get("tie_word_embeddings", False),
        begin_token_id=_begin_token(config),
        end_token_ids=_end_tokens(config),
    )
