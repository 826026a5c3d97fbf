"""Checkpoints as GGUF files that llama.cpp loads: metadata, tensors, tokenizer and chat template.

The inverse of `model.storage.gguf`, under the conventions of llama.cpp's own converter: vectors and learned positions
stay float32, llama's query and key rows are interleaved, gpt2's matrices lie as a plain product wants them, and gemma's
norms hold the whole weight.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.rotary import rotary_frequencies
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.model.storage.gguf import gguf_package
from topkapi.model.storage.gguf_configuration import LONG_FACTORS
from topkapi.model.storage.gguf_names import INTERLEAVED, JOINED, OUTER, layer_names
from topkapi.model.storage.gguf_quantise import BLOCK, K_QUANTS, quantise
from topkapi.model.storage.gguf_sampling import add_sampling
from topkapi.model.storage.gguf_shape import add_shape, check_shape
from topkapi.model.storage.gguf_vocabulary_export import add_vocabulary, plain_name
from topkapi.model.storage.layouts import Layout
from topkapi.model.storage.location import check_gguf_target

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]


@dataclass(frozen=True)
class _Kinds:
    """What a type is called in a file, what its matrices are, and which of them are something else.

    `output` is the matrix of the output, and of the embedding where they are one, `embedding` the latter where they are
    two: few bits cost most there. `sensitive` are the values' and the last feed-forward matrices of some layers.
    """

    name: str
    matrices: str
    output: str
    embedding: str
    sensitive: str | None = None


# Of the K-quants' mixtures, as llama.cpp chooses.
_KINDS: dict[GgufType, _Kinds] = {
    "f32": _Kinds("ALL_F32", "F32", "F32", "F32"),
    "f16": _Kinds("MOSTLY_F16", "F16", "F16", "F16"),
    "bf16": _Kinds("MOSTLY_BF16", "BF16", "BF16", "BF16"),
    "q8_0": _Kinds("MOSTLY_Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "q6_k": _Kinds("MOSTLY_Q6_K", "Q6_K", "Q6_K", "Q6_K"),
    "q5_k_m": _Kinds("MOSTLY_Q5_K_M", "Q5_K", "Q6_K", "Q5_K", "Q6_K"),
    "q4_k_m": _Kinds("MOSTLY_Q4_K_M", "Q4_K", "Q6_K", "Q4_K", "Q6_K"),
    "q4_0": _Kinds("MOSTLY_Q4_0", "Q4_0", "Q8_0", "Q8_0"),
}
GGUF_TYPES: tuple[GgufType, ...] = tuple(_KINDS)

_SENSITIVE = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\.weight")
# What is taken where a row is no multiple of a block.
_SMALLER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_BLOCKS = {"Q4_0": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, **dict.fromkeys(K_QUANTS, BLOCK)}


# Architectures that have an output matrix of their own in every file.
_ALWAYS_OUTPUT = ("gptneox", "olmo2")


def export_gguf(checkpoint: Checkpoint, path: Path, kind: GgufType) -> dict[str, int]:
    """Write `checkpoint` to the file `path`, whole or not at all, its matrices as `kind`.

    Returns how many matrices each of GGUF's types has: a matrix whose rows are no multiple of a K-quant's block of 256
    takes the type that llama.cpp takes then.

    Raises `CheckpointError` for what llama.cpp has no form for: a vocabulary that would give other ids there, weights
    outside float16, biases its architecture lacks; and when the disk is full.
    Raises `InvalidRequest` for a `path` that is there already or whose directory is not.
    """
    package = gguf_package("writing")
    check_gguf_target(path)
    check_shape(checkpoint.config)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder) / path.name
            with closing(package.GGUFWriter(partial, checkpoint.config.traits.gguf)) as writer:
                stored = _write(package, writer, checkpoint, kind)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            return stored
    except OSError as error:
        raise CheckpointError(
            f"could not write {path}: {error.strerror or error}", hint="free disk space or choose another file"
        ) from error


def _write(package: ModuleType, writer: Any, checkpoint: Checkpoint, kind: GgufType) -> dict[str, int]:
    stored: Counter[str] = Counter()
    add_shape(package, writer, checkpoint.config)
    add_vocabulary(writer, checkpoint)
    writer.add_name(plain_name(checkpoint.name))
    add_sampling(writer, checkpoint.generation)
    writer.add_file_type(package.LlamaFileType[_KINDS[kind].name])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for name, data in _tensors(checkpoint):
        stored_as = kind_of(checkpoint.config, name, data, kind)
        stored[stored_as] += data.ndim > 1
        packed, own = _packed(package, name, data, stored_as)
        writer.add_tensor(name, packed, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    return dict(+stored)


def summary(stored: dict[str, int], kind: GgufType) -> str:
    """What `export_gguf` returned, for people."""
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(stored.items(), key=lambda each: -each[1]))
    smaller = " and ".join(sorted({*_SMALLER.values(), "F16"} & stored.keys())) if "_k" in kind else ""
    return f"matrices: {told}" + (f" ({smaller} where rows are no multiple of {BLOCK})" if smaller else "")


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor under GGUF's name and in its layout, float32."""
    config, traits = checkpoint.config, checkpoint.config.traits
    inside, plain = layer_names(traits), Layout()
    whole = JOINED.get(traits.gguf, {})
    state = checkpoint.model.state_dict()
    for name, tensor in state.items():
        module, _, ending = name.rpartition(".")
        layer: str | None = None
        part = module
        if module.startswith("layers."):
            _, layer, part = module.split(".", 2)
        if part == "lm_head" and config.tie_embeddings and traits.gguf not in _ALWAYS_OUTPUT:
            continue
        kind = OUTER[part] if layer is None else inside[part]
        parts = whole.get(kind, ())
        if len(parts) > 1 and part != parts[0]:
            continue
        if len(parts) > 1:
            tensor = plain.join(config, [state[f"layers.{layer}.{each}.{ending}"] for each in parts])
        data = tensor.detach().float().cpu()
        if traits.gguf in INTERLEAVED and kind in ("attn_q", "attn_k"):
            heads = config.num_heads if kind == "attn_q" else config.num_kv_heads
            halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
            data = halves.transpose(1, 2).reshape(data.shape)
        if traits.norm_offset and kind.endswith("norm"):
            data = data + traits.norm_offset
        prefix = "" if layer is None else f"blk.{layer}."
        yield f"{prefix}{kind}.{ending}", np.ascontiguousarray(data.numpy())
    if traits.gguf == "gpt2" and not config.qkv_bias:
        # llama.cpp always has this bias, as transformers has.
        for at in range(config.num_layers):
            yield f"blk.{at}.attn_qkv.bias", np.zeros(3 * config.num_heads * config.head_dim, dtype=np.float32)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        yield "rope_freqs.weight", (1.0 / (config.rope_theta**exponents) / rotary_frequencies(config)).numpy()
    if scaling.get("rope_type") == "longrope":
        for ours, name in LONG_FACTORS.items():
            yield name, np.array(scaling[ours], dtype=np.float32)


def kind_of(config: ModelConfig, name: str, data: NDArray[np.float32], kind: GgufType) -> str:
    """What a tensor of the file is stored as, as llama.cpp would choose; vectors and learned positions stay float32."""
    if data.ndim == 1 or name == "position_embd.weight":
        return "F32"
    chosen = _KINDS[kind]
    found = chosen.matrices
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_embeddings):
        found = chosen.output
    elif name == "token_embd.weight":
        found = chosen.embedding
    elif chosen.sensitive is not None and (match := _SENSITIVE.fullmatch(name)):
        found = chosen.sensitive if _has_more_bits(int(match[1]), config.num_layers) else found
    columns = data.shape[-1]
    if columns % _BLOCKS.get(found, 1):
        found = _SMALLER.get(found, "F16")
    return "F16" if columns % _BLOCKS.get(found, 1) else found


def _has_more_bits(layer: int, layers: int) -> bool:
    """Whether a layer's sensitive matrices have more bits: the first and the last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _packed(package: ModuleType, name: str, data: NDArray[np.float32], kind: str) -> tuple[NDArray[Any], Any]:
    """A tensor as it is stored, and as what."""
    own = package.GGMLQuantizationType[kind]
    # Scales are float16 in every block.
    if kind not in ("F32", "BF16") and np.abs(data).max() > np.finfo(np.float16).max:
        raise CheckpointError(f"the tensor {name} holds numbers too large for float16", hint="use --type f32 or bf16")
    return quantise(data, kind) if kind in K_QUANTS else package.quantize(data, own), own
