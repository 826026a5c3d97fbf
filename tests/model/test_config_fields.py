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
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES
from topkapi.model.storage.tensors import from_hugging_face
from topkapi.model.transformer import Decoder

HONOURED, REFUSED = "honoured", "refused unless it changes nothing"
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
    "hidden_act": REFUSED,
    "hidden_size": HONOURED,
    "intermediate_size": HONOURED,
    "max_position_embeddings": HONOURED,
    "num_attention_heads": HONOURED,
    "num_hidden_layers": HONOURED,
    "num_key_value_heads": HONOURED,
    "rms_norm_eps": HONOURED,
    "rope_parameters": HONOURED,
    # The older spellings.
    "original_max_position_embeddings": HONOURED,
    "partial_rotary_factor": REFUSED,
    "rope_scaling": HONOURED,
    "rope_theta": HONOURED,
}
QWEN = {
    "layer_types": REFUSED,
    "max_window_layers": "no effect: use_sliding_window is refused",
    "sliding_window": "no effect: use_sliding_window is refused",
    "use_sliding_window": REFUSED,
}
SUMMARY = "no effect: GPT2DoubleHeadsModel's other head"
FIELDS: dict[str, dict[str, str]] = {
    "gpt2": COMMON | SHARED | {
        "activation_function": REFUSED,
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
    "mistral": COMMON | LLAMA_LIKE | {"sliding_window": REFUSED},
    "qwen2": COMMON | LLAMA_LIKE | QWEN,
    "qwen3": COMMON | LLAMA_LIKE | QWEN | {"attention_bias": HONOURED},
}  # fmt: skip

ROPE_FIELDS = {
    "attention_factor": REFUSED,
    "beta_fast": REFUSED,
    "beta_slow": REFUSED,
    "factor": HONOURED,
    "high_freq_factor": HONOURED,
    "long_factor": REFUSED,
    "low_freq_factor": HONOURED,
    "mrope_section": REFUSED,
    "mscale": REFUSED,
    "mscale_all_dim": REFUSED,
    "original_max_position_embeddings": HONOURED,
    "partial_rotary_factor": REFUSED,
    "rope_theta": HONOURED,
    "rope_type": HONOURED,
    "short_factor": REFUSED,
    "truncate": REFUSED,
}

SIZES = {"vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2},
    **{family: {"model_type": family, **SIZES} for family in ("llama", "qwen2", "qwen3")},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None},
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
    "attention_bias": [True],
    "attention_chunk_size": [8],
    "configuration_files": [["config.4.0.0.json"]],
    "fusion_config": [{"a": 1}],
    "head_dim": [16],
    "hidden_act": ["gelu", "relu", "swish"],
    "hidden_size": [64],
    "intermediate_size": [56],
    "is_causal": [False, None, True],
    "is_encoder_decoder": [True],
    "kv_sharing_modes": [["own", "reuse"]],
    "layer_norm_epsilon": [0.1, 0.0],
    "layer_types": [["sliding_attention"] * 2, ["full_attention", "chunked_attention"], ["full_attention"] * 2,
                    ["full_attention"]],
    "max_position_embeddings": [50],
    "mlp_bias": [True],
    "mlp_layer_types": [["sparse", "sparse"]],
    "n_embd": [64],
    "n_head": [2],
    "n_inner": [24, None, 0],
    "n_layer": [1],
    "n_positions": [50],
    "num_attention_heads": [2],
    "num_hidden_layers": [1],
    "num_key_value_heads": [1, 4, None],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "per_layer_config": [{"0": {"intermediate_size": 24}}],
    "quantization_config": [{"quant_method": "fp8"}],
    "rms_norm_eps": [0.1, 0.0],
    "rope_parameters": [{"rope_type": "linear", "factor": 3.0}, {"rope_theta": 300.0}, {"type": "yarn", "factor": 2.0}],
    "rope_scaling": [{"type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 2.0}],
    "rope_theta": [300.0],
    "scale_attn_by_inverse_layer_idx": [True],
    "scale_attn_weights": [False],
    "sliding_window": [8],
    "tie_word_embeddings": [True, False],
    "transformers_weights": ["other.safetensors"],
    "use_sliding_window": [True],
    "vocab_size": [48],
}  # fmt: skip
ELSEWHERE = {
    "bos_token_id": "test_token_ids_are_read",
    "eos_token_id": "test_token_ids_are_read",
    "model_type": "test_families",
}


def cases() -> list[tuple[str, str, Any]]:
    return [
        (family, name, value)
        for family in FAMILIES
        for name, fate in FIELDS[family].items()
        if fate in (HONOURED, REFUSED) and name not in ELSEWHERE
        for value in CHANGED[name]
        # transformers 5 refuses it there, which older ones took for as many as there are heads.
        if (family, name, value) != ("mistral", "num_key_value_heads", None)
    ]


@pytest.mark.parametrize(("family", "name", "value"), cases())
def test_a_changed_field_gives_transformers_logits_or_a_refusal_that_names_it(
    family: str, name: str, value: Any
) -> None:
    config = BASES[family] | {name: value}
    if name == "original_max_position_embeddings":
        config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if name == "sliding_window" and family != "gpt2" and FIELDS[family][name] != REFUSED:
        return
    try:
        ModelConfig.from_hugging_face(config)
    except CheckpointError as error:
        assert name in str(error) and (error.field or "").startswith(name), error
        assert FIELDS[family][name] != HONOURED or value in (
            0,
            CHANGED["rope_parameters"][2],
            CHANGED["rope_scaling"][1],
        )
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
        "experts_implementation": "eager", "dtype": "float32",
    }  # fmt: skip
    without = {name for name, fate in FIELDS[family].items() if fate not in (HONOURED, REFUSED)} - {"n_ctx"}
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
    assert difference(config) <= 1e-4
    written = ModelConfig.from_hugging_face(config).to_hugging_face()
    assert ModelConfig.from_hugging_face(written) == ModelConfig.from_hugging_face(config)
    assert difference(written) <= 1e-4


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_parameters": DEFAULT, "rope_scaling": YARN}, "rope_scaling"),
        ({"rope_parameters": YARN}, "rope_parameters"),
        ({"rope_parameters": YARN, "rope_scaling": {}}, "rope_parameters"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "rope_scaling"),
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
        value = data.draw(st.sampled_from([DEFAULT, LINEAR, LLAMA3])) | {inner: value}
    config = BASES[family] | {name: value}
    try:
        read = ModelConfig.from_hugging_face(config)
    except CheckpointError as error:
        assert error.field is not None
        return
    if fields[name] not in (HONOURED, REFUSED) or name.endswith("_token_id"):
        config.pop(name)
    if read.parameter_count() > 10**6 or read.vocab_size < 40 or (family == "gpt2" and read.context_length < 48):
        return
    try:
        model = reference(config)
    except Exception:  # what transformers does not open at all leaves nothing to be compared with
        # An int for a float, a null for what has a default: nothing that could be meant otherwise.
        assert read == ModelConfig.from_hugging_face(_plain(config, name))
        return
    with torch.no_grad():
        theirs = model(TOKENS_READ).logits
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
        for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_epsilon", "tie_word_embeddings"):
            config.pop(name, None)
        theirs, read = transformers.AutoConfig.for_model(**config), None
        try:
            read = ModelConfig.from_hugging_face(config)
        except CheckpointError as error:
            assert error.field == "num_kv_heads" and theirs.num_key_value_heads > theirs.num_attention_heads
            continue
        assert read.num_kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
        assert read.tie_embeddings == theirs.tie_word_embeddings
