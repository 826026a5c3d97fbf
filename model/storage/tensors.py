"""Topkapi's parameters to and from Hugging Face's `model.safetensors`; how each family lies there: `layouts`."""

from __future__ import annotations

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
from topkapi.model.storage.layouts import BUFFERS, layout_of

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
    layout = layout_of(config)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if config.tie_embeddings and name == "lm_head.weight":
            continue
        module, _, kind = name.rpartition(".")
        theirs = layout.theirs(module)
        names = layout.ours(theirs)
        if len(names) > 1 and module == names[0]:
            tensor = layout.join(config, [state[f"{part}.{kind}"] for part in names])
            if kind == "weight" and f"{module}.bias" not in state and theirs.endswith(layout.always_biased):
                result[f"{theirs}.bias"] = torch.zeros(tensor.shape[0], dtype=state["norm.weight"].dtype)
        elif len(names) > 1:
            continue
        turned = layout.transposed and tensor.ndim == 2 and module.startswith("layers.")
        result[f"{theirs}.{kind}"] = (tensor.t() if turned else tensor).contiguous()
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
    layout = layout_of(config)
    for stored_name, tensor in tensors:
        name = layout.alone(stored_name)
        if name is None:
            continue
        if BUFFERS.match(name.removeprefix(layout.prefix)):
            continue
        module, _, kind = name.rpartition(".")
        names = layout.ours(module)
        turned = layout.transposed and tensor.ndim == 2 and names[0].startswith("layers.")
        stored = tensor.t() if turned else tensor
        if len(names) == 1:
            yield f"{names[0]}.{kind}", stored
        elif kind == "bias" and not config.qkv_bias and module.endswith(layout.always_biased):
            if stored.count_nonzero():
                raise CheckpointError(
                    f"config.json says that there is no bias of the queries, keys and values, but {name} is not zero",
                    field="qkv_bias",
                    hint="set qkv_bias to true, or leave it out",
                )
        else:
            for ours, part in zip(names, layout.part(config, name, names, stored), strict=True):
                yield f"{ours}.{kind}", part
