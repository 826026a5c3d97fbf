"""Rotary positions (Su et al. 2021): the angle of each pair of a head's numbers, as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topkapi.model.config import ModelConfig, Rope


def rotary_angles(rope: Rope) -> tuple[Tensor, float]:
    """Inverse frequencies `[ceil(dimensions / 2)]` float32, below zero where they turn backwards, and what cosines and
    sines are multiplied by."""
    frequencies, factor = _scaled(rope)
    return -frequencies if rope.backwards else frequencies, factor


def _scaled(rope: Rope) -> tuple[Tensor, float]:
    exponents = torch.arange(0, rope.dimensions, 2, dtype=torch.int64).float() / rope.dimensions
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / float(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(rope, exponents), _yarn_factor(scaling)
    if kind == "longrope":
        # The short factors: no longer text is computed (`ModelConfig`).
        factors = torch.tensor(scaling["short_factor"], dtype=torch.float32)
        return 1.0 / (factors * rope.theta**exponents), _longrope_factor(rope)
    # `dynamic` changes nothing up to the length that the network was made for, and no longer text is computed.
    return frequencies, 1.0


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies `[dimensions / 2]` float32 of the layers that see everything before them."""
    dimensions = int(config.head_dim * config.partial_rotary_factor)
    context = config.declared_context or config.context_length
    return rotary_angles(Rope(config.rope_theta, dimensions, config.rope_scaling or {}, context))[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `x [B, heads, T, D]` with `cos`, `sin [B, 1, T, R / 2]`, halves paired as in Llama.

    The first R of the D numbers of a head are rotated.
    """
    x, rotated = x.float(), 2 * cos.shape[-1]
    first, second = x[..., :rotated].chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rotated < x.shape[-1]:
        parts.append(x[..., rotated:])
    return torch.cat(parts, dim=-1)


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, between, stretched)


def _yarn(rope: Rope, exponents: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023): fast components are kept, slow ones stretched, by a ramp between them."""
    scaling, dimensions = rope.scaling, rope.dimensions
    original = scaling["original_max_position_embeddings"]

    def turning(rotations: float) -> float:
        """The component that turns so many times within the original length."""
        return dimensions * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turning(scaling.get("beta_fast") or 32), turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dimensions // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = rope.theta**exponents
    kept = 1 - ramp
    return 1.0 / (float(scaling["factor"]) * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_factor(scaling: Mapping[str, Any]) -> float:
    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, weight, whole = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    return magnitude(factor, weight) / magnitude(factor, whole) if weight and whole else magnitude(factor)


def _longrope_factor(rope: Rope) -> float:
    """LongRoPE's (Ding et al. 2024), which holds for short texts, too."""
    scaling = rope.scaling
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or rope.context / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
