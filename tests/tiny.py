"""Tiny random networks for tests: no vocabulary, no files, milliseconds to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.quantize import int8_product
from topkapi.model.transformer import Decoder, initialise

# What a configuration of each family has beside the sizes.
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"num_kv_heads": 4, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True},
    "gemma2": {"layer_windows": (5, None), "attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 8**-0.5},
    "gemma3_text": {"layer_windows": (5, 5), "attention_scale": 8**-0.5, "rope_theta": 1e6,
                    "local_rope": {"rope_type": "default", "rope_theta": 1e4}},
    "phi3": {"layer_windows": (5, 5), "partial_rotary_factor": 0.75},
    "gpt_neox": {"num_kv_heads": 4, "qkv_bias": True, "output_bias": True, "mlp_bias": True,
                 "parallel_residual": True, "partial_rotary_factor": 0.5},
    "granite": {"attention_scale": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logit_divisor": 2.0},
}  # fmt: skip


def tiny_config(family: str = "qwen3", **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "family": family, "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "context_length": 64, "end_token_ids": (0,),
    }  # fmt: skip
    values |= OWN.get(family, {}) | changes
    if "attention_scale" in values and family.startswith("gemma"):
        values["attention_scale"] = values["head_dim"] ** -0.5
    return ModelConfig(**values)


def tiny_model(
    family: str = "qwen3", seed: int = 0, scale: float = 4.0, *, config: ModelConfig | None = None, **changes: Any
) -> Decoder:
    """A random network whose next-token distributions are far from uniform (`scale` multiplies the matrices)."""
    model = Decoder(config or tiny_config(family, **changes))
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model.eval().requires_grad_(False)


def skip_without_int8() -> None:
    """Skip the running test on a processor for which int8 is refused: test_quantize.py holds what is said there."""
    try:
        int8_product("cpu")
    except CheckpointError as error:
        pytest.skip(str(error))


def run_by(monkeypatch: Any, network: Any, run: Callable[..., Any]) -> None:
    """Have a network's passes be run by something else, which sees each of them: it goes no step ahead."""
    monkeypatch.setattr(network, "run", run)
    monkeypatch.setattr(network, "steps", lambda *_: [])
