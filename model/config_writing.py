"""The fields of a `ModelConfig` as Hugging Face's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topkapi.model.config_rope import write_rope
from topkapi.model.families import Family

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu_squared": "relu2"}


def written(traits: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a network whose `ModelConfig` has these `values`."""
    ends = values["end_token_ids"]
    activation = values["activation"] or traits.activation
    common: dict[str, Any] = {
        "model_type": values["family"],
        "architectures": [traits.architecture],
        "vocab_size": values["vocab_size"],
        "tie_word_embeddings": values["tie_embeddings"],
        "bos_token_id": values["begin_token_id"],
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
    }
    if values["family"] == "gpt2":
        return common | {
            "n_positions": values["context_length"],
            "n_embd": values["hidden_size"],
            "n_layer": values["num_layers"],
            "n_head": values["num_heads"],
            "n_inner": values["intermediate_size"],
            "activation_function": "gelu_new" if activation == "gelu_tanh" else _ACTIVATIONS[activation],
            "layer_norm_epsilon": values["norm_eps"],
            "resid_pdrop": values["dropout"],
            "embd_pdrop": values["dropout"],
            "attn_pdrop": values["dropout"],
            # transformers always has this bias: it is stored as zeros where the network was trained without.
            "qkv_bias": values["qkv_bias"],
        }
    context = values["declared_context"] or values["context_length"]
    rest: dict[str, Any] = {
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_hidden_layers": values["num_layers"],
        "num_attention_heads": values["num_heads"],
        "max_position_embeddings": context,
        traits.spelling.get("rms_norm_eps", "rms_norm_eps"): values["norm_eps"],
        traits.spelling.get("hidden_act", "hidden_act"): _ACTIVATIONS[activation],
        **write_rope(traits, values, context),
    }
    if not traits.heads_alike:
        rest |= {"num_key_value_heads": values["num_kv_heads"], "head_dim": values["head_dim"]}
    if traits.attention_bias:
        rest["attention_bias"] = values["qkv_bias"]
    if traits.mlp_bias:
        rest["mlp_bias"] = values["mlp_bias"]
    if traits.parallel_residual:
        rest["use_parallel_residual"] = values["parallel_residual"]
    if traits.query_scalar:
        scale = values["attention_scale"]
        scalar = values["head_dim"] if scale is None else scale**-2
        # transformers takes whole numbers alone, and all there are have one.
        whole = abs(scalar - round(scalar)) < 1e-6 * scalar
        rest["query_pre_attn_scalar"] = round(scalar) if whole else scalar
    if traits.unrotated_layers:
        layers = range(values["num_layers"])
        rest["no_rope_layers"] = [int(layer not in values["unrotated_layers"]) for layer in layers]
    rest |= {number.name: values[ours] for ours, number in traits.numbers.items()}
    return {**common, **rest, **_windows(traits, values), **traits.written}


def _windows(traits: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    if traits.window is None:
        return {}
    layers = values["num_layers"]
    windows = values["layer_windows"] or (None,) * layers
    size = next((window for window in windows if window is not None), None)
    if traits.window == "every":
        return {"sliding_window": size}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if traits.window == "typed":
        return {"sliding_window": size, "layer_types": kinds}
    if size is None:
        return {"use_sliding_window": False}
    first = kinds.index("sliding_attention")
    return {"use_sliding_window": True, "sliding_window": size, "max_window_layers": first, "layer_types": kinds}
