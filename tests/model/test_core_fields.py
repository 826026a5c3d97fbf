"""The native core is asked for no network that it would compute otherwise than PyTorch."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from tests.tiny import tiny_config, tiny_model
from topkapi.model import native, serving
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


def test_every_field_is_known_or_left_to_pytorch() -> None:
    known = {each.name for each in fields(ModelConfig)}
    assert known >= COMPUTED and set(CHANGES) == (known - COMPUTED) | {"activation", "layer_windows", "rope_scaling"}
    assert {each.name for each in fields(Family)} >= TRAITS


@pytest.mark.parametrize("field", CHANGES)
def test_what_the_core_does_not_compute_is_left_to_pytorch(field: str) -> None:
    config = tiny_config("llama")
    assert not beyond_core(config)
    assert beyond_core(replace(config, **{field: CHANGES[field]})) == [field]


def test_what_changes_nothing_is_left_to_the_core() -> None:
    config = tiny_config("mistral", layer_windows=(64, 64))
    assert not beyond_core(config)
    assert not beyond_core(replace(config, rope_scaling={**YARN, "attention_factor": 1.0}))
    assert not beyond_core(replace(config, declared_context=128, end_token_ids=(1, 2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_served_by_what_computes_it(family: str) -> None:
    model = tiny_model(family)
    serving.prepare(model)
    by_core = bool(native.levels()) and not beyond_core(model.config)
    assert (model.core is not None) == by_core
    assert serving.kernels(model).startswith("native" if by_core else "PyTorch")
    if family in ("gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "granite"):
        assert beyond_core(model.config)


def test_a_precision_that_is_asked_for_is_not_dropped_where_pytorch_computes() -> None:
    with pytest.raises(CheckpointError, match="int4 needs the native core") as caught:
        serving.prepare(tiny_model("gemma2"), "int4")
    assert caught.value.field == "dtype" and "norm_offset" in caught.value.message
    model = tiny_model("gemma2")
    try:
        serving.prepare(model, "int8")
    except CheckpointError as error:
        assert "int8" in error.message
    else:
        assert model.held_in == "int8"
