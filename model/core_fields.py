"""Which networks the native core computes, by the fields of their configuration.

What the core does not compute, PyTorch does. The tables name what the core knows; any other field, and one that is new,
must have the value under which it changes nothing.
"""

from __future__ import annotations

from dataclasses import fields

from topkapi.model.config import ModelConfig
from topkapi.model.families import Family

COMPUTED = {
    "family", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "context_length", "norm_eps", "rope_theta", "rope_scaling", "local_rope", "partial_rotary_factor",
    "unrotated_layers", "qkv_bias", "output_bias", "mlp_bias", "tie_embeddings", "activation", "layer_windows",
    "attention_scale", "attention_softcap", "logit_softcap", "logit_divisor", "embedding_multiplier",
    "residual_multiplier", "parallel_residual",
    # They act in training only, or say how long a text may be and where it ends.
    "dropout", "declared_context", "begin_token_id", "end_token_ids",
}  # fmt: skip
"""Fields of `ModelConfig`."""

TRAITS = {
    "learned_positions", "layer_norm", "gated_mlp", "qk_norm", "qk_norm_whole", "norms", "norm_offset", "activation",
    "scaled_embeddings", "weightless_norms", "embedding_norm", "rotated_backwards",
    # They say how files are read and written; what comes of them stands in the configuration.
    "architecture", "gguf", "models", "neutral", "absent", "written", "qkv_bias", "attention_bias", "mlp_bias",
    "mlp_biased", "head_dim", "window", "window_pattern", "divisible", "heads_alike", "spelling", "numbers",
    "query_scalar", "parallel_residual", "rope_theta", "local_rope_theta", "partial_rotary", "rope_types", "rope_kinds",
    "unrotated_layers",
}  # fmt: skip
"""Fields of `Family`."""


def beyond_core(config: ModelConfig) -> list[str]:
    """What of `config` the native core does not compute; empty where it computes the network."""
    found = [
        each.name for each in fields(config) if each.name not in COMPUTED and getattr(config, each.name) != each.default
    ]
    return found + [each.name for each in fields(Family)
                    if each.name not in TRAITS and getattr(config.traits, each.name) != each.default]  # fmt: skip
