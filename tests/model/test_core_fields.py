"""The native core is asked for no network that it would compute otherwise than PyTorch."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.model.test_native import held, logits, text
from tests.tiny import tiny_config, tiny_model
from topkapi.model import core_fields, native, serving
from topkapi.model.config import ModelConfig
from topkapi.model.core_fields import COMPUTED, TRAITS, beyond_core
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES, Family

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CHANGES: dict[str, Any] = {
    "activation": "gelu",
    "attention_scale": 0.3,
    "attention_softcap": 2.0,
    "embedding_multiplier": 2.0,
    "layer_windows": (None, 8),
    "local_rope": {"rope_type": "default", "rope_theta": 100.0},
    "logit_divisor": 2.0,
    "logit_softcap": 2.0,
    "parallel_residual": True,
    "partial_rotary_factor": 0.5,
    "residual_multiplier": 0.5,
    "rope_scaling": YARN,
    "unrotated_layers": (1,),
}


def test_every_field_is_known() -> None:
    """A field that is new is left to PyTorch until the core computes it; these are all, so far."""
    assert {each.name for each in fields(ModelConfig)} == COMPUTED
    assert {each.name for each in fields(Family)} == TRAITS


@pytest.mark.skipif(not native.levels(), reason="the native core was not built: there was no compiler")
@pytest.mark.parametrize("field", CHANGES)
def test_the_core_computes_each_field(field: str) -> None:
    # Rotary positions of their own are those of layers with a window.
    base = tiny_config("llama", layer_windows=(None, 8) if field == "local_rope" else ())
    config = replace(base, **{field: CHANGES[field]})
    plain = tiny_model(config=config, scale=8.0)
    token_ids = text(plain)
    expected, without = logits(plain, token_ids), logits(tiny_model(config=base, scale=8.0), token_ids)
    assert (expected - without).norm() / expected.norm() > 1e-2
    rounded = None
    for level in native.levels():
        found = logits(held(tiny_model(config=config, scale=8.0), "float32", level), token_ids)
        assert (found - expected).norm() / expected.norm() < 1e-6, level
        found = logits(held(tiny_model(config=config, scale=8.0), "int8", level, threads=2), token_ids)
        assert rounded is None or torch.equal(found, rounded), level
        rounded = found


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu_squared", "silu"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.skipif(not native.levels(), reason="the native core was not built: there was no compiler")
def test_the_core_computes_each_nonlinearity(family: str, activation: str) -> None:
    """Over small and large numbers; GELU's two forms are not taken for one another."""
    for scale in (0.3, 30.0):
        plain = tiny_model(family, scale=scale, activation=activation)
        token_ids = text(plain)
        expected = logits(plain, token_ids)
        for level in native.levels():
            found = logits(held(tiny_model(family, scale=scale, activation=activation), "float32", level), token_ids)
            assert (found - expected).norm() / expected.norm() < 1e-5, (level, scale)


@pytest.mark.parametrize("field", ["attention_softcap", "unrotated_layers"])
def test_what_the_core_does_not_compute_is_left_to_pytorch(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_fields, "COMPUTED", COMPUTED - {field})
    assert not beyond_core(tiny_config("llama"))
    model = tiny_model(config=replace(tiny_config("llama"), **{field: CHANGES[field]}))
    assert beyond_core(model.config) == [field]
    with pytest.raises(CheckpointError, match="int4 needs the native core") as caught:
        serving.prepare(model, "int4")
    assert caught.value.field == "dtype" and field in caught.value.message
    serving.prepare(model)
    assert model.core is None and serving.kernels(model).startswith("PyTorch")


def test_what_changes_nothing_is_left_to_the_core() -> None:
    config = tiny_config("mistral", layer_windows=(64, 64))
    assert not beyond_core(config)
    assert not beyond_core(replace(config, rope_scaling={**YARN, "attention_factor": 1.0}))
    assert not beyond_core(replace(config, declared_context=128, end_token_ids=(1, 2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_served_by_what_computes_it(family: str) -> None:
    model = tiny_model(family)
    serving.prepare(model)
    assert not beyond_core(model.config)
    assert (model.core is not None) == bool(native.levels())
    assert serving.kernels(model).startswith("native" if native.levels() else "PyTorch")
