"""GGUF files of every family, written as llama.cpp's converter writes them, give transformers' logits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import texts
from tests.model.family_cases import LOCAL_AND_GLOBAL, LONG_ROPE, NEOX, PADLESS, SHORT, SMALL, YARN_ROPE
from tests.tiny import tiny_config
from topkapi.model import native, serving
from topkapi.model.cache import SlotCache, Work, read, wanted_logits
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.checkpoint import Checkpoint, load_checkpoint
from topkapi.model.storage.gguf_export import export_gguf
from topkapi.model.storage.gguf_shape import check_shape
from topkapi.model.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
Q = gguf.GGMLQuantizationType
FEW = {**PADLESS, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None),
    "qwen2-yarn": transformers.Qwen2Config(**SMALL, rope_parameters=YARN_ROPE),
    "gemma2": transformers.Gemma2Config(
        **FEW, head_dim=24, sliding_window=19, query_pre_attn_scalar=24, attn_logit_softcapping=0.7,
        final_logit_softcapping=0.8,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **{**FEW, "num_hidden_layers": 7}, head_dim=24, sliding_window=25, query_pre_attn_scalar=24,
        rope_parameters=LOCAL_AND_GLOBAL,
    ),
    "phi3": transformers.Phi3Config(**FEW, sliding_window=47),
    "phi4-mini": transformers.Phi3Config(
        **{**FEW, "max_position_embeddings": 2000}, original_max_position_embeddings=305, tie_word_embeddings=True,
        rope_parameters=LONG_ROPE
        | {"short_factor": SHORT[:6], "long_factor": [9.0] * 6, "partial_rotary_factor": 0.75},
    ),
    "olmo2": transformers.Olmo2Config(**FEW),
    "smollm3": transformers.SmolLM3Config(**{**FEW, "num_hidden_layers": 4}),
    "gpt-neox": transformers.GPTNeoXConfig(**NEOX),
    "gpt-neox-sequential": transformers.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, rope_parameters=LINEAR | {"partial_rotary_factor": 0.5}
    ),
    "granite": transformers.GraniteConfig(
        **SMALL, embedding_multiplier=12.0, logits_scaling=0.3, residual_multiplier=0.22, attention_multiplier=0.6
    ),
}  # fmt: skip
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}


def reference(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in network.parameters():  # biases and norms start as constants, which would hide a mix-up
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.3, 0.1)
    return network


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([texts.JOINED], 300, ["<|endoftext|>"])


def as_converted(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor as llama.cpp's converter stores it (its files `llama.py`, `gptneox.py` and `gemma.py`)."""
    heads, kind = config.num_attention_heads, config.model_type
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if "query_key_value" in name:
        parts = tensor.reshape(heads, 3, tensor.shape[0] // heads // 3, -1)
        return torch.cat([parts[:, part].flatten(0, 1) for part in range(3)]).view(tensor.shape)
    if kind in ("mistral", "smollm3", "granite") and name.endswith(("q_proj.weight", "k_proj.weight")):
        count = heads if "q_proj" in name else config.num_key_value_heads
        return tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def write(
    path: Path, network: Any, tokenizer: Tokenizer, kind: Any = Q.F32, *, as_floats: bool = False, **changed: Any
) -> None:
    """The network as a GGUF file, its matrices as `kind`; `as_floats`: as what they are after that, in float32."""
    config = network.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
    if architecture not in ("gemma2", "gptneox"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("gptneox", "phi3"):
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    if architecture.startswith("gemma"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        writer.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32))
    for key, value in changed.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_bool if value is False else None
        (add or writer.add_uint32)(f"{architecture}.{key.replace('__', '.')}", value)
    entries = {token_id: entry for entry, token_id in tokenizer.definition["model"]["vocab"].items()}
    entries |= {token["id"]: token["content"] for token in tokenizer.definition["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([entries[token_id] for token_id in range(len(entries))])
    writer.add_token_types([1] * (len(entries) - 1) + [3])
    merges = tokenizer.definition["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(len(entries) - 1)
    names = gguf.get_tensor_name_map(next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
                                     config.num_hidden_layers)  # fmt: skip
    for name, parameter in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        data = np.ascontiguousarray(as_converted(name, parameter.detach(), config).numpy())
        own = Q.F32 if data.ndim == 1 or data.shape[-1] % 32 else kind
        packed = gguf.quantize(data, own)
        if as_floats:
            packed, own = gguf.dequantize(packed, own), Q.F32
        writer.add_tensor(target, packed, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return checkpoint.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


TOKENS = torch.randint(0, 250, (1, 300), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_converted_file_gives_transformers_logits_and_goes_out_as_it_came(
    name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    network = reference(name)
    write(tmp_path / "tiny.gguf", network, tokenizer)
    checkpoint = load_checkpoint(tmp_path / "tiny.gguf", blocks=True)
    with torch.inference_mode():
        theirs = network(TOKENS).logits
    assert theirs.abs().max() > 0.1
    assert (logits(checkpoint, TOKENS) - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    export_gguf(checkpoint, tmp_path / "again.gguf", "f32")
    again = load_checkpoint(tmp_path / "again.gguf")
    assert (logits(again, TOKENS) - logits(checkpoint, TOKENS)).abs().max() <= 1e-5 * theirs.abs().max()
    tied = {"tie_embeddings": checkpoint.config.tie_embeddings}
    assert dataclasses.replace(again.config, **tied) == checkpoint.config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_file_computes_what_its_own_numbers_give(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    network = reference(name)
    write(tmp_path / "blocks.gguf", network, tokenizer, Q.Q8_0)
    write(tmp_path / "floats.gguf", network, tokenizer, Q.Q8_0, as_floats=True)
    # Kept in blocks where the core computes them, which are rounded anew for its products there: not compared here.
    blocks, floats = (load_checkpoint(tmp_path / f"{file}.gguf") for file in ("blocks", "floats"))
    assert (tmp_path / "blocks.gguf").stat().st_size < 0.6 * (tmp_path / "floats.gguf").stat().st_size
    assert torch.equal(logits(blocks, TOKENS), logits(floats, TOKENS))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_core_computes_with_a_familys_blocks(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As with what they stand for: matrices that are one in the file, by rows or head by head, too."""
    write(tmp_path / "blocks.gguf", reference(name), tokenizer, Q.Q8_0)
    floats, blocks = (load_checkpoint(tmp_path / "blocks.gguf", blocks=kept) for kept in (False, True))
    assert [name for name, module in blocks.model.named_modules() if getattr(module, "blocks", None) is not None]
    if not native.levels():
        return
    serving.prepare(blocks.model)
    text = TOKENS[0, :60].tolist()
    cache = SlotCache(blocks.model)
    found = wanted_logits(blocks.model, read(blocks.model, cache, [Work(0, 0, text, wanted=60)]))
    expected = logits(floats, TOKENS[:, :60])[0]
    assert (found - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize(
    ("name", "changed", "key"),
    [
        ("gemma2", {"attention__scale": 0.3}, "gemma2.attention.scale"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping"),
        ("mistral", {"attention__sliding_window": 8}, "llama.attention.sliding_window"),
        ("qwen2-yarn", {"attention__sliding_window": 8}, "qwen2.attention.sliding_window"),
        ("qwen2-yarn", {"rope__scaling__yarn_ext_factor": 0.5}, "qwen2.rope.scaling.yarn_ext_factor"),
        ("olmo2", {"attention__sliding_window": 8}, "olmo2.attention.sliding_window"),
        ("olmo2", {"rope__scaling__attn_factor": 1.5}, "olmo2.rope.scaling.attn_factor"),
        ("granite", {"rope__scaling__finetuned": False}, "granite.rope.scaling.finetuned"),
        ("smollm3", {"expert_count": 4}, "smollm3.expert_count"),
    ],
)
def test_a_key_that_is_not_computed_with_is_refused(
    name: str, changed: dict[str, Any], key: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "tiny.gguf", reference(name), tokenizer, **changed)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "tiny.gguf")
    assert caught.value.field == key and key in caught.value.message


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("mistral", {"layer_windows": (8, 8)}, "layer_windows"),
        ("qwen2", {"layer_windows": (None, 8)}, "layer_windows"),
        ("gemma2", {"layer_windows": (None, 8)}, "layer_windows"),
        ("gemma2", {"attention_softcap": None}, "softcaps"),
        ("gemma2", {"tie_embeddings": False}, "tie_embeddings"),
        ("gemma3_text", {"attention_scale": 0.2}, "attention_scale"),
        ("smollm3", {"unrotated_layers": (0,)}, "unrotated_layers"),
        ("llama", {"activation": "gelu"}, "activation"),
        ("olmo2", {"qkv_bias": True, "output_bias": True}, "attention_bias"),
        ("gpt_neox", {"qkv_bias": False, "output_bias": False}, "attention_bias"),
        ("qwen3", {"rope_scaling": YARN_ROPE | {"beta_fast": 8}}, "rope_scaling"),
        ("llama", {"rope_scaling": LONG_ROPE | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                                                "original_max_position_embeddings": 64}}, "rope_scaling"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_not_written(
    family: str, changes: dict[str, Any], field: str
) -> None:
    check_shape(tiny_config(family))
    config = dataclasses.replace(tiny_config(family), **changes)
    with pytest.raises(CheckpointError, match=r"llama\.cpp's") as caught:
        check_shape(config)
    assert caught.value.field == field
