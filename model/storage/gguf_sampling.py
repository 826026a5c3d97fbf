"""The decoding defaults that a GGUF file recommends, read and written."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from topkapi.model.decoding.table import PARAMETERS
from topkapi.model.errors import CheckpointError

SAMPLING = {row.gguf: row.name for row in PARAMETERS if row.gguf is not None}
"""Decoding defaults: what follows `general.sampling.`, and our parameter."""


def decimal(number: float) -> float:
    """The number that was meant by a float32: the shortest decimal that rounds to it."""
    return number if isinstance(number, int) else float(str(np.float32(number)))


def read_sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The decoding defaults of `general.sampling`, by our names, as llama.cpp takes them.

    Raises `CheckpointError` naming the key for what is no number and for mirostat's first version.
    """
    found: dict[str, Any] = {}
    for ending, name in SAMPLING.items():
        key = f"general.sampling.{ending}"
        value = metadata.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"the GGUF file's {key} must be a number, not {value!r:.100}", field=key)
        found[name] = decimal(value)
    if found.get("mirostat") == 1:
        raise CheckpointError(
            "the GGUF file asks for general.sampling.mirostat = 1, which is not supported",
            field="general.sampling.mirostat",
            hint="supported: 2, and 0 for off",
        )
    # The penalty counts the last 64 tokens by default; none of them is no penalty, and -1 all.
    span = found.pop("repetition_range", 64)
    if span == 0:
        found.pop("repetition_penalty", None)
    elif found.get("repetition_penalty", 1.0) != 1.0:
        found["repetition_range"] = max(span, 0)
    # A threshold above a half is never reached by two tokens, which switches XTC off.
    if not found.get("xtc_probability") or found.get("xtc_threshold", 0.1) > 0.5:
        found = {name: value for name, value in found.items() if not name.startswith("xtc")}
    if not found.get("mirostat"):
        found = {name: value for name, value in found.items() if not name.startswith("mirostat")}
    return found


def add_sampling(writer: Any, generation: Mapping[str, Any]) -> None:
    """Write a `generation_config.json`'s decoding defaults with the gguf package's `writer`."""
    generation = dict(generation)
    if generation.get("repetition_penalty") is not None:
        # Here nothing said means all tokens, there the last 64.
        generation["repetition_range"] = generation.get("repetition_range") or -1
    for ending, parameter in SAMPLING.items():
        value = generation.get(parameter)
        if value is not None:
            whole = parameter in ("top_k", "repetition_range", "mirostat")
            (writer.add_int32 if whole else writer.add_float32)(f"general.sampling.{ending}", value)
