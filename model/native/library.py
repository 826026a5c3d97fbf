"""The compiled library: where it is, what its C interface looks like, and which instruction sets it may use here."""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from topkapi.model.errors import EngineError, SettingsError

SWITCH = "TOPKAPI_NATIVE"
"""Environment variable: 0 leaves the core alone, the name of an instruction set takes none beyond that one."""

HERE = Path(__file__).parent

c_int, c_pointer = ctypes.c_int32, ctypes.c_void_p


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


# As core.h, packing.h and network.h declare them.
Shape = _structure(
    "Shape",
    **dict.fromkeys(
        ("vocabulary", "hidden", "inner", "layers", "heads", "key_heads", "head_size", "layer_norm", "gated", "rotated",
         "head_norm", "positions", "activation", "parallel"), c_int),
    **dict.fromkeys(
        ("epsilon", "embedding_scale", "attention_scale", "attention_cap", "residual_scale", "logit_divisor",
         "logit_cap"), ctypes.c_float),
)  # fmt: skip
Source = _structure(
    "Source", weights=c_pointer, bias=c_pointer, **dict.fromkeys(("kind", "format", "outputs", "inputs"), c_int)
)
NormWeights = _structure("NormWeights", weight=c_pointer, bias=c_pointer)
LayerWeights = _structure(
    "LayerWeights",
    **dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"), Source),
    **dict.fromkeys(
        ("before_attention", "after_attention", "before_inner", "after_inner", "query_norm", "key_norm"), NormWeights),
    window=c_int, angles=c_int,
)  # fmt: skip
OuterWeights = _structure(
    "OuterWeights", embedding=Source, head=Source, norm=NormWeights, positions=c_pointer, embedding_norm=NormWeights
)
Span = _structure("Span", slot=c_int, first=c_int, count=c_int, position=c_int)
Pass = _structure(
    "Pass", rows=c_int, spans=c_int, span=c_pointer, tokens=c_pointer, states=c_pointer, cosines=c_pointer,
    sines=c_pointer, kinds=c_int, angles=c_int, kept=c_int, kept_layers=c_pointer, kept_states=c_pointer,
    adapters=c_pointer,
)  # fmt: skip


def digest_of_sources() -> str:
    """What the sources beside this file are told by, as setup.py does; nothing where there are none."""
    sources = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest() if sources else ""


@cache
def _loaded() -> ctypes.CDLL | str:
    """The compiled core, or why there is none."""
    path = HERE / "_core.so"
    if not path.exists():
        return "the native core was not built: install Topkapi where there is a C++ compiler"
    try:
        core = ctypes.CDLL(str(path))
    except OSError:
        return "the native core was built for another machine: install Topkapi on this one"
    # One that lays its structures out otherwise would read anything.
    try:
        core.topkapi_sources.restype = ctypes.c_char_p
        built_from = core.topkapi_sources().decode()
    except AttributeError:
        built_from = ""
    if digest_of_sources() not in ("", built_from):
        return "the native core was built from other sources: build it again with make install, or pip"
    return core


@cache
def library() -> ctypes.CDLL | None:
    """The compiled core, or None where there is none to be used."""
    core = _loaded()
    if isinstance(core, str):
        return None
    core.topkapi_level_name.restype = ctypes.c_char_p
    core.topkapi_threads_new.restype = c_pointer
    core.topkapi_block_bytes.restype = ctypes.c_int64
    core.topkapi_block_bytes.argtypes = [c_pointer, c_int]
    for name in ("network", "slots", "adapter"):
        free = getattr(core, f"topkapi_{name}_free")
        free.argtypes, free.restype = [c_pointer], None
    core.topkapi_network_new.argtypes = [c_pointer, c_int, c_pointer, c_pointer]
    core.topkapi_network_layer.argtypes = [c_pointer, c_int, c_pointer]
    core.topkapi_network_outer.argtypes = [c_pointer, c_pointer]
    core.topkapi_slots_new.argtypes = [c_pointer, c_int, c_int, c_int, c_pointer, c_pointer]
    core.topkapi_adapter_new.argtypes = [c_pointer, c_pointer]
    core.topkapi_adapter_matrix.argtypes = [c_pointer, c_pointer, c_int, c_int, c_pointer, c_pointer]
    core.topkapi_run.argtypes = [c_pointer, c_pointer, c_pointer]
    core.topkapi_logits.argtypes = [c_pointer, c_pointer, c_int, c_pointer]
    return core


@cache
def levels() -> tuple[str, ...]:
    """The instruction sets that this processor and the core have in common, the plainest first; none without a core.

    Raises `SettingsError` where the environment variable `TOPKAPI_NATIVE` names another one.
    """
    core, most = library(), os.environ.get(SWITCH, "")
    if core is None or most == "0":
        return ()
    found = tuple(core.topkapi_level_name(at).decode() for at in range(core.topkapi_levels()))
    if most in ("", "1"):
        return found
    if most not in found:
        raise SettingsError(
            f"{SWITCH}={most} is no instruction set of this processor",
            field=SWITCH,
            hint=f"use one of {', '.join(found)}, or 0 for PyTorch alone",
        )
    return found[: found.index(most) + 1]


def why_not() -> str | None:
    """Why there is no core to compute with; None where there is one."""
    if levels():
        return None
    if library() is not None:
        return f"the native core is switched off by {SWITCH}=0"
    return str(_loaded())


@cache
def shared_threads(count: int) -> int:
    """Threads that networks share; they sleep while there is nothing to do, and live as long as the process."""
    core = library()
    made = None if core is None else core.topkapi_threads_new(count)
    if made is None:
        raise EngineError(f"{count} threads cannot be started")
    return int(made)


def check(code: int) -> None:
    """Raise what a call's answer stands for."""
    if code == 1:
        raise MemoryError("the native core has no memory left")
    if code == 2:
        raise EngineError("the native core was asked for what it cannot compute")
    if code:
        raise EngineError("the native core failed")
