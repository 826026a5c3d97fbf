"""Every key of a GGUF header, by the gguf package's own list, and what becomes of it here.

A key is honoured, refused by its name, or has no effect on the result and the table says why; by llama.cpp's rules for
these architectures. Keys that a later package adds make the table incomplete and the test fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import texts
from tests.model.storage.test_gguf import COMMON, HEADS, SENTENCEPIECE, SPECIAL, VOCABULARY, minimal, write
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.storage.gguf import read_gguf
from topkapi.model.storage.gguf_keys import NO_EFFECT, READ, READ_OF, check_keys
from topkapi.model.storage.gguf_names import ARCHITECTURES
from topkapi.model.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

HONOURED, REFUSED = "honoured", "refused unless it is zero, false or empty"
RECORD = "no effect: who made the file, of what, and under which terms"
INFILL = "no effect: filling in a middle, which is not offered"
ELSEWHERE = "no effect: llama.cpp reads it for vocabularies of another kind, which are refused"

GENERAL = {
    "general.alignment": "honoured: where tensors lie",
    "general.architecture": HONOURED,
    "general.file_type": "no effect: each tensor has its own type",
    "general.quantization_version": "no effect: there is one",
    "general.type": "refused unless it is model",
    **{
        f"general.sampling.{ending}": HONOURED
        for ending in (
            "temp", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold", "penalty_last_n", "penalty_repeat",
            "mirostat", "mirostat_tau", "mirostat_eta",
        )
    },
    "general.sampling.sequence": REFUSED,
    **{
        f"general.{ending}": RECORD
        for ending in (
            "name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by",
            "size_label", "license", "license.name", "license.link", "url", "doi", "uuid", "repo_url", "source.url",
            "source.doi", "source.uuid", "source.repo_url", "tags", "languages",
        )
    },
    **{
        f"general.{kind}.{ending}": RECORD
        for kind in ("base_model", "dataset")
        for ending in (
            "count", "{id}.name", "{id}.author", "{id}.version", "{id}.organization", "{id}.description", "{id}.url",
            "{id}.doi", "{id}.uuid", "{id}.repo_url",
        )
    },
    "split.count": "refused unless it is at most 1",
    "split.no": "no effect where the file is whole",
    "split.tensors.count": "no effect where the file is whole",
}  # fmt: skip
TOKENIZER = {
    "tokenizer.chat_template": HONOURED,
    "tokenizer.chat_template.{name}": "honoured, as named templates of a directory are",
    "tokenizer.chat_templates": "no effect: the names of the named templates",
    "tokenizer.ggml.add_bos_token": HONOURED,
    "tokenizer.ggml.add_eos_token": REFUSED,
    "tokenizer.ggml.add_sep_token": REFUSED,
    "tokenizer.ggml.add_space_prefix": "honoured in SentencePiece vocabularies; llama.cpp reads it in no other",
    "tokenizer.ggml.bos_token_id": HONOURED,
    "tokenizer.ggml.eom_token_id": HONOURED,
    "tokenizer.ggml.eos_token_id": HONOURED,
    "tokenizer.ggml.eot_token_id": HONOURED,
    "tokenizer.ggml.fim_mid_token_id": INFILL,
    "tokenizer.ggml.fim_pad_token_id": HONOURED,
    "tokenizer.ggml.fim_pre_token_id": INFILL,
    "tokenizer.ggml.fim_rep_token_id": HONOURED,
    "tokenizer.ggml.fim_sep_token_id": HONOURED,
    "tokenizer.ggml.fim_suf_token_id": INFILL,
    "tokenizer.ggml.mask_token_id": ELSEWHERE,
    "tokenizer.ggml.merges": HONOURED,
    "tokenizer.ggml.middle_token_id": INFILL,
    "tokenizer.ggml.model": HONOURED,
    "tokenizer.ggml.padding_token_id": HONOURED,
    "tokenizer.ggml.pre": HONOURED,
    "tokenizer.ggml.precompiled_charsmap": ELSEWHERE,
    "tokenizer.ggml.prefix_token_id": INFILL,
    "tokenizer.ggml.remove_extra_whitespaces": ELSEWHERE,
    "tokenizer.ggml.scores": HONOURED,
    "tokenizer.ggml.seperator_token_id": ELSEWHERE,
    "tokenizer.ggml.suffix_token_id": INFILL,
    "tokenizer.ggml.token_type": HONOURED,
    "tokenizer.ggml.token_type_count": ELSEWHERE,
    "tokenizer.ggml.tokens": HONOURED,
    "tokenizer.ggml.unknown_token_id": "no effect: what no other token spells is spelt by bytes; types say the rest",
    "tokenizer.huggingface.json": "no effect: the other keys say the same, and llama.cpp reads those",
    "tokenizer.rwkv.world": ELSEWHERE,
}
OF_THE_ARCHITECTURE = {
    **dict.fromkeys(set(READ) - {"rope.scale_linear"}, HONOURED),  # the older name is no constant of the package
    **{name: f"no effect: {reason}" for name, reason in NO_EFFECT.items()},
    "attention.causal": "refused unless it is true",
    "attention.scale": "refused unless it is the usual one",
    "embedding_scale": "refused unless it is 1",
    "logit_scale": "refused unless it is 1",
    "residual_scale": "refused unless it is 1",
    "rope.scaling.attn_factor": "refused unless it is 1, but beside yarn and in phi3",
    "tensor_data_layout": "refused unless it is one of the two that stand for the usual one",
    **dict.fromkeys(
        (
            "activation_sparsity_scale", "altup.active_idx", "altup.num_inputs", "attention.clamp_kqv",
            "attention.decay_lora_rank", "attention.gate_lora_rank", "attention.group_norm_epsilon",
            "attention.group_norm_groups", "attention.iclr_lora_rank", "attention.indexer.head_count",
            "attention.indexer.key_length", "attention.indexer.top_k", "attention.key_length_mla",
            "attention.key_length_swa", "attention.kv_lora_rank", "attention.max_alibi_bias", "attention.output_scale",
            "attention.q_lora_rank", "attention.relative_buckets_count", "attention.shared_kv_layers",
            "attention.sliding_window", "attention.sliding_window_pattern", "attention.temperature_length",
            "attention.temperature_scale", "attention.value_length_mla", "attention.value_length_swa",
            "attention.value_residual_mix_lora_rank", "attn_logit_softcapping", "convnext.block_count",
            "convnext.embedding_length", "decoder_block_count", "decoder_start_token_id", "embedding_length_out",
            "embedding_length_per_layer_input", "expert_chunk_feed_forward_length", "expert_feed_forward_length",
            "expert_gating_func", "expert_group_count", "expert_group_scale", "expert_group_used_count",
            "expert_shared_count", "expert_shared_feed_forward_length", "expert_used_count", "expert_weights_norm",
            "expert_weights_scale", "experts_per_group", "features_length", "final_logit_softcapping",
            "full_attention_interval", "interleave_moe_layer_step", "kda.head_dim", "leading_dense_block_count",
            "moe_every_n_layers", "moe_latent_size", "n_deepstack_layers", "nextn_predict_layers",
            "posnet.block_count", "posnet.embedding_length", "rescale_every_n_layers", "rope.dimension_count_swa",
            "rope.dimension_sections", "rope.freq_base_swa", "rope.scaling.alpha", "router_logit_softcapping",
            "shortconv.l_cache", "ssm.conv_kernel", "ssm.dt_b_c_rms", "ssm.group_count", "ssm.inner_size",
            "ssm.state_size", "ssm.time_step_rank", "swiglu_clamp_exp", "swiglu_clamp_shexp", "swin_norm",
            "time_decay_extra_dim", "time_mix_extra_dim", "token_shift_count", "use_parallel_residual",
            "wkv.head_size", "{dense}_feat_in", "{dense}_feat_out",
        ),
        REFUSED,
    ),
}  # fmt: skip
OTHER_KINDS = ("Adapter", "Clip", "ClipAudio", "ClipVision", "Diffusion", "IMatrix", "xIELU")
"""Classes of keys of files that are no language model that continues texts: each key is refused."""


def constants(holder: type, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    for name, value in vars(holder).items():
        if isinstance(value, str) and not name.startswith("__"):
            yield value
        elif isinstance(value, type) and name not in leave_out:
            yield from constants(value)


def test_every_key_of_the_package_is_in_the_table() -> None:
    table = {*GENERAL, *TOKENIZER, *(f"{{arch}}.{name}" for name in OF_THE_ARCHITECTURE)}
    assert set(constants(gguf.Keys, leave_out=OTHER_KINDS)) == table, "say what becomes of a new key, and see to it"
    assert {name for name, value in vars(gguf.Keys).items() if isinstance(value, type)} == {
        "General", "LLM", "Attention", "Rope", "Split", "SSM", "KDA", "WKV", "PosNet", "ConvNext", "Classifier",
        "ShortConv", "Tokenizer", *OTHER_KINDS,
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_table_refuses_is_refused_by_its_name(architecture: str) -> None:
    own = {*READ_OF.get(architecture, ()), *(["rope.scaling.attn_factor"] if architecture == "phi3" else [])}
    refused = [
        f"{architecture}.{name}"
        for name, fate in OF_THE_ARCHITECTURE.items()
        if fate.startswith("refused") and name not in own
    ]
    refused += [name for name, fate in (GENERAL | TOKENIZER).items() if fate == REFUSED]
    refused += [key for kind in OTHER_KINDS for key in constants(getattr(gguf.Keys, kind))]
    refused += [f"{architecture}.something_new", "general.type"]
    for key in refused:
        for value in (7, 0.5, "something", [0, 3]):
            with pytest.raises(CheckpointError) as caught:
                check_keys({key: value}, architecture)
            assert caught.value.field == key and key in str(caught.value)
        if not key.endswith("attention.causal"):
            for value in (0, 0.0, False, "", [0, 0]):
                check_keys({key: value}, architecture)
    with pytest.raises(CheckpointError, match=r"attention\.causal = False"):
        check_keys({f"{architecture}.attention.causal": False}, architecture)


def test_what_has_no_effect_or_is_usual_is_taken() -> None:
    usual = {
        "general.type": "model", "qwen2.attention.causal": True, "qwen2.logit_scale": 1.0, "qwen2.expert_count": 0,
        "qwen2.tensor_data_layout": "Meta AI original pth", "qwen2.rope.scaling.attn_factor": 1.0,
        "qwen2.embedding_length": 64, "qwen2.attention.head_count": 4, "qwen2.attention.scale": 0.25,
        "tokenizer.ggml.add_eos_token": False, "quantize.imatrix.file": "x", "somebodys.note": "y",
        **{f"qwen2.{name}": 3 for name in NO_EFFECT},
        **{key: "z" for key, fate in (GENERAL | TOKENIZER).items() if fate.startswith("no effect")},
    }  # fmt: skip
    check_keys(usual, "qwen2")
    with pytest.raises(CheckpointError, match=r"attention\.scale = 0\.3"):
        check_keys(usual | {"qwen2.attention.scale": 0.3}, "qwen2")


# The numbers, in files

Change = Callable[[Any], None]
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def definition(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([texts.JOINED] * 2, VOCABULARY, SPECIAL).save(directory)
    read: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return read


def network(family: str = "llama", **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    parsed = transformers.AutoConfig.for_model(family, **COMMON, **HEADS, **changes)
    model = transformers.AutoModelForCausalLM.from_config(parsed).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.1)
    return model


def keys(**values: Any) -> Change:
    """Adds keys of the architecture, `__` standing for a dot."""

    def add(writer: Any) -> None:
        for name, value in values.items():
            key = f"{writer.arch}.{name.replace('__', '.')}"
            kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kind[type(value)](key, value)

    return add


def logits(path: Path) -> torch.Tensor:
    tokens = torch.arange(40).unsqueeze(0)
    with torch.inference_mode():
        return load_checkpoint(path).model(tokens, tokens)


@pytest.mark.parametrize(
    ("values", "scaled"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, True),
        ({"rope__scaling__factor": 4.0}, True),
        ({"rope__scale_linear": 4.0}, True),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4.0}, True),
        ({"rope__scaling__type": "linear", "rope__scale_linear": 4.0}, True),
        ({"rope__scale_linear": 4.0, "rope__scaling__original_context_length": 9}, True),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, False),
        ({"rope__scaling__type": "linear"}, False),
        ({"rope__scaling__factor": 0.0}, False),
        ({"rope__scaling__factor": 1.0, "rope__scale_linear": 4.0, "rope__scaling__finetuned": True}, False),
        ({"rope__dimension_count": 16, "attention__key_length": 16, "attention__value_length": 16}, False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_linear_scaling_has_three_spellings(
    family: str, values: dict[str, Any], scaled: bool, tmp_path: Path, definition: dict[str, Any]
) -> None:
    reference = network(family, rope_parameters=LINEAR) if scaled else network(family)
    write(tmp_path / "model.gguf", reference, definition, change=keys(**values))
    with torch.inference_mode():
        theirs = reference(torch.arange(40).unsqueeze(0)).logits
    assert (logits(tmp_path / "model.gguf") - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rope__scaling__type": "other", "rope__scaling__factor": 4.0}, "llama.rope.scaling.type"),
        ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type"),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": -1.0}, "llama.rope.scaling.factor"),
        ({"rope__scaling__factor": float("nan")}, "llama.rope.scaling.factor"),
        ({"rope__scale_linear": "4"}, "llama.rope.scale_linear"),
        ({"rope__scaling__attn_factor": 1.2}, "llama.rope.scaling.attn_factor"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count"),
        ({"attention__value_length": 8}, "llama.attention.value_length"),
        ({"attention__sliding_window": 32}, "llama.attention.sliding_window"),
        ({"attention__scale": 0.1}, "llama.attention.scale"),
        ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        ({"logit_scale": 0.5}, "llama.logit_scale"),
        ({"expert_count": 8}, "llama.expert_count"),
        ({"attention__causal": False}, "llama.attention.causal"),
    ],
    ids=str,
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    values: dict[str, Any], field: str, tmp_path: Path, definition: dict[str, Any]
) -> None:
    write(tmp_path / "model.gguf", network(), definition, change=keys(**values))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.gguf")
    assert caught.value.field == field and field in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_frequency_factors_are_llamas_alone_and_not_scaled_again(
    family: str, tmp_path: Path, definition: dict[str, Any]
) -> None:
    def add(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
        if family == "llama":
            writer.add_rope_scaling_factor(2.0)

    write(tmp_path / "model.gguf", network(family), definition, change=add)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not supported"):
        load_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.layer_norm_rms_epsilon", float("nan")), ("attention.layer_norm_rms_epsilon", -1.0),
        ("rope.freq_base", 0.0), ("rope.freq_base", float("inf")), ("attention.head_count", 0),
        ("block_count", 2**31), ("context_length", 0), ("embedding_length", "x"), ("attention.head_count_kv", 3),
        ("feed_forward_length", 2**31), ("attention.key_length", 15),
    ],
)  # fmt: skip
def test_odd_numbers_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    usual = {
        "context_length": 64, "embedding_length": 64, "block_count": 1, "attention.head_count": 4,
        "feed_forward_length": 96, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    for name, number in (usual | {key: value}).items():
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(number)]
        kind(f"llama.{name}", number)
    writer.add_tensor("token_embd.weight", np.zeros((300, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"odd\.gguf"):
        read_gguf(tmp_path / "odd.gguf")


# The vocabulary


def sentencepiece(writer: Any) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SENTENCEPIECE)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(SENTENCEPIECE) - 259)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(SENTENCEPIECE) - 259))


def test_a_sentencepiece_vocabulary_begins_and_ends_as_llama_cpp_has_it(tmp_path: Path) -> None:
    _, _, tokenizer, _, generation = read_gguf(minimal(tmp_path / "spm.gguf", sentencepiece))
    assert (tokenizer.begin_token_id, tokenizer.end_token_id, tokenizer.adds_begin_token) == (1, 2, True)
    assert generation == {"bos_token_id": 1, "eos_token_id": [2]}


def test_tokens_at_which_llama_cpp_ends_end_here(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        sentencepiece(writer)
        for number, name in enumerate(("eot", "eom", "fim_pad", "fim_rep", "fim_sep", "fim_pre"), start=100):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)

    _, _, _, _, generation = read_gguf(minimal(tmp_path / "spm.gguf", add))
    assert generation["eos_token_id"] == [2, 100, 101, 102, 103, 104]


@pytest.mark.parametrize("key", ["tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_sep_token"])
def test_tokens_after_a_text_are_refused(key: str, tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        sentencepiece(writer)
        writer.add_bool(key, True)

    with pytest.raises(CheckpointError) as caught:
        read_gguf(minimal(tmp_path / "spm.gguf", add))
    assert caught.value.field == key


def test_a_token_id_is_a_number(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        sentencepiece(writer)
        writer.add_string("tokenizer.ggml.eos_token_id", "2")

    with pytest.raises(CheckpointError, match="eos_token_id must be a token id"):
        read_gguf(minimal(tmp_path / "spm.gguf", add))


# Decoding defaults


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"temp": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}),
        ({"penalty_repeat": 1.1}, {"repetition_penalty": 1.1, "repetition_range": 64}),
        ({"penalty_repeat": 1.1, "penalty_last_n": 32}, {"repetition_penalty": 1.1, "repetition_range": 32}),
        ({"penalty_repeat": 1.1, "penalty_last_n": -1}, {"repetition_penalty": 1.1, "repetition_range": 0}),
        ({"penalty_repeat": 1.1, "penalty_last_n": 0}, {}),
        ({"penalty_last_n": 32}, {}),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.2}, {"xtc_probability": 0.5, "xtc_threshold": 0.2}),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.6}, {}),
        ({"xtc_threshold": 0.2, "mirostat": 0, "mirostat_tau": 4.0}, {}),
        ({"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2},
         {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2}),
    ],
    ids=str,
)  # fmt: skip
def test_recommended_sampling_is_in_force(given: dict[str, Any], read: dict[str, Any], tmp_path: Path) -> None:
    from topkapi.model.decoding.parameters import from_generation_config, resolve

    def add(writer: Any) -> None:
        sentencepiece(writer)
        for name, value in given.items():
            (writer.add_int32 if isinstance(value, int) else writer.add_float32)(f"general.sampling.{name}", value)

    *_, generation = read_gguf(minimal(tmp_path / "spm.gguf", add))
    own = {name: value for name, value in generation.items() if not name.endswith("token_id")}
    assert own == read
    effective = resolve({}, from_generation_config(generation), vocab_size=300, end_token_ids=(2,))
    assert {name: getattr(effective, name) for name in read} == read


@pytest.mark.parametrize("value", [1, "2", float("nan")])
def test_mirostat_that_is_not_computed_is_refused(value: Any, tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        sentencepiece(writer)
        kind = {int: writer.add_int32, float: writer.add_float32, str: writer.add_string}
        kind[type(value)]("general.sampling.mirostat", value)

    with pytest.raises(CheckpointError) as caught:
        read_gguf(minimal(tmp_path / "spm.gguf", add))
    assert caught.value.field == "general.sampling.mirostat"


def test_the_public_file_opens() -> None:
    """What llama.cpp's converter writes for a published model has no key that is refused."""
    converter = {
        "general.architecture": "llama", "general.type": "model", "general.file_type": 3, "general.name": "x",
        "general.quantization_version": 2, "llama.attention.head_count": 9, "llama.attention.head_count_kv": 3,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.block_count": 30, "llama.context_length": 8192,
        "llama.embedding_length": 576, "llama.feed_forward_length": 1536, "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 1e5, "llama.vocab_size": 49152, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.unknown_token_id": 0,
        "GGUF.version": 3, "GGUF.tensor_count": 272, "GGUF.kv_count": 40,
    }  # fmt: skip
    check_keys(converter, "llama")
