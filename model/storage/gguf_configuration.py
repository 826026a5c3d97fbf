"""The header of a GGUF file as a Hugging Face configuration, by llama.cpp's rules for each architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES, Family
from topkapi.model.storage.gguf_names import ARCHITECTURES
from topkapi.model.storage.gguf_sampling import decimal

LONG_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
OTHER_TENSORS = ("rope_freqs.weight", *LONG_FACTORS.values())
"""Tensors that say something of the configuration."""

# How many layers llama.cpp knows the networks by whose attention is scaled by the width rather than a head's size.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_PERIODS = {"gemma2": 2, "gemma3": 6}
"""Every n-th layer sees everything."""


class Header:
    """The keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata, self.architecture = metadata, architecture

    def field(self, name: str, default: Any = None) -> Any:
        """A value, the same in every layer. Raises `CheckpointError` for one that is absent without a default."""
        key = f"{self.architecture}.{name}"
        if default is None and key not in self.metadata:
            raise CheckpointError(f"the GGUF file lacks {key}", field=key)
        value = self.metadata.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(f"{key} differs between layers, which is not supported", field=key)
            value = value[0]
        return value

    def number(self, name: str, default: float) -> float:
        """A number as it was meant; zero stands for the default, as in llama.cpp."""
        return decimal(self.field(name, default)) or default


def configuration(metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the network whose header and tensors these are."""
    header = Header(metadata, architecture)
    field = header.field
    if "token_embd.weight" not in tensors:
        raise CheckpointError("the GGUF file lacks the tensor token_embd.weight")
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) == 2}
    family = ARCHITECTURES[architecture]
    traits = FAMILIES[family]
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float16" if "F16" in kinds else "bfloat16" if kinds == {"BF16"} else "float32",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    hidden, heads = int(field("embedding_length")), int(field("attention.head_count"))
    if architecture == "gpt2":
        return config | {
            "n_embd": hidden,
            "n_head": heads,
            "n_layer": int(field("block_count")),
            "n_positions": int(field("context_length")),
            "n_inner": int(field("feed_forward_length")),
            "layer_norm_epsilon": decimal(field("attention.layer_norm_epsilon")),
            "activation_function": "gelu_new",
        }
    if int(field("expert_count", 0)):
        key = f"{architecture}.expert_count"
        raise CheckpointError(f"mixtures of experts are not supported ({key})", field=key)
    head_dim = int(field("attention.key_length", hidden // heads))
    rotated = int(field("rope.dimension_count", head_dim))
    for name, value in (("attention.value_length", int(field("attention.value_length", head_dim))),
                        ("rope.dimension_count", rotated if traits.partial_rotary is None else head_dim)):  # fmt: skip
        if value != head_dim:
            raise CheckpointError(
                f"{architecture}.{name} other than the size of a head is not supported", field=f"{architecture}.{name}"
            )
    norm = "layer_norm_epsilon" if traits.layer_norm else "layer_norm_rms_epsilon"
    qkv = "attn_qkv" if "blk.0.attn_qkv.weight" in tensors else "attn_q"
    theta = float(field("rope.freq_base", 10_000.0))
    return config | {
        "hidden_size": hidden,
        "intermediate_size": int(field("feed_forward_length")),
        "num_hidden_layers": int(field("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(field("context_length")),
        traits.spelling.get("rms_norm_eps", "rms_norm_eps"): decimal(field(f"attention.{norm}")),
        traits.spelling.get("rope_theta", "rope_theta"): theta,
        "rope_scaling": _rope_scaling(header, tensors, head_dim),
        "attention_bias": f"blk.0.{qkv}.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **_of_family(header, traits, hidden // heads, head_dim, rotated),
    }


def _of_family(header: Header, traits: Family, head_width: int, head_dim: int, rotated: int) -> dict[str, Any]:
    """What one family alone has."""
    found: dict[str, Any] = {}
    architecture, layers = header.architecture, int(header.field("block_count"))
    if traits.partial_rotary is not None:
        part = rotated / head_dim
        # The part whose product, cut to a whole number, is that again.
        part = part if int(head_dim * part) == rotated else math.nextafter(part, 1.0)
        found[traits.spelling.get("partial_rotary_factor", "partial_rotary_factor")] = part
    if "original_max_position_embeddings" in traits.absent:
        context = int(header.field("context_length"))
        found["original_max_position_embeddings"] = int(header.field("rope.scaling.original_context_length", context))
    if traits.parallel_residual:
        found["use_parallel_residual"] = bool(header.field("use_parallel_residual"))
    if traits.query_scalar:
        by_width = layers == _SCALED_BY_WIDTH[architecture]
        found["query_pre_attn_scalar"] = head_width if by_width else head_dim
    if traits.local_rope_theta is not None:
        found["rope_local_base_freq"] = float(header.field("rope.freq_base_swa", traits.local_rope_theta))
    if traits.window == "every" and architecture != "llama":
        found["sliding_window"] = int(header.field("attention.sliding_window", 0)) or None
    if traits.window == "typed":
        found |= _windows(header, layers)
    if architecture in ("gemma2", "gemma3"):
        final = header.field("final_logit_softcapping", 30.0 if architecture == "gemma2" else 0.0)
        found["final_logit_softcapping"] = decimal(final) or None
        if architecture == "gemma2":
            found["attn_logit_softcapping"] = decimal(header.field("attn_logit_softcapping", 50.0))
    if architecture == "granite":
        if header.field("rope.scaling.finetuned", True) is False:
            key = "granite.rope.scaling.finetuned"
            raise CheckpointError(f"{key} = False: a network without positions is not supported", field=key)
        found |= {
            "attention_multiplier": header.number("attention.scale", head_dim**-0.5),
            "embedding_multiplier": header.number("embedding_scale", 1.0),
            "logits_scaling": header.number("logit_scale", 1.0),
            "residual_multiplier": header.number("residual_scale", 1.0),
        }
    return found


def _windows(header: Header, layers: int) -> dict[str, Any]:
    architecture = header.architecture
    window = int(header.field("attention.sliding_window", 4096 if architecture == "gemma2" else 0))
    key = f"{architecture}.attention.sliding_window_pattern"
    pattern = header.metadata.get(key, _PERIODS[architecture])
    if isinstance(pattern, list):
        local = [bool(each) for each in pattern]
    elif isinstance(pattern, int) and pattern >= 0:
        # A period of zero is none: every layer has the window.
        local = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(min(layers, 1 << 12))]
    else:
        raise CheckpointError(f"{key} must be a whole number or a list, not {pattern!r:.100}", field=key)
    if not window:
        return {"sliding_window": None, "layer_types": ["full_attention"] * len(local)}
    kinds = ["sliding_attention" if each else "full_attention" for each in local]
    return {"sliding_window": window, "layer_types": kinds}


def _rope_scaling(header: Header, tensors: Mapping[str, Any], head_dim: int) -> dict[str, Any] | None:
    metadata, architecture = header.metadata, header.architecture

    def key(name: str) -> str:
        return f"{architecture}.rope.{name}"

    # llama.cpp's rules: without a type it is linear; the factor has an older name; zero is one.
    kind = metadata.get(key("scaling.type"), "linear")
    used = key("scaling.factor" if key("scaling.factor") in metadata else "scale_linear")
    factor = metadata.get(used, 0.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 0:
        raise CheckpointError(f"the GGUF file's {used} must be a number of at least 0, not {factor!r:.100}", field=used)
    if LONG_FACTORS["short_factor"] in tensors and architecture == "phi3":
        return _longrope(header, tensors)
    if kind == "yarn" and architecture != "phi3":
        return _yarn(header, decimal(factor) or 1.0)
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"the GGUF file asks for {key('scaling.type')} = {kind!r:.100}, which is not supported",
            field=key("scaling.type"),
            hint="supported: none, linear, yarn, Llama 3's rope_freqs.weight, and phi3's rope_factors_long.weight",
        )
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if "rope_freqs.weight" in tensors:
        if architecture != "llama" or linear:
            raise CheckpointError(
                "the GGUF file's rope_freqs.weight is not supported "
                + ("together with linear scaling" if linear else f"in the architecture {architecture}"),
                field="rope_freqs.weight",
            )
        return _llama3_scaling(
            np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float64).ravel(),
            float(metadata.get(key("freq_base"), 10_000.0)),
            head_dim,
        )
    return {"rope_type": "linear", "factor": decimal(factor)} if linear else None


def _llama3_scaling(factors: np.ndarray[Any, np.dtype[np.float64]], theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's rotary scaling, of which GGUF keeps only the resulting divisor of each frequency.

    Its bounds are the same in every released model (1, 4 and 8192 positions); they are checked against the divisors.
    """
    factor, low, high, original = float(round(factors.max(), 4)), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError("the rotary scaling in rope_freqs.weight is not Llama 3's", field="rope_freqs.weight")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _yarn(header: Header, factor: float) -> dict[str, Any]:
    """YaRN as llama.cpp computes it: with its own factor of attention, which `attn_factor` multiplies."""
    key = f"{header.architecture}.rope.scaling."
    if header.metadata.get(f"{key}yarn_ext_factor", 1.0) != 1.0:
        raise CheckpointError(f"{key}yarn_ext_factor other than 1 is not supported", field=f"{key}yarn_ext_factor")
    original = int(header.field("rope.scaling.original_context_length", header.field("context_length")))
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if header.metadata.get(key + name):
            scaling[ours] = decimal(header.metadata[key + name])
    whole = decimal(header.field("rope.scaling.yarn_log_multiplier", 0.0))
    magnitude = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    if whole:
        magnitude /= 1.0 if factor <= 1 else 0.1 * whole * math.log(factor) + 1.0
    own = header.number("rope.scaling.yarn_attn_factor", 1.0) * header.number("rope.scaling.attn_factor", 1.0)
    if whole or own != 1.0:
        scaling["attention_factor"] = magnitude * own
    return scaling


def _longrope(header: Header, tensors: Mapping[str, Any]) -> dict[str, Any]:
    missing = next((name for name in LONG_FACTORS.values() if name not in tensors), None)
    if missing is not None:
        raise CheckpointError(f"the GGUF file lacks the tensor {missing}", field=missing)
    factors = {ours: [decimal(each) for each in np.asarray(tensors[name].data, dtype=np.float32).ravel().tolist()]
               for ours, name in LONG_FACTORS.items()}  # fmt: skip
    return {
        "rope_type": "longrope",
        **factors,
        "original_max_position_embeddings": int(header.field("rope.scaling.original_context_length")),
        "attention_factor": header.number("rope.scaling.attn_factor", 1.0),
    }
