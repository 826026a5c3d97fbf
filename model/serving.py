"""How matrices are held for serving: by the native core where there is one, else by PyTorch's kernels; and whether
what comes of them are numbers."""

from __future__ import annotations

from typing import TypedDict, cast

import torch
from torch import nn

from topkapi.model import native
from topkapi.model.attention import KEY_BLOCK
from topkapi.model.cache import SlotCache, Work, outputs
from topkapi.model.core_fields import beyond_core
from topkapi.model.decoding.choosing import UnusableLogits, check_logits
from topkapi.model.errors import CheckpointError
from topkapi.model.linear import Linear
from topkapi.model.packing import pack
from topkapi.model.quantize import quantize
from topkapi.model.speed import SLOWER, pytorch_bfloat16
from topkapi.model.transformer import Decoder

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_OF_THE_CORE = ("int4", "w8a8", "w4a8")


def stored_dtype(dtype: str) -> torch.dtype | None:
    """What `load_checkpoint` has to hold matrices in for them to be served in `dtype`.

    `auto` is as stored, None: nothing is lost. Where PyTorch computes and is slower in bfloat16 than in float32, auto
    is float32, which holds what is stored as well. Raises `CheckpointError` for what would be slower than float32
    here, and for what only the native core computes where there is none.
    """
    if dtype in ("int8", *_OF_THE_CORE) and native.levels():
        # The core rounds what is stored.
        return None
    if dtype in _OF_THE_CORE:
        raise CheckpointError(f"{dtype} needs the native core, and {native.why_not()}", hint="leave dtype out")
    if dtype in ("auto", "bfloat16") and not native.levels() and (longer := pytorch_bfloat16()) > SLOWER:
        if dtype == "auto":
            return torch.float32
        raise CheckpointError(
            f"bfloat16 takes {longer:.1f} times as long as float32 on this machine, where PyTorch computes",
            hint="leave dtype out, or use float32; the native core is faster with both",
        )
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


def prepare(model: Decoder, dtype: str = "auto", cache_dtype: str = "auto") -> None:
    """Hold every matrix of `model` for serving in `dtype`, and its keys and values in `cache_dtype`, for good.

    It becomes unfit for training. Where the native core cannot compute it, it stays in what it was loaded in, or
    PyTorch rounds it to int8, with keys and values in float32. Raises `CheckpointError` where others are asked for
    there, for int8 that this machine has no product for, and for what the core alone computes.
    """
    held = native.can_hold(model)
    if not held and model.core is None:
        _copy(model)
    if not held and model.core is None and cache_dtype not in ("auto", "float32"):
        why = native.why_not() or "it does not compute this checkpoint"
        raise CheckpointError(
            f"keys and values in {cache_dtype} need the native core, and {why}", hint="leave kv_cache_dtype out"
        )
    if held:
        native.hold(model, cast(native.HeldIn, model.held_in if dtype == "auto" else dtype))
    elif dtype in _OF_THE_CORE:
        beyond = ", ".join(beyond_core(model.config)) or "weights like these"
        raise CheckpointError(
            f"{dtype} needs the native core, which does not compute this checkpoint ({beyond})",
            field="dtype",
            hint="leave dtype out, or choose int8",
        )
    elif dtype == "int8" and model.held_in != "int8":
        quantize(model)
    else:
        pack(model)
    if cache_dtype != "auto":
        model.cache_dtype = cache_dtype
    elif model.core is not None and model.held_in not in ("float32", "bfloat16"):
        # Rounding matrices to eight bits or fewer loses far more than sixteen bits of keys and values do.
        model.cache_dtype = "float16"


def _copy(model: Decoder) -> None:
    """Hold what was read in memory: it may still lie in the file, which is mapped, and whoever changed that in place
    would change the network, or end the process. (The core copies what it holds.)"""
    for held in (*model.parameters(), *model.buffers()):
        if not held.is_meta:
            held.data = held.data.clone()


def try_network(model: Decoder) -> None:
    """Read one token as every request will. Raises `CheckpointError` where no numbers come out of it."""
    try:
        (output,) = outputs(model, SlotCache(model, 1, KEY_BLOCK), [Work(0, 0, [0])])
        check_logits(output.logits)
    except UnusableLogits as error:
        raise CheckpointError(error.message, hint=f"{error.hint}: try --dtype float32, or download it again") from None


def kernels(model: Decoder) -> str:
    """What computes `model`: the native core on an instruction set, or PyTorch."""
    return "PyTorch" if model.core is None else f"native, {model.core.level}"


# Of a weight, with what is shared by its block; what the core rounds itself shares a scale over hundreds.
_BITS = {
    "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4, "w8a8": 8.5, "w4a8": 4, "nf4": 4.5,
    "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625,
}  # fmt: skip


def weight_bytes(model: Decoder) -> int:
    """About how many bytes of memory the weights of a network that is served take.

    What kernels hold in a form of their own is reckoned by its precision.
    """
    found = 0.0
    for module in model.modules():
        if module is model.lm_head and model.config.tie_embeddings:
            continue
        # The embeddings are rounded to eight bits at the least.
        least = 8 if isinstance(module, nn.Embedding) or module is model.lm_head else 0
        held = module.held_in if isinstance(module, Linear) and module.product else model.held_in
        for weight in module.parameters(recurse=False):
            bits = _BITS.get(held, 32) if weight.is_meta else 8 * weight.element_size()
            found += weight.numel() * max(bits, least) / 8
    return int(found)


def cache_bytes(model: Decoder) -> int:
    """Bytes of memory that keys and values of one token take."""
    return SlotCache.token_bytes(model)
