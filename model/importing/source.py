"""A file of another trainer as named tensors and plain settings, without a pickle ever being read in this process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from topkapi.model.errors import CheckpointError
from topkapi.model.importing.told import ALIASES, FACTS, LARGEST, PROBLEM, SECONDS, TENSORS

LONGEST_NAME = 300
"""Characters of a tensor's name."""

_COMPILED = ("_orig_mod.", "module.", "_forward_module.")
"""What torch.compile and wrappers for several processes put before every name."""


@dataclass
class Source:
    """A network as it was stored: shapes by name, and settings that lay beside it. Tensors come one by one."""

    path: Path
    shapes: dict[str, list[int]]
    facts: dict[str, Any]
    files: list[Any] = field(default_factory=list)
    places: dict[str, tuple[int, str]] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name without the prefixes of wrappers."""
        if name not in self.places:
            raise CheckpointError(f"{self.path} lacks {name}", hint="it was not saved whole: copy it again")
        index, stored = self.places[name]
        found: Tensor = self.files[index].get_tensor(stored)
        return found


@contextmanager
def opened(path: Path, scratch: Path) -> Iterator[Source]:
    """What `torch.save` wrote to `path`, read in another process, which leaves its tensors in `scratch` meanwhile.

    Raises `CheckpointError` for what holds no network, or more than plain numbers and names.
    """
    with several([path], scratch) as source:
        yield source


@contextmanager
def several(paths: list[Path], scratch: Path) -> Iterator[Source]:
    """The same of a network that lies in several files. Raises `CheckpointError` as `opened` does."""
    source = Source(paths[0], {}, {})
    with tempfile.TemporaryDirectory(prefix=".import-", dir=scratch) as directory:
        for index, path in enumerate(paths):
            place = Path(directory) / str(index)
            place.mkdir()
            _read_apart(path, place)
            told = json.loads((place / FACTS).read_text())
            source.facts |= told[FACTS]
            file: Any = safe_open(place / TENSORS, framework="pt")
            source.files.append(file)
            stored = {name: name for name in file.keys()} | told[ALIASES]  # noqa: SIM118 (not a mapping)
            for name, held in stored.items():
                plain = _plain_name(name)
                if plain in source.shapes:
                    raise CheckpointError(f"{path} holds the tensor {plain} twice", hint="keep one of the two")
                source.shapes[plain] = file.get_slice(held).get_shape()
                source.places[plain] = (index, held)
        try:
            yield source
        finally:
            source.files.clear()


def _plain_name(name: str) -> str:
    # Names are shown in errors and lists.
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise CheckpointError(f"a tensor has the name {name[:LONGEST_NAME]!r:.200}, which no trainer gives")
    while prefix := next((each for each in _COMPILED if name.startswith(each)), None):
        name = name.removeprefix(prefix)
    return name


def _read_apart(path: Path, out: Path) -> None:
    size = path.stat().st_size
    if size > LARGEST:
        raise CheckpointError(f"{path} has {size:,} bytes, and one of more than {LARGEST:,} is not read")
    _run_apart(path, out, size)
    problem = json.loads((out / PROBLEM).read_text()) if (out / PROBLEM).is_file() else None
    if problem is not None:
        raise _told(path, problem)


def _run_apart(path: Path, out: Path, size: int) -> None:
    """Have another process, `model.importing.restricted`, read the file and leave what it found in `out`."""
    root = str(Path(__file__).parents[3])
    # Nothing of the surroundings is needed; what is not handed on cannot be taken along.
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    kept |= {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "topkapi.model.importing.restricted", str(path.resolve()), str(out)]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=kept, check=False,
            timeout=2 * (SECONDS + (size >> 23)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{path}: reading it takes too long, and was ended") from None
    if ended.returncode:
        said = ended.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = f"status {ended.returncode}" + (f", {said[-1][:200]}" if said else "")
        raise CheckpointError(
            f"{path}: the process that read it ended before it was done ({reason})",
            hint="the file is damaged, needs more memory than its size allows, or the disk is full",
        )


def _told(path: Path, problem: Mapping[str, Any]) -> CheckpointError:
    message = " ".join(str(problem["message"]).split())
    if found := re.search(r"GLOBAL (\S+)", message):
        return CheckpointError(
            f"{path} holds more than numbers: it names {found[1]}, and to read that would be to run code",
            hint="where it was trained, save the numbers alone: torch.save(model.state_dict(), 'model.pth')",
        )
    if "TorchScript" in message:
        return CheckpointError(
            f"{path} is a compiled program (TorchScript), not weights",
            hint="where it was made, save the weights: torch.save(model.state_dict(), 'model.pth')",
        )
    if problem["hint"] is not None:
        return CheckpointError(f"{path}: {message}", hint=problem["hint"])
    # PyTorch advises to load it unsafely, which is never done here.
    if "weights_only" in message:
        message = "it is not what torch.save writes"
    return CheckpointError(
        f"{path} cannot be read: {message[:300]}", hint="it is damaged, or no file of torch.save: copy it again"
    )


def check_names(source: Source, known: re.Pattern[str], kind: str) -> None:
    """Raise `CheckpointError` for a tensor that a layout does not have, by its name."""
    strange = [name for name in source.shapes if not known.fullmatch(name)]
    if strange:
        raise CheckpointError(
            f"{source.path} looks like {kind}, but has {', '.join(strange[:3])}"
            f"{f' and {len(strange) - 3} more tensors' if len(strange) > 3 else ''} that such a network does not have",
            hint="it was trained with other code, which computes something else",
        )
