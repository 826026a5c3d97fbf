"""The families of networks, as data: what sets each apart in its layers, its `config.json` and its GGUF files.

`model.config` reads and writes configurations by these rows, `model.transformer` builds networks of them; neither knows
a family by its name, but for gpt2's own spelling of everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SILU = {"hidden_act": ("silu", "swish")}


@dataclass(frozen=True)
class Family:
    """What is peculiar to one family.

    `neutral` are fields that transformers computes with and Topkapi does not, with the values under which they change
    nothing; `absent` is what transformers takes where `config.json` lacks a field.
    """

    architecture: str
    """transformers' class."""
    gguf: str
    """llama.cpp's name of the architecture."""
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: _SILU)
    absent: Mapping[str, object] = field(default_factory=dict)
    written: Mapping[str, object] = field(default_factory=dict)
    """Fields of `config.json` that say what is always so."""
    learned_positions: bool = False
    """Positions are an embedding table rather than rotary."""
    layer_norm: bool = False
    """Norms are LayerNorm with a bias rather than RMSNorm."""
    gated_mlp: bool = True
    """The feed-forward layer is SiLU-gated rather than a plain GELU one."""
    qk_norm: bool = False
    """Queries and keys are normalised per head."""
    qkv_bias: bool = False
    """Queries, keys and values always have biases."""
    attention_bias: bool = False
    """`attention_bias` says whether all four matrices of attention have biases."""
    mlp_bias: bool = False
    """`mlp_bias` says whether the matrices of the feed-forward layer have biases."""
    head_dim: int | None = None
    """The size of a head where `config.json` says none; None: `hidden_size` by the number of heads."""
    window: bool = False
    """Attention is within `sliding_window` positions unless that is null."""
    divisible: bool = False
    """`hidden_size` must be a multiple of the number of heads, even where `head_dim` is given."""


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        gguf="gpt2",
        neutral={
            # Two names of GELU's tanh approximation, a third way to write it, and GELU itself.
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"),
            "add_cross_attention": (False,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "scale_attn_weights": (True,),
            "sliding_window": (None,),
        },
        learned_positions=True,
        layer_norm=True,
        gated_mlp=False,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        gguf="llama",
        neutral=_SILU | {"sliding_window": (None,)},
        absent={"max_position_embeddings": 2048},
        attention_bias=True,
        mlp_bias=True,
        divisible=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        gguf="llama",
        absent={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        written={"sliding_window": None},
        window=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        gguf="qwen2",
        neutral=_SILU | {"use_sliding_window": (False,)},
        absent={"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        written={"use_sliding_window": False},
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        gguf="qwen3",
        neutral=_SILU | {"use_sliding_window": (False,)},
        absent={"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        written={"use_sliding_window": False},
        qk_norm=True,
        attention_bias=True,
        head_dim=128,
    ),
}
