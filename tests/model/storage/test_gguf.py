"""GGUF files load as the models they were made from, and damaged or foreign ones are named."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend

from tests import texts
from topkapi.model.conversation.chat_template import BUILT_IN_TEMPLATES
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.storage.gguf import read_gguf
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import causal_attention

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
Q = gguf.GGMLQuantizationType
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 512

COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 96}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, **HEADS),
    "llama-tied": lambda: transformers.LlamaConfig(**COMMON, **HEADS, tie_word_embeddings=True),
    "llama3": lambda: transformers.LlamaConfig(**COMMON, **HEADS, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, **HEADS),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **HEADS, head_dim=32, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4),
}
LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
PLAIN_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([texts.JOINED] * 2, VOCABULARY, SPECIAL)


@pytest.fixture(scope="module")
def definition(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))


def reference_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in network.parameters():  # biases and norms start as constants, which would hide a mix-up
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.1)
    return network


def add_vocabulary(writer: Any, definition: dict[str, Any], pre: str = "qwen2") -> None:
    entries = {i: entry for entry, i in definition["model"]["vocab"].items()}
    entries |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    special = {token["id"] for token in definition["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([entries[i] for i in range(len(entries))])
    writer.add_token_types([3 if i in special else 1 for i in range(len(entries))])
    merges = definition["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(VOCABULARY - 3)
    writer.add_eos_token_id(VOCABULARY - 3)
    writer.add_eot_token_id(VOCABULARY - 1)


def write(
    path: Path,
    network: torch.nn.Module,
    definition: dict[str, Any],
    kind: Any = Q.F32,
    *,
    change: Callable[[Any], None] = lambda _: None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a GGUF file as llama.cpp's converter does; returns what each Hugging Face tensor is after quantising."""
    config = network.config.to_dict()
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_feed_forward_length(256 if family == "gpt2" else 96)
    if family == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        if family == "qwen3":
            writer.add_key_length(32)
            writer.add_value_length(32)
        if config["rope_parameters"]["rope_type"] == "llama3":
            wave = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
            smooth = (8192 / wave - 1.0) / 3.0
            between = 1 / ((1 - smooth) / 32.0 + smooth)
            factors = np.where(wave < 2048, 1.0, np.where(wave > 8192, 32.0, between))
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    add_vocabulary(writer, definition)
    writer.add_chat_template(BUILT_IN_TEMPLATES["chatml"])
    change(writer)
    stored: dict[str, np.ndarray[Any, Any]] = {}
    for name, parameter in network.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        module, _, ending = name.rpartition(".")
        data = parameter.detach().numpy()
        if family == "gpt2" and ".h." in name and data.ndim == 2:
            data = data.T
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else 2
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        if module in PLAIN_NAMES:
            target = f"{PLAIN_NAMES[module]}.{ending}"
        else:
            _, _, layer, rest = module.split(".", 3)
            target = f"blk.{layer}.{LLAMA_NAMES[rest]}.{ending}"
        data = np.ascontiguousarray(data)
        if data.ndim == 1:
            writer.add_tensor(target, data)
            stored[name] = data
        else:
            packed = gguf.quantize(data, kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
            stored[name] = gguf.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("name", CONFIGS)
def test_each_family_gives_the_logits_of_transformers(name: str, tmp_path: Path, definition: dict[str, Any]) -> None:
    network = reference_model(name)
    write(tmp_path / "tiny.gguf", network, definition)
    checkpoint = load_checkpoint(tmp_path / "tiny.gguf")
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).expand(2, 20)
    with torch.inference_mode():
        ours = checkpoint.model(tokens, positions, causal_attention)
        theirs = network(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert checkpoint.config.context_length == 64
    assert checkpoint.chat is not None and checkpoint.chat.source == BUILT_IN_TEMPLATES["chatml"]
    assert set(checkpoint.config.end_token_ids) == {VOCABULARY - 3, VOCABULARY - 1}


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantised_tensors_are_exactly_what_the_file_says(
    name: str, kind: Any, tmp_path: Path, definition: dict[str, Any]
) -> None:
    network = reference_model(name)
    stored = write(tmp_path / "tiny.gguf", network, definition, kind)
    config, tensors, *_ = read_gguf(tmp_path / "tiny.gguf")
    read = dict(tensors)
    original = network.state_dict()
    assert set(read) == set(stored)
    dtype = {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    for key, tensor in read.items():
        assert tensor.shape == original[key].shape
        assert tensor.dtype == (dtype if tensor.ndim == 2 else torch.float32)
        scale = original[key].abs().max()
        assert (tensor.float() - original[key]).abs().max() <= 0.2 * scale, key
        if not ("q_proj" in key or "k_proj" in key or (name == "gpt2" and ".h." in key)):
            assert np.array_equal(tensor.float().numpy(), stored[key])


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_are_dequantised(kind: Any, tmp_path: Path, definition: dict[str, Any]) -> None:
    size = 256 * 4
    block, width = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(0).integers(0, 60, (4, 256 // block * width), dtype=np.uint8)
    network = reference_model("llama-tied")

    def add(writer: Any) -> None:
        writer.add_tensor("blk.0.attn_v.bias", packed, raw_dtype=kind)

    write(tmp_path / "tiny.gguf", network, definition, change=add)
    _, tensors, *_ = read_gguf(tmp_path / "tiny.gguf")
    tensor = dict(tensors)["model.layers.0.self_attn.v_proj.bias"]
    assert tensor.numel() == size
    assert np.array_equal(tensor.numpy(), gguf.dequantize(packed, kind), equal_nan=True)


def test_the_vocabulary_encodes_as_before(tmp_path: Path, tokenizer: Tokenizer, definition: dict[str, Any]) -> None:
    def sampling(writer: Any) -> None:
        writer.add_sampling_temp(0.6)
        writer.add_sampling_top_k(20)

    write(tmp_path / "tiny.gguf", reference_model("qwen3"), definition, change=sampling)
    _, _, read, template, generation = read_gguf(tmp_path / "tiny.gguf")
    assert read.encode(texts.JOINED) == tokenizer.encode(texts.JOINED)
    assert read.uses_tiktoken
    assert dict(read.control_tokens) == dict(tokenizer.control_tokens)
    assert (read.begin_token_id, read.end_token_id) == (VOCABULARY - 3, VOCABULARY - 3)
    assert template == {"default": BUILT_IN_TEMPLATES["chatml"]}
    assert generation == {
        "bos_token_id": VOCABULARY - 3,
        "eos_token_id": [VOCABULARY - 3, VOCABULARY - 1],
        "temperature": 0.6,
        "top_k": 20,
    }


def minimal(path: Path, change: Callable[[Any], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 1),
        (writer.add_head_count, 4),
        (writer.add_feed_forward_length, 96),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((300, 64), dtype=np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SENTENCEPIECE = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁abeht",
    "he",
    "▁t",
    "▁the",
    "th",
    "the",
]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies(prefix: bool, tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(SENTENCEPIECE)
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(SENTENCEPIECE) - 259)])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(SENTENCEPIECE) - 259))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if not prefix:
            writer.add_add_space_prefix(False)

    _, _, tokenizer, template, generation = read_gguf(minimal(tmp_path / "spm.gguf", add))
    spelled = [SENTENCEPIECE[i] for i in tokenizer.encode("the bat\n</s>")]
    bat = ["▁", "b", "a", "t", "<0x0A>", "<0x3C>", "<0x2F>", "<0x73>", "<0x3E>"]
    # By score, "he" is merged before "▁t" and "th", and "▁t" + "he" before "t" + "he" where there is a space.
    assert spelled == (["▁the"] if prefix else ["the"]) + bat
    assert tokenizer.token_bytes(3 + 10) == b"\n"
    assert tokenizer.decode(tokenizer.encode("the\n")) == (" the\n" if prefix else "the\n")
    assert (tokenizer.begin_token_id, tokenizer.end_token_id) == (1, 2)
    assert tokenizer.adds_begin_token
    assert generation == {"bos_token_id": 1, "eos_token_id": [2]}
    assert template == {}


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "default"])
def test_pre_tokenizers_by_name(name: str, tmp_path: Path, definition: dict[str, Any]) -> None:
    path = minimal(tmp_path / "named.gguf", lambda writer: add_vocabulary(writer, definition, name))
    _, _, tokenizer, *_ = read_gguf(path)
    assert tokenizer.decode(tokenizer.encode(texts.JOINED)) == texts.JOINED
    digits = [len(tokenizer.token_bytes(i)) for i in tokenizer.encode("x12345")]
    assert sum(digits) == 6
    # "default" splits by four patterns, and Llama 3's rule needs a vocabulary that lists every split of an entry.
    assert tokenizer.uses_tiktoken == (name not in ("default", "llama-bpe"))
    saved = tmp_path / "saved"
    tokenizer.save(saved)
    backend = Backend.from_file(str(saved / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert backend.encode(texts.JOINED, add_special_tokens=False).ids == tokenizer.encode(texts.JOINED)


# What cannot be read


def test_every_truncation_is_named(tmp_path: Path, definition: dict[str, Any]) -> None:
    write(tmp_path / "whole.gguf", reference_model("llama"), definition, Q.Q8_0)
    whole = (tmp_path / "whole.gguf").read_bytes()
    for size in (0, 3, 4, 10, 100, 2_000, len(whole) // 2, len(whole) - 4096, len(whole) - 40):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is (truncated or damaged|not a GGUF file)"):
            read_gguf(cut)
    (tmp_path / "text.gguf").write_text("this is no model at all")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        read_gguf(tmp_path / "text.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path / "missing.gguf")


def test_what_is_not_supported_is_named(tmp_path: Path, definition: dict[str, Any]) -> None:
    def foreign(writer: Any) -> None:
        add_vocabulary(writer, definition)
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((64, 64), dtype=np.int32))

    with pytest.raises(CheckpointError, match=r"quantisation I32 of blk\.0\.attn_q\.weight"):
        read_gguf(minimal(tmp_path / "quantised.gguf", foreign))
    with pytest.raises(CheckpointError, match="pre-tokenizer 'klingon'"):
        read_gguf(minimal(tmp_path / "pre.gguf", lambda writer: add_vocabulary(writer, definition, "klingon")))
    with pytest.raises(CheckpointError, match="of kind 'bert'"):
        read_gguf(minimal(tmp_path / "bert.gguf", lambda writer: writer.add_tokenizer_model("bert")))

    def experts(writer: Any) -> None:
        add_vocabulary(writer, definition)
        writer.add_expert_count(8)

    with pytest.raises(CheckpointError, match="mixtures of experts"):
        read_gguf(minimal(tmp_path / "experts.gguf", experts))

    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'mamba'") as caught:
        read_gguf(tmp_path / "mamba.gguf")
    assert "gpt2, llama, qwen2, qwen3" in (caught.value.hint or "")


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length"):
        read_gguf(tmp_path / "bare.gguf")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(tmp_path / "any.gguf")
    assert caught.value.hint == "pip install 'topkapi[gguf]'"
