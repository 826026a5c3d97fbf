"""Tensor names and layouts: Topkapi's parameters to and from Hugging Face's `model.safetensors`.

The llama, qwen2 and qwen3 families share their names with transformers, so only gpt2 is translated: its query, key
and value matrices are stored as one, and every matrix is stored transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.reading import member, read_json

GPT2_NAMES = {
    "wte.weight": "embed_tokens.weight",
    "wpe.weight": "embed_positions.weight",
    "ln_f.weight": "norm.weight",
    "ln_f.bias": "norm.bias",
}
GPT2_LAYER_NAMES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
GPT2_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_LONGEST_HEADER = 1 << 24
"""Bytes of the list of tensors at the beginning of a safetensors file; a thousand tensors take a tenth of a million."""


def read_safetensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint directory, one file or sharded with an index."""
    for path in weight_files(directory):
        if not path.is_file():
            pickled = sorted(p.name for p in directory.glob("*.bin"))
            hint = (
                f"make a checkpoint with safetensors of them: topkapi import {directory} {directory}-imported"
                if pickled
                else None
            )
            raise CheckpointError(f"{path} is missing", hint=hint or "copy or download the checkpoint again")
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                yield key, file.get_tensor(key)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error})", hint="copy or download it again"
        ) from None


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, whether they exist or not: one, or those that an index names."""
    index = directory / "model.safetensors.index.json"
    # Where both are there, transformers reads the one file.
    if not index.is_file() or (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} must hold a weight_map of the tensors' files by name",
            field="weight_map",
            hint="copy or download the checkpoint again",
        )
    return sorted({member(directory, name, index.name) for name in weight_map.values()})


def stored_shapes(directory: Path) -> dict[str, list[int]]:
    """The shapes of all tensors of a checkpoint directory by name, read without the tensors."""
    return {name: shape for path in weight_files(directory) if path.is_file() for name, shape in _shapes(path)}


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file (its header would have {length:,} bytes)",
            hint="copy or download it again",
        )
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            yield key, file.get_slice(key).get_shape()


def to_hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a `Decoder` under Hugging Face's names, contiguous, tied matrices once."""
    state = {name: tensor for name, tensor in state.items() if not (config.tie_embeddings and name == "lm_head.weight")}
    if config.family != "gpt2":
        return {
            name if name == "lm_head.weight" else f"model.{name}": tensor.contiguous() for name, tensor in state.items()
        }
    result: dict[str, Tensor] = {}
    plain = {ours: theirs for theirs, ours in GPT2_NAMES.items()}
    layered = {ours: theirs for theirs, ours in GPT2_LAYER_NAMES.items()}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            result[name] = tensor.contiguous()
        elif name in plain:
            result[f"transformer.{plain[name]}"] = tensor.contiguous()
        else:
            _, layer, module, kind = re.fullmatch(r"(layers)\.(\d+)\.(.+)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
            if module in layered:
                stored = tensor.t() if tensor.ndim == 2 else tensor
                result[f"transformer.h.{layer}.{layered[module]}.{kind}"] = stored.contiguous()
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}.self_attn"
        weight = torch.cat([state[f"{prefix}.{p}.weight"] for p in PROJECTIONS])
        target = f"transformer.h.{layer}.attn.c_attn"
        result[f"{target}.weight"] = weight.t().contiguous()
        result[f"{target}.bias"] = (
            torch.cat([state[f"{prefix}.{p}.bias"] for p in PROJECTIONS])
            if config.qkv_bias
            else torch.zeros(weight.shape[0], dtype=state["norm.weight"].dtype)
        )
    return result


def from_hugging_face(config: ModelConfig, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors under the names of `Decoder`'s parameters; buffers of old files are passed over.

    Where `config` ties the output matrix to the embedding and both are stored, transformers 5 looks at them: `lm_head`
    is yielded if it is another matrix and passed over if it is the same; alone, it is the embedding, too. Raises
    `CheckpointError` for biases that the configuration denies.
    """
    embeddings: dict[str, Tensor] = {}
    for name, tensor in _named(config, tensors):
        if config.tie_embeddings and name in ("embed_tokens.weight", "lm_head.weight") and name not in embeddings:
            embeddings[name] = tensor
        else:
            yield name, tensor
    output = embeddings.pop("lm_head.weight", None)
    if output is not None:
        embedding = embeddings.setdefault("embed_tokens.weight", output)
        if output.dtype != embedding.dtype or not torch.equal(output, embedding):
            embeddings["lm_head.weight"] = output
    yield from embeddings.items()


def _named(config: ModelConfig, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if name == "lm_head.weight":
            yield name, tensor
        elif config.family == "gpt2":
            yield from _from_gpt2(config, name.removeprefix("transformer."), tensor)
        elif not name.endswith("rotary_emb.inv_freq"):
            plain = name.removeprefix("model.")
            yield name if plain == "lm_head.weight" else plain, tensor


def _from_gpt2(config: ModelConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if GPT2_BUFFERS.fullmatch(name):
        return
    if name in GPT2_NAMES:
        yield GPT2_NAMES[name], tensor
        return
    match = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", name)
    if not match:
        yield name, tensor
        return
    layer, module, kind = match.groups()
    stored = tensor.t() if tensor.ndim == 2 else tensor
    if module == "attn.c_attn":
        if kind == "bias" and not config.qkv_bias:
            if stored.count_nonzero():
                raise CheckpointError(
                    f"config.json says that there is no bias of the queries, keys and values, but {name} is not zero",
                    field="qkv_bias",
                    hint="set qkv_bias to true, or leave it out",
                )
            return
        for projection, part in zip(PROJECTIONS, stored.chunk(3), strict=True):
            yield f"layers.{layer}.self_attn.{projection}.{kind}", part
    else:
        yield f"layers.{layer}.{GPT2_LAYER_NAMES.get(module, module)}.{kind}", stored
