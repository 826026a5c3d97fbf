"""The families of networks, as data: what sets each apart in its layers, its `config.json` and its GGUF files.

`model.config` reads and writes configurations by these rows, `model.transformer` builds networks of them; neither knows
a family by its name, but for gpt2's own spelling of everything. How each stores its matrices: `model.storage.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Norms(NamedTuple):
    """What transformers calls the norms of a layer; None where a family has none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


BEFORE = Norms()
"""Before attention, and before the feed-forward layer."""


class Number(NamedTuple):
    """A number that `config.json` may give: its name there, what transformers takes where it gives none, and whether
    null means that nothing is computed with it."""

    name: str
    default: float | None
    null: bool = False


@dataclass(frozen=True)
class Family:
    """What is peculiar to one family.

    `neutral` are fields that transformers computes with and Topkapi does not, with the values under which they change
    nothing; `absent` is what transformers takes where `config.json` lacks a field.
    """

    architecture: str
    """transformers' class."""
    gguf: str
    """llama.cpp's name of the architecture; empty where it has none."""
    models: str = ""
    """Who publishes models of the family, and which."""
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    absent: Mapping[str, object] = field(default_factory=dict)
    written: Mapping[str, object] = field(default_factory=dict)
    """Fields of `config.json` that are always the same."""
    learned_positions: bool = False
    """Positions are an embedding table rather than rotary."""
    layer_norm: bool = False
    """Norms are LayerNorm with a bias rather than RMSNorm."""
    norms: Norms = BEFORE
    norm_offset: float = 0.0
    """What is added to the stored weights of norms."""
    weightless_norms: bool = False
    """Norms have no weights."""
    embedding_norm: bool = False
    """Embeddings are normalised before the first layer."""
    gated_mlp: bool = True
    """The feed-forward layer is gated rather than a plain one."""
    activation: str = "silu"
    """The feed-forward layer's nonlinearity where the configuration says nothing, as `model.config` calls it."""
    qk_norm: bool = False
    """Queries and keys are normalised per head."""
    qk_norm_whole: bool = False
    """Queries and keys are normalised all heads together."""
    qkv_bias: bool = False
    """Queries, keys and values always have biases."""
    attention_bias: bool = False
    """`attention_bias` says whether all four matrices of attention have biases."""
    mlp_bias: bool = False
    """`mlp_bias` says whether the matrices of the feed-forward layer have biases."""
    mlp_biased: bool = False
    """The matrices of the feed-forward layer always have biases."""
    head_dim: int | None = None
    """The size of a head where `config.json` says none; None: `hidden_size` by the number of heads."""
    window: Literal["every", "flagged", "typed"] | None = None
    """Which layers attend within `sliding_window` positions: every one; those of `layer_types`, if
    `use_sliding_window` says so; those of `layer_types` in any case. None: no layer does."""
    window_pattern: int | None = None
    """Where `layer_types` is absent, every n-th layer sees everything; None: `max_window_layers` says which do,
    or the layers without rotary positions do not."""
    divisible: bool = False
    """`hidden_size` must be a multiple of the number of heads, even where `head_dim` is given."""
    heads_alike: bool = False
    """There are as many key-value heads as heads, each of `hidden_size` by their number."""
    spelling: Mapping[str, str] = field(default_factory=dict)
    """The family's own names of fields, by the usual ones."""
    numbers: Mapping[str, Number] = field(default_factory=dict)
    """Fields of `ModelConfig` that stand as numbers in `config.json`."""
    scaled_embeddings: bool = False
    """Embeddings are multiplied by the square root of `hidden_size`."""
    query_scalar: bool = False
    """Attention is divided by the square root of `query_pre_attn_scalar` rather than of the size of a head."""
    parallel_residual: bool = False
    """`use_parallel_residual` says whether attention and feed-forward layer read the same state."""
    rope_theta: float = 10_000.0
    """The base of rotary positions where `config.json` says none."""
    local_rope_theta: float | None = None
    """That of layers with a window, where they have rotary positions of their own."""
    partial_rotary: float | None = None
    """What part of a head is rotated where `config.json` says nothing; None: always all of it."""
    rotated_backwards: bool = False
    """Rotary positions turn the other way round."""
    rope_types: tuple[str, ...] = ()
    """The only types of rotary positions that transformers opens, or that are computed, in this family; empty: all."""
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    """Names that a type of rotary positions has in this family alone."""
    unrotated_layers: bool = False
    """`no_rope_layers` says which layers have no positions at all."""


# What transformers takes for padding where nothing is said need not be in the vocabulary.
_NO_PADDING = {"pad_token_id": None}
# Of families without one: transformers' cache takes it from any configuration all the same, its network does not.
_NO_WINDOW: dict[str, tuple[object, ...]] = {"sliding_window": (None,)}
_SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        gguf="gpt2",
        models="GPT-2, and the book's networks",
        neutral={
            "add_cross_attention": (False,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "scale_attn_weights": (True,),
            "sliding_window": (None,),
        },
        learned_positions=True,
        layer_norm=True,
        gated_mlp=False,
        activation="gelu_tanh",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        gguf="llama",
        models="Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2, Yi, DeepSeek-R1's Llama distills",
        neutral={"sliding_window": (None,)},
        absent={"max_position_embeddings": 2048},
        attention_bias=True,
        mlp_bias=True,
        divisible=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        gguf="llama",
        models="Mistral 7B, Mistral Nemo, Zephyr",
        absent={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        window="every",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        gguf="qwen2",
        models="Qwen 2 and 2.5, DeepSeek-R1's Qwen distills",
        absent={"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096,
                "max_window_layers": 28},
        qkv_bias=True,
        window="flagged",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        gguf="qwen3",
        models="Qwen 3",
        absent={"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096,
                "max_window_layers": 28},
        qk_norm=True,
        attention_bias=True,
        head_dim=128,
        window="flagged",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        gguf="gemma2",
        models="Gemma 2",
        neutral={"sliding_window_pattern": (None, 2), "use_bidirectional_attention": (None, False)},
        written=_NO_PADDING,
        absent={"max_position_embeddings": 8192, "num_key_value_heads": 4, "sliding_window": 4096,
                "query_pre_attn_scalar": 256, "tie_word_embeddings": True},
        norms=_SANDWICH,
        norm_offset=1.0,
        activation="gelu_tanh",
        spelling={"hidden_act": "hidden_activation"},
        attention_bias=True,
        head_dim=256,
        window="typed",
        window_pattern=2,
        numbers={
            "attention_softcap": Number("attn_logit_softcapping", 50.0, null=True),
            "logit_softcap": Number("final_logit_softcapping", 30.0, null=True),
        },
        scaled_embeddings=True,
        query_scalar=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        gguf="gemma3",
        models="Gemma 3 of 270M and 1B; of 4B to 27B the text alone",
        # transformers does not cap the scores of attention in this family, whatever the configuration says, and takes
        # the context that a scaling starts from only from within the scaling.
        neutral={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False),
                 "original_max_position_embeddings": (None,)},
        written=_NO_PADDING,
        absent={"max_position_embeddings": 131_072, "num_key_value_heads": 4, "sliding_window": 4096,
                "query_pre_attn_scalar": 256, "tie_word_embeddings": True},
        norms=_SANDWICH,
        norm_offset=1.0,
        activation="gelu_tanh",
        qk_norm=True,
        spelling={"hidden_act": "hidden_activation"},
        attention_bias=True,
        head_dim=256,
        window="typed",
        window_pattern=6,
        numbers={"logit_softcap": Number("final_logit_softcapping", None, null=True)},
        scaled_embeddings=True,
        query_scalar=True,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        gguf="phi3",
        models="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
        written=_NO_PADDING,
        absent={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        window="every",
        partial_rotary=1.0,
        rope_types=("default", "longrope"),
        # As transformers reads the files of early days.
        rope_kinds={"su": "longrope", "yarn": "longrope"},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        gguf="olmo2",
        models="OLMo 2",
        neutral=_NO_WINDOW,
        written=_NO_PADDING,
        absent={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        qk_norm_whole=True,
        attention_bias=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        gguf="smollm3",
        models="SmolLM3",
        written=_NO_PADDING,
        absent={"max_position_embeddings": 32_768, "num_key_value_heads": 4, "tie_word_embeddings": True},
        attention_bias=True,
        mlp_bias=True,
        window="flagged",
        rope_theta=2_000_000.0,
        unrotated_layers=True,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        gguf="gptneox",
        models="Pythia, GPT-NeoX 20B, Dolly 2",
        # The names of other families, which transformers does not read in this one.
        neutral={"partial_rotary_factor": (None,), "rope_theta": (None,), **_NO_WINDOW},
        absent={"attention_bias": True, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
                "use_parallel_residual": True},
        layer_norm=True,
        gated_mlp=False,
        activation="gelu",
        attention_bias=True,
        mlp_biased=True,
        divisible=True,
        heads_alike=True,
        spelling={"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base",
                  "partial_rotary_factor": "rotary_pct"},
        parallel_residual=True,
        partial_rotary=0.25,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        gguf="granite",
        models="Granite 3, dense models",
        neutral=_NO_WINDOW,
        absent={"max_position_embeddings": 2048},
        attention_bias=True,
        mlp_bias=True,
        numbers={
            "attention_scale": Number("attention_multiplier", 1.0),
            "embedding_multiplier": Number("embedding_multiplier", 1.0),
            "logit_divisor": Number("logits_scaling", 1.0),
            "residual_multiplier": Number("residual_multiplier", 1.0),
        },
    ),
    "nanochat": Family(
        "NanoChatForCausalLM",
        gguf="",
        models="nanochat of before 11 January 2026, as its d32",
        neutral=_NO_WINDOW,
        absent={"max_position_embeddings": 2048},
        weightless_norms=True,
        embedding_norm=True,
        gated_mlp=False,
        activation="relu_squared",
        # transformers normalises queries and keys behind their rotation, which changes no lengths where cosines and
        # sines have no factor.
        qk_norm=True,
        rope_types=("default", "linear", "dynamic", "llama3"),
        attention_bias=True,
        numbers={"logit_softcap": Number("final_logit_softcapping", 15.0, null=True)},
        rotated_backwards=True,
    ),
}  # fmt: skip
"""The families that are computed, by transformers' `model_type`."""
