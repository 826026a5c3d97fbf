"""What a checkpoint is, told from its headers: no weights are read, and torch is not needed."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from topkapi.model.errors import CheckpointError
from topkapi.model.reading import read_json
from topkapi.model.storage.location import ADAPTER_CONFIG, is_adapter

_LONGEST_HEADER = 1 << 24
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Inspection:
    """Bytes of a checkpoint's files, its family and what most of its numbers are stored in; None where unreadable."""

    size: int
    family: str | None
    precision: str | None


def inspect(path: Path) -> Inspection:
    """What lies at a checkpoint's path. Never raises: what is damaged says less of itself."""
    try:
        if path.is_file():
            from topkapi.model.hub.files import quantisation

            return Inspection(path.stat().st_size, _gguf_architecture(path), quantisation(path.name))
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        if is_adapter(path):
            base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
            return Inspection(size, f"adapter of {base}", _stored_in(path))
        family = read_json(path / "config.json").get("model_type")
        return Inspection(size, family if isinstance(family, str) else None, _stored_in(path))
    except (OSError, CheckpointError):
        return Inspection(0, None, None)


def _stored_in(directory: Path) -> str | None:
    """The type that most numbers of a directory's safetensors files have."""
    numbers: Counter[str] = Counter()
    try:
        for path in directory.glob("*.safetensors"):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, end = tensor["data_offsets"]
                    numbers[str(tensor["dtype"])] += end - start
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if not numbers:
        return None
    stored = numbers.most_common(1)[0][0]
    return _TYPES.get(stored, stored.lower())


def _gguf_architecture(path: Path) -> str | None:
    """`general.architecture`, which converters write first."""
    with path.open("rb") as file:
        head = file.read(1024)
    try:
        magic, _, _, _, length = struct.unpack_from("<4sIQQQ", head)
        key = head[32 : 32 + length]
        kind, size = struct.unpack_from("<IQ", head, 32 + length)
        if magic != b"GGUF" or key != b"general.architecture" or kind != 8:
            return None
        return head[44 + length : 44 + length + size].decode()
    except (struct.error, UnicodeDecodeError):
        return None
