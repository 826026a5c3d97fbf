"""Tiny random networks for tests: no vocabulary, no files, milliseconds to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.quantize import int8_product
from topkapi.model.transformer import Decoder, initialise


def tiny_config(family: str = "qwen3", **changes: Any) -> ModelConfig:
    gpt2 = family == "gpt2"
    values: dict[str, Any] = {
        "family": family, "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 4 if gpt2 else 2, "head_dim": 8, "context_length": 64,
        "qkv_bias": family in ("gpt2", "qwen2"), "output_bias": gpt2, "mlp_bias": gpt2, "end_token_ids": (0,),
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def tiny_model(family: str = "qwen3", seed: int = 0, scale: float = 4.0, **changes: Any) -> Decoder:
    """A random network whose next-token distributions are far from uniform (`scale` multiplies the matrices)."""
    model = Decoder(tiny_config(family, **changes))
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
