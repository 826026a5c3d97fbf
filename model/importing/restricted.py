"""The one place where a pickle is read, in a process of its own: `model.importing.source` starts it.

`torch.load(weights_only=True)` runs no code of the file: of the globals that it names only those on PyTorch's own list
are looked up (tensors, their storages and types, ordered dictionaries), and any other one ends the load. To that list
nothing is added. What can still go wrong, too much memory or time or a fault of the reader, ends this process, which
has limits, and not the one that asked. Tensors and plain settings are written as safetensors and JSON; nobody else
reads the pickle.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from topkapi.model.errors import CheckpointError
from topkapi.model.importing.told import ALIASES, FACTS, PROBLEM, SECONDS, TENSORS

_STATES = ("model_state_dict", "model", "state_dict", "module")
"""Under which names trainers keep the state of a network beside that of an optimiser."""

_MOST_TENSORS = 1 << 16
_MOST_FACTS, _DEEPEST = 1 << 16, 8


def load(path: Path) -> Any:
    """What `torch.save` wrote: tensors stay on the disk until they are used, where the format lets them."""
    return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))


def main() -> None:
    """Read the file that is named first and write its tensors and facts into the directory that is named second."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    _limit(source.stat().st_size)
    read(source, out)


def read(source: Path, out: Path) -> None:
    """Write the tensors and facts of `source` into the directory `out`, or what is wrong with it. Never raises."""
    try:
        state, facts = _state(load(source))
        aliases = _write(state, source.stat().st_size, out / TENSORS)
        (out / FACTS).write_text(json.dumps({FACTS: facts, ALIASES: aliases}))
    except CheckpointError as error:
        problem = {"message": error.message, "hint": error.hint}
    except MemoryError:
        problem = {"message": "it takes more memory than its size allows", "hint": None}
    except Exception as error:
        problem = {"message": f"{type(error).__name__}: {error}", "hint": None}
    else:
        return
    (out / PROBLEM).write_text(json.dumps(problem))


def _limit(size: int) -> None:
    """Bound memory beyond what the libraries have taken, processor time and what is written, all by the file's size."""
    seconds = SECONDS + (size >> 23)
    bounds = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 2 * size + (1 << 24),
        resource.RLIMIT_CORE: 0,
    }
    with contextlib.suppress(OSError, ValueError):  # only Linux says what is taken
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        bounds[resource.RLIMIT_AS] = taken + 4 * size + (1 << 31)
    for kind, bound in bounds.items():
        with contextlib.suppress(OSError, ValueError):  # macOS has limits that can't be set
            resource.setrlimit(kind, (bound, bound))


def _state(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a network by name, and the settings that lie beside them."""
    if isinstance(content, Mapping):
        for inside in (content, *(content.get(name) for name in _STATES)):
            if isinstance(inside, Mapping) and inside and all(map(_is_parameter, inside.items())):
                facts = {} if inside is content else _plain(content, _DEEPEST, [_MOST_FACTS])
                # Some trainers keep `_extra_state` or None beside tensors, which is nothing to compute with.
                return {name: each for name, each in inside.items() if isinstance(each, Tensor)}, facts or {}
    kind = type(content).__name__
    within = f" with {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) else ""
    raise CheckpointError(
        f"it holds no state of a network, but a {kind}{within}",
        hint="save it with torch.save(model.state_dict(), 'model.pth')",
    )


def _is_parameter(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and (isinstance(item[1], Tensor) or item[1] is None)


def _plain(value: Any, depth: int, left: list[int]) -> Any:
    """What of a value is numbers, texts, lists and mappings of them; None for all else, tensors among it.

    `left` counts down what may still be looked at, for lists may hold the same list a thousand times, and so on.
    """
    left[0] -= 1
    if left[0] < 0 or value is None or isinstance(value, bool | int):
        return None if left[0] < 0 else value
    if isinstance(value, str):
        return value if len(value) < 10_000 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth and isinstance(value, Mapping) and len(value) < 1000:
        plain = ((str(name), _plain(each, depth - 1, left)) for name, each in value.items())
        return {name: each for name, each in plain if each is not None}
    if depth and isinstance(value, list | tuple) and len(value) < 1000:
        return [_plain(each, depth - 1, left) for each in value]
    return None


def _write(state: Mapping[str, Tensor], size: int, path: Path) -> dict[str, str]:
    """Write the tensors; of those that are one in memory the first, the others being told as its aliases."""
    if len(state) > _MOST_TENSORS:
        raise CheckpointError(f"it holds {len(state):,} tensors, and no network has so many")
    written: dict[str, Tensor] = {}
    first: dict[tuple[int, int, torch.Size, tuple[int, ...]], str] = {}
    aliases = {}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"its tensor {name} is no plain one ({tensor.layout}, on {tensor.device})")
        if tensor.numel() * tensor.element_size() > min(tensor.untyped_storage().nbytes(), 2 * size):
            raise CheckpointError(f"its tensor {name} of {list(tensor.shape)} is larger than what is stored of it")
        place = (tensor.data_ptr(), tensor.element_size(), tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        # Others may share a part of what it lies in, which the format does not allow.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        written[name] = tensor if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    save_file({name: tensor.detach() for name, tensor in written.items()}, path)
    return aliases


if __name__ == "__main__":
    main()
