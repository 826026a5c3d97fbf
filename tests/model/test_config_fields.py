"""Every field of transformers' configurations, and what becomes of it here.

A field is honoured, refused by its name, or has no effect on the result and the table says why. Fields that a later
transformers adds make the table incomplete and the test fail.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from topkapi.model.config import ModelConfig
from topkapi.model.decoding.stopping import check_prompt
from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.families import FAMILIES
from topkapi.model.storage.tensors import from_hugging_face
from topkapi.model.transformer import Decoder

HONOURED, REFUSED = "honoured", "refused unless it changes nothing"
PARTLY = "honoured, but for values that are refused"
TRAINING = "no effect on what is served: it acts in training, whose recipes have their own"
OUTPUTS = "no effect: which intermediate results a call returns"
LABELS = "no effect: classifiers' heads"
KIND = "no effect: how memory is used or work is split, with the same results"
TOKENS = "no effect: what is padded is never looked at"
STORED = "no effect: what is stored decides; see what --dtype holds matrices in"
PROVENANCE = "no effect: who wrote the file"

COMMON = {
    "architectures": "no effect: model_type decides, in transformers' AutoModelForCausalLM as here",
    "chunk_size_feed_forward": KIND,
    "dtype": STORED,
    "id2label": LABELS,
    "is_encoder_decoder": REFUSED,
    "label2id": LABELS,
    "output_hidden_states": OUTPUTS,
    "problem_type": LABELS,
    "return_dict": OUTPUTS,
    "transformers_version": PROVENANCE,
    # Not fields of the class, but read from any configuration.
    "_name_or_path": PROVENANCE,
    "attention_chunk_size": REFUSED,
    "attn_implementation": KIND,
    "auto_map": "no effect: nobody's code is run, in transformers neither unless it is told to",
    "configuration_files": REFUSED,
    "experts_implementation": KIND,
    "fusion_config": REFUSED,
    "is_causal": REFUSED,
    "kv_sharing_modes": REFUSED,
    "layer_types": REFUSED,
    "mlp_layer_types": REFUSED,
    "model_type": HONOURED,
    "name_or_path": PROVENANCE,
    "num_labels": LABELS,
    "output_attentions": OUTPUTS,
    "per_layer_config": REFUSED,
    "quantization_config": REFUSED,
    "tie_last_hidden_states": OUTPUTS,
    "torch_dtype": STORED,
    "transformers_weights": REFUSED,
}
SHARED = {
    "bos_token_id": HONOURED,
    "eos_token_id": HONOURED,
    "initializer_range": TRAINING,
    "pad_token_id": TOKENS,
    "tie_word_embeddings": HONOURED,
    "use_cache": KIND,
    "vocab_size": HONOURED,
}
LLAMA_LIKE = SHARED | {
    "attention_dropout": TRAINING,
    "head_dim": HONOURED,
    "hidden_act": PARTLY,
    "hidden_size": HONOURED,
    "intermediate_size": HONOURED,
    "max_position_embeddings": HONOURED,
    "num_attention_heads": HONOURED,
    "num_hidden_layers": HONOURED,
    "num_key_value_heads": HONOURED,
    "rms_norm_eps": HONOURED,
    "rope_parameters": PARTLY,
    # The older spellings.
    "original_max_position_embeddings": HONOURED,
    "partial_rotary_factor": REFUSED,
    "rope_scaling": PARTLY,
    "rope_theta": HONOURED,
}
WINDOWS = {
    "layer_types": PARTLY,
    "sliding_window": HONOURED,
    "use_sliding_window": HONOURED,
}
QWEN = WINDOWS | {"max_window_layers": HONOURED}
GEMMA = {name: fate for name, fate in LLAMA_LIKE.items() if name != "hidden_act"} | {
    "attention_bias": HONOURED,
    "attn_logit_softcapping": HONOURED,
    "final_logit_softcapping": HONOURED,
    "hidden_activation": PARTLY,
    "layer_types": PARTLY,
    "query_pre_attn_scalar": HONOURED,
    "sliding_window": PARTLY,
    "sliding_window_pattern": REFUSED,
    "use_bidirectional_attention": REFUSED,
}
NEOX = SHARED | {
    "attention_bias": HONOURED,
    "attention_dropout": TRAINING,
    "classifier_dropout": LABELS,
    "head_dim": REFUSED,
    "hidden_act": PARTLY,
    "hidden_dropout": TRAINING,
    "hidden_size": HONOURED,
    "intermediate_size": HONOURED,
    "is_decoder": KIND,
    "layer_norm_eps": HONOURED,
    "max_position_embeddings": HONOURED,
    "num_attention_heads": HONOURED,
    "num_hidden_layers": HONOURED,
    "num_key_value_heads": REFUSED,
    "original_max_position_embeddings": HONOURED,
    "partial_rotary_factor": REFUSED,
    "rope_parameters": PARTLY,
    "rope_scaling": PARTLY,
    "rope_theta": REFUSED,
    "rotary_emb_base": HONOURED,
    "rotary_pct": HONOURED,
    "use_parallel_residual": HONOURED,
}
SUMMARY = "no effect: GPT2DoubleHeadsModel's other head"
FIELDS: dict[str, dict[str, str]] = {
    "gpt2": COMMON | SHARED | {
        "activation_function": PARTLY,
        "add_cross_attention": REFUSED,
        "attn_pdrop": TRAINING,
        "embd_pdrop": TRAINING,
        "layer_norm_epsilon": HONOURED,
        "n_ctx": "read where n_positions is absent, as files of before 2021 have it",
        "n_embd": HONOURED,
        "n_head": HONOURED,
        "n_inner": HONOURED,
        "n_layer": HONOURED,
        "n_positions": HONOURED,
        "reorder_and_upcast_attn": "no effect: attention is summed in float32 either way",
        "resid_pdrop": "honoured in training",
        "scale_attn_by_inverse_layer_idx": REFUSED,
        "scale_attn_weights": REFUSED,
        "sliding_window": REFUSED,
        "summary_activation": SUMMARY,
        "summary_first_dropout": SUMMARY,
        "summary_proj_to_labels": SUMMARY,
        "summary_type": SUMMARY,
        "summary_use_proj": SUMMARY,
    },
    "llama": COMMON | LLAMA_LIKE | {
        "attention_bias": HONOURED,
        "mlp_bias": HONOURED,
        "pretraining_tp": KIND,
        "sliding_window": REFUSED,
    },
    "mistral": COMMON | LLAMA_LIKE | {"sliding_window": HONOURED},
    "qwen2": COMMON | LLAMA_LIKE | QWEN,
    "qwen3": COMMON | LLAMA_LIKE | QWEN | {"attention_bias": HONOURED},
    "gemma2": COMMON | GEMMA,
    "gemma3_text": COMMON | GEMMA | {
        "attn_logit_softcapping": REFUSED, "original_max_position_embeddings": REFUSED,
        "rope_local_base_freq": HONOURED, "sliding_window_pattern": HONOURED,
    },
    "phi3": COMMON | LLAMA_LIKE | {
        "embd_pdrop": TRAINING, "partial_rotary_factor": HONOURED, "resid_pdrop": TRAINING, "sliding_window": HONOURED,
    },
    "olmo2": COMMON | LLAMA_LIKE | {"attention_bias": HONOURED, "sliding_window": REFUSED},
    "smollm3": COMMON | LLAMA_LIKE | WINDOWS | {
        "attention_bias": HONOURED, "mlp_bias": HONOURED, "no_rope_layer_interval": HONOURED,
        "no_rope_layers": HONOURED,
    },
    "gpt_neox": COMMON | NEOX | {"sliding_window": REFUSED},
    "nanochat": COMMON | LLAMA_LIKE | {
        "attention_bias": HONOURED, "final_logit_softcapping": HONOURED, "sliding_window": REFUSED,
    },
    "granite": COMMON | LLAMA_LIKE | {
        "attention_bias": HONOURED, "attention_multiplier": HONOURED, "embedding_multiplier": HONOURED,
        "logits_scaling": HONOURED, "mlp_bias": HONOURED, "residual_multiplier": HONOURED, "sliding_window": REFUSED,
    },
}  # fmt: skip

ROPE_FIELDS = {
    "attention_factor": HONOURED,
    "beta_fast": HONOURED,
    "beta_slow": HONOURED,
    "factor": HONOURED,
    "high_freq_factor": HONOURED,
    "long_factor": HONOURED,
    "low_freq_factor": HONOURED,
    "mrope_section": REFUSED,
    "mscale": HONOURED,
    "mscale_all_dim": HONOURED,
    "original_max_position_embeddings": HONOURED,
    "partial_rotary_factor": PARTLY,
    "rope_theta": HONOURED,
    "rope_type": HONOURED,
    "short_factor": HONOURED,
    "truncate": PARTLY,
}

SIZES = {"vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2},
    **{
        family: {"model_type": family, **SIZES, "pad_token_id": None}
        for family in ("llama", "olmo2", "granite", "nanochat")
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None},
    **{
        family: {
            "model_type": family,
            **SIZES,
            "use_sliding_window": True,
            "sliding_window": 11,
            "max_window_layers": 1,
        }
        for family in ("qwen2", "qwen3")
    },
    **{
        family: {"model_type": family, **SIZES, "sliding_window": 11, "query_pre_attn_scalar": 12, "pad_token_id": None}
        for family in ("gemma2", "gemma3_text")
    },
    "phi3": {"model_type": "phi3", **SIZES, "sliding_window": 11, "pad_token_id": None},
    "smollm3": {
        "model_type": "smollm3",
        **SIZES,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 11,
        "pad_token_id": None,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        **{name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")},
    },
}
TOKENS_READ = torch.randint(0, 40, (1, 48), generator=torch.Generator().manual_seed(5))


def reference(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """transformers' model of a config.json with random weights, the same for the same shapes."""
    parsed = transformers.AutoConfig.for_model(**copy.deepcopy(dict(config)))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(parsed).eval().float()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def ours(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits that Topkapi computes of a config.json and transformers' weights."""
    read = ModelConfig.from_hugging_face(config)
    model = Decoder(read)
    found = dict(from_hugging_face(read, iter(state.items())))
    if read.tie_embeddings:
        found["lm_head.weight"] = found["embed_tokens.weight"]
    model.load_state_dict(found)
    with torch.no_grad():
        return model.eval()(TOKENS_READ, torch.arange(TOKENS_READ.shape[1]).unsqueeze(0))


def difference(config: Mapping[str, Any]) -> float:
    """How far the logits are from transformers', relative to the largest of them."""
    model = reference(config)
    with torch.no_grad():
        theirs = model(TOKENS_READ).logits
    return ((ours(config, model.state_dict()) - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_transformers_is_in_the_table(family: str) -> None:
    known = {field.name for field in dataclasses.fields(transformers.CONFIG_MAPPING[family])}
    assert known <= set(FIELDS[family]), "say what becomes of a new field, and see to it"
    assert set(transformers.CONFIG_MAPPING[family].attribute_map) <= {
        "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"
    }  # fmt: skip


def test_every_rotary_parameter_of_transformers_is_in_the_table() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    assert set(RopeParameters.__annotations__) == set(ROPE_FIELDS)
    kinds = {"linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}
    assert set(ROPE_INIT_FUNCTIONS) - {"default"} == kinds, "a new kind is to be refused by its name, or computed"


CHANGED: dict[str, list[Any]] = {
    "activation_function": ["gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"],
    "add_cross_attention": [True, False],
    "attention_bias": [True, False],
    "attention_chunk_size": [8],
    "attention_multiplier": [0.2],
    "attn_logit_softcapping": [0.4, None],
    "configuration_files": [["config.4.0.0.json"]],
    "embedding_multiplier": [3],
    "final_logit_softcapping": [0.4, None],
    "fusion_config": [{"a": 1}],
    "head_dim": [16],
    "hidden_act": ["gelu", "relu", "swish", "gelu_pytorch_tanh", "relu2"],
    "hidden_activation": ["gelu", "relu", "silu"],
    "hidden_size": [64],
    "intermediate_size": [56],
    "is_causal": [False, None, True],
    "is_encoder_decoder": [True],
    "kv_sharing_modes": [["own", "reuse"]],
    "layer_norm_eps": [0.1, 0.0],
    "layer_norm_epsilon": [0.1, 0.0],
    "layer_types": [["sliding_attention"] * 2, ["full_attention", "chunked_attention"], ["full_attention"] * 2,
                    ["full_attention"], ["sliding_attention", "full_attention"]],
    "logits_scaling": [3],
    "max_position_embeddings": [50],
    "max_window_layers": [0, 5],
    "mlp_bias": [True],
    "mlp_layer_types": [["sparse", "sparse"]],
    "n_embd": [64],
    "n_head": [2],
    "n_inner": [24, None, 0],
    "n_layer": [1],
    "n_positions": [50],
    "no_rope_layer_interval": [1, 3],
    "no_rope_layers": [[0, 1], [1, 1, 0], None],
    "num_attention_heads": [2],
    "num_hidden_layers": [1],
    "num_key_value_heads": [1, 4, None],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "per_layer_config": [{"0": {"intermediate_size": 24}}],
    "quantization_config": [{"quant_method": "fp8"}],
    "query_pre_attn_scalar": [20],
    "residual_multiplier": [0.2],
    "rms_norm_eps": [0.1, 0.0],
    "rope_parameters": [{"rope_type": "linear", "factor": 3.0}, {"rope_theta": 300.0}, {"type": "yarn", "factor": 2.0},
                        {"rope_type": "proportional", "factor": 2.0}],
    "rope_local_base_freq": [50.0],
    "rope_scaling": [{"type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 2.0}],
    "rope_theta": [300.0],
    "rotary_emb_base": [300.0],
    "rotary_pct": [0.5, 1.0],
    "scale_attn_by_inverse_layer_idx": [True],
    "scale_attn_weights": [False],
    "sliding_window": [8, None, 64],
    "sliding_window_pattern": [1, 2, 3, None],
    "tie_word_embeddings": [True, False],
    "transformers_weights": ["other.safetensors"],
    "use_bidirectional_attention": [True, False, None],
    "use_parallel_residual": [False],
    "use_sliding_window": [True, False],
    "vocab_size": [48],
}  # fmt: skip
ELSEWHERE = {
    "bos_token_id": "test_token_ids_are_read",
    "eos_token_id": "test_token_ids_are_read",
    "model_type": "test_families",
}


UNOPENED = {
    # transformers 5 refuses it there, which older ones took for as many as there are heads.
    *((family, "num_key_value_heads", "None") for family in ("mistral", "gemma2", "gemma3_text")),
    ("gemma3_text", "sliding_window_pattern", "None"),
    ("phi3", "partial_rotary_factor", "None"),
    # Two rotated components are too few for its formula.
    ("gpt_neox", "rope_scaling", str({"rope_type": "dynamic", "factor": 2.0})),
}
"""What transformers does not open at all: nothing can be compared."""


def cases() -> list[tuple[str, str, Any]]:
    return [
        (family, name, value)
        for family in FAMILIES
        for name, fate in FIELDS[family].items()
        if fate in (HONOURED, PARTLY, REFUSED) and name not in ELSEWHERE
        for value in CHANGED[name]
        if (family, name, str(value)) not in UNOPENED
    ]


@pytest.mark.parametrize(("family", "name", "value"), cases())
def test_a_changed_field_gives_transformers_logits_or_a_refusal_that_names_it(
    family: str, name: str, value: Any
) -> None:
    config = BASES[family] | {name: value}
    if name == "original_max_position_embeddings":
        factors = {"short_factor": [1.5] * 4, "long_factor": [9.0] * 4}
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config["rope_scaling"] = {"rope_type": "longrope", **factors} if family == "phi3" else scaling
        config[name] = 50 if family == "phi3" else value
    try:
        ModelConfig.from_hugging_face(config)
    except CheckpointError as error:
        assert name in str(error) and (error.field or "").startswith(name), error
        assert FIELDS[family][name] != HONOURED or value == 0
        return
    assert difference(config) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_without_effect_have_none_in_transformers(family: str) -> None:
    """Set to something else, all of them at once, the logits of transformers stay what they were."""
    other = {
        "initializer_range": 0.5, "use_cache": False, "pad_token_id": 3, "output_hidden_states": True,
        "chunk_size_feed_forward": 4, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1},
        "problem_type": "regression", "architectures": ["Other"], "transformers_version": "4.0.0",
        "auto_map": {"AutoModelForCausalLM": "a.B"}, "tie_last_hidden_states": True, "torch_dtype": "float16",
        "_name_or_path": "x", "name_or_path": "y", "return_dict": True, "output_attentions": False, "num_labels": 2,
        "attention_dropout": 0.5, "pretraining_tp": 2, "sliding_window": 8, "max_window_layers": 1,
        "attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5, "reorder_and_upcast_attn": False,
        "summary_activation": "tanh", "summary_first_dropout": 0.5, "summary_proj_to_labels": False,
        "summary_type": "last", "summary_use_proj": False, "attn_implementation": "eager",
        "experts_implementation": "eager", "dtype": "float32", "classifier_dropout": 0.5, "hidden_dropout": 0.5,
        "is_decoder": True,
    }  # fmt: skip
    without = {name for name, fate in FIELDS[family].items() if fate not in (HONOURED, PARTLY, REFUSED)} - {"n_ctx"}
    assert without <= set(other)
    config = BASES[family] | {name: value for name, value in other.items() if name in without}
    plain = reference(BASES[family])
    with torch.no_grad():
        expected = plain(TOKENS_READ).logits
        changed = reference(config)(TOKENS_READ).logits
    assert torch.allclose(expected, changed, atol=1e-5 * expected.abs().max().item())
    assert difference(config) <= 1e-4


# Rotary positions

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.0, 8.0]}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 500.0},
        {"rope_scaling": None, "rope_theta": 500},
        {"rope_scaling": {}, "rope_parameters": {}},
        {"rope_parameters": DEFAULT},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": None},
        {"rope_parameters": LINEAR},
        {"rope_parameters": LINEAR, "rope_theta": 500.0},
        {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
        {"rope_parameters": {"type": "linear", "factor": 4}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}, "rope_theta": 500.0},
        {"rope_scaling": LINEAR, "rope_parameters": DEFAULT},
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 10000.0}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 500.0},
        {"rope_scaling": LINEAR | {"rope_theta": 500.0}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16, "rope_theta": 500.0}},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 500.0},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 16},
        {"rope_parameters": DEFAULT, "original_max_position_embeddings": 16},
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_parameters": YARN | {"factor": None}},
        {"rope_parameters": YARN | {"rope_theta": 500.0, "attention_factor": 1.5}},
        {"rope_parameters": YARN | {"attention_factor": 0.0}},
        {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}},
        {"rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": None}},
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.5}},
        {"rope_parameters": YARN | {"mscale": 0.7}},
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0}},
        {"rope_parameters": YARN | {"factor": 0.5}},
        {"rope_parameters": YARN, "original_max_position_embeddings": 16},
        {"rope_scaling": DYNAMIC},
        {"rope_parameters": DYNAMIC | {"rope_theta": 500.0}},
        {"rope_scaling": LONG},
        {"rope_scaling": LONG | {"attention_factor": 1.2}},
        {"rope_scaling": LONG | {"factor": 3.0}},
        {"rope_scaling": LONG | {"original_max_position_embeddings": 48}},
        {"rope_scaling": LONG, "original_max_position_embeddings": 50},
        {"partial_rotary_factor": None},
        {"partial_rotary_factor": None, "rope_scaling": LINEAR},
        {"partial_rotary_factor": 1.0, "rope_parameters": LINEAR},
        {"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {**DEFAULT, "partial_rotary_factor": None, "attention_factor": None}},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotary_positions_are_those_of_transformers(family: str, rope: dict[str, Any]) -> None:
    config = BASES[family] | rope
    if family == "qwen3":
        config |= {"use_sliding_window": False}
    assert difference(config) <= 1e-4
    written = ModelConfig.from_hugging_face(config).to_hugging_face()
    assert ModelConfig.from_hugging_face(written) == ModelConfig.from_hugging_face(config)
    assert difference(written) <= 1e-4


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_parameters": {"rope_type": "proportional"}, "rope_scaling": {}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor"),
        ({"rope_parameters": YARN | {"beta_fast": -1}}, "rope_parameters.beta_fast"),
        ({"rope_parameters": YARN | {"attention_factor": "1"}}, "rope_parameters.attention_factor"),
        ({"rope_parameters": YARN | {"truncate": 0}}, "rope_parameters.truncate"),
        ({"rope_parameters": YARN | {"short_factor": [1.0]}}, "rope_parameters.short_factor"),
        ({"rope_scaling": DYNAMIC | {"original_max_position_embeddings": 32}},
         "rope_scaling.original_max_position_embeddings"),
        ({"rope_scaling": LONG | {"short_factor": [1.0, 2.0]}}, "rope_scaling.short_factor"),
        ({"rope_scaling": LONG | {"long_factor": None}}, "rope_scaling.long_factor"),
        ({"rope_scaling": LONG | {"long_factor": [1.0, 2.0, 0.0, 1.0]}}, "rope_scaling.long_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.short_factor"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": None}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor"),
        ({"rope_scaling": LINEAR | {"attention_factor": 1.2}}, "rope_scaling.attention_factor"),
        ({"rope_parameters": DEFAULT | {"mscale": 0.7}}, "rope_parameters.mscale"),
        ({"rope_parameters": LLAMA3 | {"beta_fast": 32}}, "rope_parameters.beta_fast"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "rope_parameters.full_attention"),
        ({"rope_parameters": LINEAR, "rope_scaling": LLAMA3}, "rope_parameters.rope_type"),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 2.0}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": LINEAR}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 600.0}, "rope_theta"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}, "original_max_position_embeddings": 16},
         "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": LINEAR | {"factor": None}}, "rope_scaling.factor"),
        ({"rope_scaling": LINEAR | {"factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": LINEAR | {"factor": "4"}}, "rope_scaling.factor"),
        ({"rope_scaling": LINEAR | {"factor": float("nan")}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
         "rope_scaling.original_max_position_embeddings"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": None}, "rope_theta": 500.0}, "rope_parameters.rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": [LINEAR]}, "rope_parameters"),
    ],
    ids=str,
)  # fmt: skip
def test_rotary_positions_that_are_not_computed_are_refused(rope: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face(BASES["llama"] | rope)
    assert caught.value.field == field
    assert all(part in str(caught.value) for part in field.split("."))


def test_longrope_holds_up_to_the_length_before_which_its_factors_change() -> None:
    """A text of exactly that length has the short factors still. Beyond, transformers reads every token anew with other
    angles, which nothing in a cache would survive."""
    config = BASES["phi3"] | {"original_max_position_embeddings": 48, "rope_scaling": LONG}
    read = ModelConfig.from_hugging_face(config)
    assert (read.context_length, read.declared_context) == (48, 64)
    assert difference(config) <= 1e-4
    written = read.to_hugging_face()
    assert (written["max_position_embeddings"], written["original_max_position_embeddings"]) == (64, 48)
    with pytest.raises(InvalidRequest) as told:
        check_prompt([1] * 48, read)
    assert "declares 64, but beyond 48 its longrope positions" in (told.value.hint or "")
    with pytest.raises(CheckpointError, match="48 tokens, not for 49") as caught:
        dataclasses.replace(read, context_length=49)
    assert caught.value.field == "context_length"


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi3s_former_names_of_longrope_are_known(kind: str) -> None:
    inside = LONG | {"type": kind, "original_max_position_embeddings": 50}
    config = BASES["phi3"] | {"original_max_position_embeddings": 50, "rope_scaling": inside}
    config["rope_scaling"].pop("rope_type")
    assert difference(config) <= 1e-4
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face(BASES["phi3"] | {"rope_scaling": LINEAR})
    assert caught.value.field == "rope_scaling" and "longrope" in str(caught.value.hint)


GLOBAL, LOCAL = (
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    {"rope_theta": 50.0, "rope_type": "default"},
)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 500.0, "rope_local_base_freq": 50.0},
        {"rope_scaling": LINEAR, "rope_local_base_freq": 50.0},
        {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}},
        {"rope_parameters": {"full_attention": GLOBAL}, "rope_local_base_freq": 70.0},
        {"rope_parameters": {"full_attention": None, "sliding_attention": LOCAL}, "rope_theta": 70.0},
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": LINEAR}},
        {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": LOCAL}, "rope_scaling": LINEAR},
    ],
    ids=str,
)
def test_layers_with_a_window_have_positions_of_their_own(rope: dict[str, Any]) -> None:
    config = BASES["gemma3_text"] | {"sliding_window_pattern": 2} | rope
    assert difference(config) <= 1e-4
    written = ModelConfig.from_hugging_face(config).to_hugging_face()
    assert ModelConfig.from_hugging_face(written) == ModelConfig.from_hugging_face(config)
    assert difference(written) <= 1e-4


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_parameters": LINEAR}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"full_attention": LINEAR}, "rope_scaling": LLAMA3},
         "rope_parameters.full_attention.rope_type"),
        ({"rope_parameters": {"sliding_attention": LOCAL}, "rope_local_base_freq": 60.0}, "rope_local_base_freq"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
         "rope_parameters.sliding_attention.factor"),
        ({"rope_parameters": {"full_attention": YARN | {"truncate": False}}},
         "rope_parameters.full_attention.truncate"),
        ({"rope_parameters": {"sliding_attention": LONG | {"original_max_position_embeddings": 32}}},
         "rope_parameters.sliding_attention.rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
    ids=str,
)  # fmt: skip
def test_positions_of_two_kinds_that_are_not_computed_are_refused(rope: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face(BASES["gemma3_text"] | rope)
    assert caught.value.field == field


# Windows


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("mistral", {"sliding_window": 8}, (8, 8)),
        ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, (8, 8)),
        # The first layers see everything, as many as the number says; the older reading was the other way round.
        ("qwen2", {"max_window_layers": 0}, (11, 11)),
        ("qwen2", {"max_window_layers": 1}, (None, 11)),
        ("qwen2", {"max_window_layers": 2}, ()),
        ("qwen2", {"use_sliding_window": False}, ()),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, (11, None)),
        ("gemma2", {}, (11, None)),
        ("gemma3_text", {}, (11, 11)),
        ("gemma3_text", {"sliding_window_pattern": 1}, ()),
        ("smollm3", {}, (None, 11)),
        ("smollm3", {"no_rope_layers": [0, 1]}, (11, None)),
        ("smollm3", {"layer_types": ["sliding_attention", "attention"]}, (11, None)),
    ],
)
def test_which_layers_have_a_window(family: str, change: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = BASES[family] | change
    read = ModelConfig.from_hugging_face(config)
    assert read.layer_windows == windows
    assert difference(config) <= 1e-4
    assert ModelConfig.from_hugging_face(read.to_hugging_face()) == read


@pytest.mark.parametrize(
    ("family", "change", "field"),
    [
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("qwen2", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("qwen2", {"max_window_layers": None}, "max_window_layers"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
    ],
)
def test_windows_that_are_not_computed_are_refused(family: str, change: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face(BASES[family] | change)
    assert caught.value.field == field


# Odd values

JSON_NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.sampled_from([10**12, 2**31, 2**63, 10**400]),
                         st.floats(), st.sampled_from([0.0, -0.0, 1e308, 5e-324]))  # fmt: skip
ODD = st.one_of(
    st.none(), st.booleans(), JSON_NUMBERS, st.text(max_size=6), st.sampled_from(["2", "true", "silu", "default"]),
    st.lists(JSON_NUMBERS, max_size=3), st.dictionaries(st.text(max_size=4), JSON_NUMBERS, max_size=2),
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_odd_value_is_refused_by_name_or_gives_transformers_logits(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    fields = {name: fate for name, fate in FIELDS[family].items() if name not in ("model_type",)}
    name = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(ODD)
    inner = data.draw(st.sampled_from([None, *sorted(ROPE_FIELDS), "type"]))
    if name in ("rope_scaling", "rope_parameters") and inner is not None:
        value = data.draw(st.sampled_from([DEFAULT, LINEAR, LLAMA3, YARN, DYNAMIC, LONG])) | {inner: value}
    config = BASES[family] | {name: value}
    try:
        read = ModelConfig.from_hugging_face(config)
    except CheckpointError as error:
        assert error.field is not None
        return
    if fields[name] not in (HONOURED, PARTLY, REFUSED) or name.endswith("_token_id"):
        config = BASES[family]
    if read.parameter_count() > 10**6 or read.vocab_size < 40 or read.context_length < 48:
        return
    try:
        model = reference(config)
        with torch.no_grad():
            theirs = model(TOKENS_READ).logits
    except Exception:  # what transformers does not open, or compute (a window of 2**63), can't be compared with
        # An int for a float, a null for what has a default: nothing that could be meant otherwise.
        assert read == ModelConfig.from_hugging_face(_plain(config, name))
        return
    if theirs.isfinite().all():
        assert (ours(config, model.state_dict()) - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def _plain(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config[name]
    if value is None:
        return {key: other for key, other in config.items() if key != name}
    if isinstance(value, dict):
        return config | {name: {key: other for key, other in value.items() if other is not None}}
    return config | {name: float(value) if isinstance(value, int) and name.endswith(("eps", "epsilon")) else value}


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("eos_token_id", "2", "eos_token_id"),
        ("eos_token_id", [1, "2"], "eos_token_id"),
        ("eos_token_id", True, "eos_token_id"),
        ("eos_token_id", 2.0, "eos_token_id"),
        ("bos_token_id", "1", "bos_token_id"),
        ("bos_token_id", [1], "bos_token_id"),
        ("num_hidden_layers", 10**9, "num_layers"),
        ("vocab_size", 10**400, "vocab_size"),
        ("num_key_value_heads", 0, "num_key_value_heads"),
        ("num_key_value_heads", 3, "num_kv_heads"),
        ("attention_bias", "false", "attention_bias"),
        ("tie_word_embeddings", None, "tie_word_embeddings"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps"),
        ("hidden_size", 33, "num_attention_heads"),
        ("head_dim", 7, "head_dim"),
    ],
)
def test_odd_values_are_named(name: str, value: object, field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face(
            BASES["llama"] | {name: value} | ({"head_dim": None} if name == "hidden_size" else {})
        )
    assert caught.value.field == field


def test_token_ids_are_read() -> None:
    read = ModelConfig.from_hugging_face(BASES["llama"] | {"bos_token_id": 3, "eos_token_id": [4, 5]})
    assert (read.begin_token_id, read.end_token_ids) == (3, (4, 5))
    read = ModelConfig.from_hugging_face(BASES["llama"] | {"bos_token_id": None, "eos_token_id": 4})
    assert (read.begin_token_id, read.end_token_ids) == (None, (4,))


def test_gpt2s_fields_have_two_names() -> None:
    common = {"n_embd": 9, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = {"model_type": "gpt2", "vocab_size": 40, "max_position_embeddings": 64, **common}
    assert difference(config) <= 1e-4
    older = {"model_type": "gpt2", "vocab_size": 40, "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
    assert ModelConfig.from_hugging_face(older).context_length == 64


def test_absent_fields_are_what_transformers_takes() -> None:
    assert difference(BASES["llama"] | {"head_dim": None}) <= 1e-4
    for family in FAMILIES:
        config = dict(BASES[family])
        for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_epsilon", "tie_word_embeddings",
                     "layer_norm_eps", "attention_bias", "sliding_window", "query_pre_attn_scalar"):  # fmt: skip
            config.pop(name, None)
        theirs, read = transformers.AutoConfig.for_model(**config), None
        try:
            read = ModelConfig.from_hugging_face(config)
        except CheckpointError as error:
            assert error.field == "num_kv_heads" and theirs.num_key_value_heads > theirs.num_attention_heads
            continue
        assert read.num_kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
        assert read.tie_embeddings == theirs.tie_word_embeddings
        assert read.norm_eps == getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_eps", 1e-5))
