"""Networks from stored tensors: which are there, of which shape, and what they are held in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.gguf_blocks import Blocks
from topkapi.model.transformer import Decoder


def build(
    config: ModelConfig,
    tensors: Iterator[tuple[str, Tensor | Blocks]],
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Decoder:
    """The network of `config` with its stored `tensors`, by names of `Decoder`'s parameters, for inference on `device`.

    Matrices are held in `dtype`. With None each is held as it is stored, whatever config.json calls it, but float64 as
    float32, and so is float16 on the CPU, where it is slow. Vectors are held in float32. Where `config` ties the output
    matrix to the embedding and the tensors hold another, the network has both. Raises `CheckpointError` naming the
    tensor for one that is missing, unknown, there twice, of another shape, in a type that is not computed with or with
    numbers that are none.
    """
    expected = {name: parameter.shape for name, parameter in _empty(config).named_parameters()}
    # An output matrix of its own, whatever config.json says; see `from_hugging_face`.
    untied = {"lm_head.weight": expected["embed_tokens.weight"]} if config.tie_embeddings else {}
    state: dict[str, Tensor] = {}
    blocks: dict[str, Blocks] = {}
    unknown: list[str] = []
    for name, tensor in tensors:
        shape = expected.get(name, untied.get(name))
        if shape is None:
            unknown.append(name)
            continue
        if tensor.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, config.json implies {list(shape)}",
                hint="config.json and the weights belong to different models",
            )
        if name in state:
            raise CheckpointError(
                f"{path}: the weights hold {name} twice", hint="keep one of the two, or download the weights again"
            )
        if isinstance(tensor, Blocks):
            blocks[name], state[name] = tensor, torch.empty(shape, device="meta")
            continue
        wanted = _held(path, name, tensor, dtype, device)
        # As it is held: what is stored as float64 may be too large for that.
        state[name] = tensor.to(device=device, dtype=wanted).contiguous()
        if not _finite(state[name]):
            raise CheckpointError(
                f"{path}: tensor {name} holds NaN or infinity",
                hint="its file is damaged, or the run that wrote it diverged: download it again, or use an earlier one",
            )
    if "lm_head.weight" in state:
        config = replace(config, tie_embeddings=False)
    missing = sorted(expected.keys() - state.keys())
    if missing or unknown:
        problems = [f"lacks {', '.join(missing[:3])}"] if missing else []
        problems += [f"has unknown {', '.join(unknown[:3])}"] if unknown else []
        raise CheckpointError(
            f"{path}: the weights {' and '.join(problems)} ({len(missing)} missing, {len(unknown)} unknown tensors)",
            hint="the weights do not belong to this config.json",
        )
    model = _empty(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    for name, held in blocks.items():
        module = name.removesuffix(".weight")
        tied = ["lm_head"] if config.tie_embeddings and module == "embed_tokens" else []
        for each in (module, *tied):
            model.get_submodule(each).blocks = held  # type: ignore[assignment]
    model.requires_grad_(False)
    return model.eval()


def _empty(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def _finite(tensor: Tensor) -> bool:
    # One NaN or infinity shows in the sum, which takes no memory; but a sum may be too large by itself.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _held(path: Path, name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """What a stored tensor is held in: matrices in `dtype`, or (None) as they are where that can be computed with."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        stored = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {stored}, which is not supported",
            hint="convert the weights to bfloat16 first, with their scales where they have any",
        )
    if tensor.ndim < 2:
        return torch.float32
    slow = tensor.dtype == torch.float64 or (tensor.dtype == torch.float16 and device.type == "cpu")
    return dtype or (torch.float32 if slow else tensor.dtype)
