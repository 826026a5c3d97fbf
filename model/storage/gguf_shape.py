"""A network's shape in a GGUF file's header, and what of it llama.cpp has no form for."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.rotary import rotary_angles

# Architectures that may have biases in attention, and those that must.
_MAY_BE_BIASED, _MUST_BE_BIASED = ("llama", "qwen2", "gpt2", "gptneox"), ("gptneox",)
# Every n-th layer has no positions.
_UNROTATED = {"smollm3": 4}
_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


_NONLINEARITIES = {"gelu": "exact GELU", "gelu_tanh": "GELU by tanh", "silu": "SiLU", "relu_squared": "squared ReLU"}


def check_shape(config: ModelConfig) -> None:
    """Raise `CheckpointError` for what llama.cpp would not compute of this network as it is, by the field's name."""
    traits, architecture = config.traits, config.traits.gguf
    if not architecture:
        raise CheckpointError(
            f"llama.cpp has no architecture for the family {config.family}",
            field="model_type",
            hint="topkapi serve computes it as it is, and topkapi export safetensors writes it for others",
        )
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    layers = range(config.num_layers)
    windows = [window is not None for window in config.layer_windows]
    biased = config.output_bias or (config.qkv_bias and not traits.qkv_bias)
    period = _UNROTATED.get(architecture)
    unrotated = tuple(layer for layer in layers if period and (layer + 1) % period == 0)
    no_positions = f"positions but in every {period}th layer" if period else "layers without positions"
    windowed = any(config.window(layer) is not None for layer in layers)
    everywhere = windows or [False] * len(layers)
    scalings = ("default", "dynamic", "linear", "yarn")
    known_scaling = kind in scalings or (kind, architecture) in (("llama3", "llama"), ("longrope", "phi3"))
    local = (config.local_rope or {}).get("rope_type", "default")
    gemma2 = architecture == "gemma2"
    problems: list[tuple[str, bool, str]] = [
        ("attention_bias", biased and architecture not in _MAY_BE_BIASED, "biases in attention"),
        ("attention_bias", architecture in _MUST_BE_BIASED and not config.qkv_bias, "attention without biases"),
        ("mlp_bias", config.mlp_bias and architecture in ("smollm3", "granite"), "biases in feed-forward layers"),
        ("activation", config.nonlinearity != traits.activation, _NONLINEARITIES.get(config.nonlinearity, "such")),
        ("layer_windows", windowed and traits.window != "typed" and architecture != "phi3", "window of attention"),
        (
            "layer_windows",
            gemma2 and everywhere != [layer % 2 == 0 for layer in layers],
            "windows in other layers than every second",
        ),
        ("layer_windows", architecture == "phi3" and len(set(windows)) > 1, "windows in some layers alone"),
        ("unrotated_layers", config.unrotated_layers != unrotated, no_positions),
        ("rope_scaling", not known_scaling, f"scaling of the type {kind}"),
        ("rope_scaling", kind == "yarn" and _odd_yarn(config), "yarn of such factors"),
        ("local_rope", local != "default", "scaling of the positions of layers with a window"),
        ("attention_scale", traits.query_scalar and not _usual_scale(config), "such a query_pre_attn_scalar"),
        ("softcaps", gemma2 and None in (config.attention_softcap, config.logit_softcap), "networks without soft caps"),
        ("tie_embeddings", gemma2 and not config.tie_embeddings, "output matrix of its own"),
    ]
    for field, there, problem in problems:
        if there:
            raise CheckpointError(
                f"llama.cpp's {architecture} has no {problem}, this checkpoint has",
                field=field,
                hint="topkapi serve computes it as it is, and topkapi export safetensors writes it for others",
            )


def _odd_yarn(config: ModelConfig) -> bool:
    """Whether llama.cpp, which reads the factor and the original length alone, would compute something else."""
    scaling = config.rope_scaling or {}
    usual = 1.0 if scaling["factor"] <= 1 else 0.1 * math.log(scaling["factor"]) + 1.0
    rope = config.rope(next(layer for layer in range(config.num_layers) if config.rope(layer)))
    assert rope is not None, "there is a scaling"
    other = scaling.get("beta_fast", 32) != 32 or scaling.get("beta_slow", 1) != 1 or not scaling.get("truncate", True)
    return other or not math.isclose(rotary_angles(rope)[1], usual, rel_tol=1e-6)


def _usual_scale(config: ModelConfig) -> bool:
    by_width = config.num_layers == _BY_WIDTH.get(config.traits.gguf)
    size = config.hidden_size // config.num_heads if by_width else config.head_dim
    return config.attention_scale is None or math.isclose(config.attention_scale, size**-0.5, rel_tol=1e-6)


def add_shape(package: ModuleType, writer: Any, config: ModelConfig) -> None:
    """Write the shape of `config`."""
    traits = config.traits
    writer.add_context_length(config.declared_context or config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_vocab_size(config.vocab_size)
    (writer.add_layer_norm_eps if traits.layer_norm else writer.add_layer_norm_rms_eps)(config.norm_eps)
    if config.learned_positions:
        return
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(int(config.head_dim * config.partial_rotary_factor))
    writer.add_rope_freq_base(config.rope_theta)
    _add_scaling(package, writer, config)
    window = next((each for each in config.layer_windows if each is not None), None)
    if traits.window == "typed":
        writer.add_sliding_window(window or 0)
        if traits.gguf == "gemma3" and window:
            writer.add_sliding_window_pattern([each is not None for each in config.layer_windows])
    elif traits.gguf == "phi3":
        writer.add_sliding_window(window or 0)
        original = (config.rope_scaling or {}).get("original_max_position_embeddings", config.context_length)
        writer.add_rope_scaling_orig_ctx_len(original)
    if config.local_rope is not None:
        writer.add_float32(f"{traits.gguf}.rope.freq_base_swa", config.local_rope["rope_theta"])
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if traits.parallel_residual:
        writer.add_parallel_residual(config.parallel_residual)
    if "embedding_multiplier" in traits.numbers:
        writer.add_attention_scale(config.attention_scale)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logit_divisor)


def _add_scaling(package: ModuleType, writer: Any, config: ModelConfig) -> None:
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(package.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if kind == "longrope":
        rope = config.rope(0)
        assert rope is not None, "there is a scaling"
        writer.add_rope_scaling_type(package.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(rotary_angles(rope)[1])
