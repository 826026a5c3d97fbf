"""How matrices are held for serving: by the native core where there is one, else by PyTorch's kernels."""

from __future__ import annotations

from typing import TypedDict, cast

import torch

from topkapi.model import native
from topkapi.model.core_fields import beyond_core
from topkapi.model.errors import CheckpointError
from topkapi.model.packing import pack
from topkapi.model.quantize import quantize
from topkapi.model.transformer import Decoder

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def stored_dtype(dtype: str) -> torch.dtype | None:
    """What `load_checkpoint` has to hold matrices in for them to be served in `dtype` (`auto`: as stored).

    Raises `CheckpointError` for what only the native core computes where there is none.
    """
    if dtype in ("int8", "int4") and native.levels():
        # The core rounds what is stored.
        return None
    if dtype == "int4":
        raise CheckpointError(f"int4 needs the native core, and {native.why_not()}", hint="leave dtype out")
    return _DTYPES[dtype]


class Reading(TypedDict):
    """Arguments of `load_checkpoint`."""

    dtype: torch.dtype | None
    blocks: bool


def reading(dtype: str) -> Reading:
    """How a checkpoint is loaded that is to be served in `dtype`.

    A GGUF file's blocks are kept as they are where the native core computes and no other precision is asked for.
    """
    return {"dtype": stored_dtype(dtype), "blocks": dtype == "auto" and bool(native.levels())}


def prepare(model: Decoder, dtype: str = "auto") -> None:
    """Hold every matrix of `model` for serving in `dtype`, for good; it becomes unfit for training.

    Where the native core cannot compute it, it stays in what it was loaded in, or PyTorch rounds it to int8. Raises
    `CheckpointError` for int8 that this machine has no product for, and for int4, which the core alone computes.
    """
    if native.can_hold(model):
        native.hold(model, cast(native.HeldIn, model.held_in if dtype == "auto" else dtype))
    elif dtype == "int4":
        beyond = ", ".join(beyond_core(model.config)) or "weights like these"
        raise CheckpointError(
            f"int4 needs the native core, which does not compute this checkpoint ({beyond})",
            field="dtype",
            hint="leave dtype out, or choose int8",
        )
    elif dtype == "int8" and model.held_in != "int8":
        quantize(model)
    else:
        pack(model)


def kernels(model: Decoder) -> str:
    """What computes `model`: the native core on an instruction set, or PyTorch."""
    return "PyTorch" if model.core is None else f"native, {model.core.level}"
