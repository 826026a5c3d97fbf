"""Checkpoints as GGUF files that llama.cpp loads: metadata, tensors, tokenizer and chat template.

The inverse of `model.storage.gguf`, under the conventions of llama.cpp's own converter: vectors and learned positions
stay float32, llama's query and key rows are interleaved, gpt2's matrices lie as a plain product wants them.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.model.storage.gguf import GPT2_TENSORS, LLAMA_TENSORS, gguf_package
from topkapi.model.storage.gguf_sampling import add_sampling
from topkapi.model.storage.gguf_vocabulary_export import add_vocabulary, plain_name
from topkapi.model.storage.location import check_gguf_target
from topkapi.model.storage.tensors import to_hugging_face
from topkapi.model.transformer import rotary_frequencies

GgufType = Literal["f32", "f16", "q8_0", "q4_0"]

# What each type is called in a file, what its matrices are, and what the embedding and output matrices are: in four
# bits those two cost the most accuracy for the least space.
_TYPES: dict[GgufType, tuple[str, str, str]] = {
    "f32": ("ALL_F32", "F32", "F32"),
    "f16": ("MOSTLY_F16", "F16", "F16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0", "Q8_0"),
    "q4_0": ("MOSTLY_Q4_0", "Q4_0", "Q8_0"),
}


def export_gguf(checkpoint: Checkpoint, path: Path, kind: GgufType) -> None:
    """Write `checkpoint` to the file `path`, whole or not at all, its matrices as `kind`.

    Raises `CheckpointError` for what llama.cpp has no form for: a vocabulary that would give other ids there, weights
    outside float16, biases its architecture lacks; and when the disk is full.
    Raises `InvalidRequest` for a `path` that is there already or whose directory is not.
    """
    package = gguf_package("writing")
    _check(checkpoint.config, path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder) / path.name
            with closing(package.GGUFWriter(partial, checkpoint.config.traits.gguf)) as writer:
                _write(package, writer, checkpoint, kind)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"could not write {path}: {error.strerror or error}", hint="free disk space or choose another file"
        ) from error


def _write(package: ModuleType, writer: Any, checkpoint: Checkpoint, kind: GgufType) -> None:
    _add_shape(writer, checkpoint.config)
    add_vocabulary(writer, checkpoint)
    writer.add_name(plain_name(checkpoint.name))
    add_sampling(writer, checkpoint.generation)
    writer.add_file_type(package.LlamaFileType[_TYPES[kind][0]])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for name, data in _tensors(checkpoint):
        packed, own = _packed(package, name, data, kind)
        writer.add_tensor(name, packed, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _check(config: ModelConfig, path: Path) -> None:
    check_gguf_target(path)
    architecture = config.traits.gguf
    if architecture == "qwen3" and (config.qkv_bias or config.output_bias):
        raise CheckpointError("llama.cpp's qwen3 has no biases in attention, this checkpoint has")
    if config.activation is not None:
        raise CheckpointError(
            f"llama.cpp's {architecture} computes GELU by tanh, this checkpoint exactly", field="activation_function"
        )
    if architecture != "llama" and (config.rope_scaling or {}).get("rope_type") == "llama3":
        raise CheckpointError(f"llama.cpp's {architecture} has no scaling of the type llama3, this checkpoint has")


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.family == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(_linear())
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def _linear() -> Any:
    return gguf_package("writing").RopeScalingType.LINEAR


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor under GGUF's name and in its layout, float32."""
    config = checkpoint.config
    gpt2 = config.family == "gpt2"
    names = {theirs: ours for ours, theirs in (GPT2_TENSORS if gpt2 else LLAMA_TENSORS).items()}
    for name, tensor in to_hugging_face(config, checkpoint.model.state_dict()).items():
        module, _, ending = name.rpartition(".")
        match = re.fullmatch(r"(?:transformer\.h|model\.layers)\.(\d+)\.(.+)", module)
        layer, kind = (match[1], names[match[2]]) if match else (None, names[module])
        data = tensor.detach().float().cpu()
        if gpt2 and layer is not None and data.ndim == 2:
            data = data.t()
        if config.traits.gguf == "llama" and kind in ("attn_q", "attn_k"):
            heads = config.num_heads if kind == "attn_q" else config.num_kv_heads
            halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
            data = halves.transpose(1, 2).reshape(data.shape)
        prefix = "" if layer is None else f"blk.{layer}."
        yield f"{prefix}{kind}.{ending}", np.ascontiguousarray(data.numpy())
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        yield "rope_freqs.weight", (1.0 / (config.rope_theta**exponents) / rotary_frequencies(config)).numpy()


def _packed(package: ModuleType, name: str, data: NDArray[np.float32], kind: GgufType) -> tuple[NDArray[Any], Any]:
    """A tensor as it is stored, and as what."""
    _, matrices, embeddings = _TYPES[kind]
    chosen = embeddings if name in ("token_embd.weight", "output.weight") else matrices
    if data.ndim == 1 or name == "position_embd.weight":
        chosen = "F32"
    elif chosen.startswith("Q") and data.shape[-1] % 32:
        chosen = "F16"
    own = package.GGMLQuantizationType[chosen]
    if chosen == "F16" and np.abs(data).max() > np.finfo(np.float16).max:
        raise CheckpointError(f"the tensor {name} holds numbers too large for float16", hint="use --type f32")
    return package.quantize(data, own), own
