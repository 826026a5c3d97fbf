"""What is checked of a checkpoint directory before it is read: `topkapi.json`, its digests, and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.files import sha256
from topkapi.model.reading import check_memory, member, read_json
from topkapi.model.storage.tensors import stored_shapes, weight_files

FORMAT_VERSION = 1


def read_details(directory: Path) -> dict[str, Any]:
    """`topkapi.json`, if there is one. Raises `CheckpointError` where what is used of it is something else."""
    path = directory / "topkapi.json"
    details = read_json(path)
    version, digests, parent = (details.get(name) for name in ("format_version", "sha256", "parent"))
    if (
        not isinstance(version, int | None)
        or not isinstance(digests, dict | None)
        or not isinstance(parent, dict | None)
    ):
        raise CheckpointError(
            f"{path}: format_version must be a whole number, sha256 and parent objects",
            hint="copy or download the checkpoint again, or delete topkapi.json",
        )
    return details


def check_sizes(path: Path, config: ModelConfig) -> None:
    """Refuse sizes of `config.json` that the weights do not have, before anything is made of such a size."""
    shapes = stored_shapes(path)
    if shapes and config.num_layers > len(shapes):
        raise CheckpointError(
            f"{path}: config.json says {config.num_layers:,} layers, and the weights have {len(shapes):,} tensors",
            field="num_hidden_layers",
            hint="config.json and the weights belong to different models",
        )
    check_memory(path, sum(file.stat().st_size for file in weight_files(path) if file.is_file()))


def verify_digests(directory: Path, details: Mapping[str, Any]) -> None:
    """Compare the files with the digests in `topkapi.json`. Raises `CheckpointError` naming the one that differs."""
    if (details.get("format_version") or FORMAT_VERSION) > FORMAT_VERSION:
        raise CheckpointError(
            f"{directory / 'topkapi.json'} has format version {details['format_version']}, this Topkapi reads up to "
            f"{FORMAT_VERSION}",
            hint="upgrade Topkapi",
        )
    for name, digest in (details.get("sha256") or {}).items():
        path = member(directory, name, "topkapi.json")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", hint="copy or download the checkpoint again")
        if sha256(path) != digest:
            raise CheckpointError(
                f"{path} differs from its digest in topkapi.json: it was altered or only partly copied",
                hint="copy or download it again; if you changed it on purpose, delete topkapi.json",
            )
