"""What lies at a checkpoint's path, told without torch and without reading weights.

A wrong path, a directory of something else or a family that is not supported is refused in milliseconds, before
anything that takes seconds to import.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.files import recover_directory
from topkapi.model.hub.cache import hub_name_of
from topkapi.model.hub.names import BOTH_WAYS
from topkapi.model.reading import check_directory, check_place, may_be_read, read_json

ADAPTER_CONFIG = "adapter_config.json"
IMPORTED = (".pth", ".pt", ".ckpt", ".bin")
"""What the files of other trainers end in, of which `topkapi import` makes checkpoints."""


CHECKPOINTS = Path("checkpoints")
"""Where the default checkpoints lie."""


def _elsewhere(path: Path) -> str:
    """What to do about a path at which nothing lies."""
    inside = CHECKPOINTS / path
    return f"did you mean {inside}?" if len(path.parts) == 1 and inside.exists() else BOTH_WAYS


def check_location(path: Path, base: Path | None = None) -> ModelConfig | None:
    """Raise `CheckpointError` for a path at which no checkpoint lies that could be loaded, as far as can be seen
    without reading it: a directory with a supported config.json, an adapter's, or a .gguf file.

    With `base` it must be an adapter's. The configuration of a directory; None for a file or an adapter.
    """
    try:
        check_place(path)
        recover_directory(path)
        if not path.exists():
            raise CheckpointError(f"there is no checkpoint at {path}", hint=_elsewhere(path))
        if path.is_dir():
            check_directory(path)
        elif not path.is_file():
            raise CheckpointError(
                f"{path} is a device, a pipe or a socket, not a checkpoint",
                hint="give a checkpoint directory or a .gguf file",
            )
        if is_adapter(path):
            return None
        if (path / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{path} holds an adapter beside whole weights",
                field=ADAPTER_CONFIG,
                hint="move one of the two to a directory of its own",
            )
        if path.is_file():
            if path.suffix in IMPORTED:
                raise CheckpointError(f"{path} holds weights that are not loaded as they are", hint=import_hint(path))
            if path.suffix != ".gguf":
                raise CheckpointError(
                    f"{path} is a file but not .gguf", hint="give a checkpoint directory or a .gguf file"
                )
        elif not (path / "config.json").is_file():
            raise _not_a_checkpoint(path, "config.json" if base is None else ADAPTER_CONFIG)
        if base is not None:
            raise CheckpointError(f"{path} is not an adapter", hint=f"give the directory that holds {ADAPTER_CONFIG}")
        return None if path.is_file() else ModelConfig.from_hugging_face(read_json(path / "config.json"))
    except OSError as error:
        raise unreadable(path, error) from error


def check_gguf_target(path: Path) -> None:
    """Raise `InvalidRequest` for a path to which no GGUF file could be written."""
    if path.suffix != ".gguf":
        raise InvalidRequest(f"{path} must end in .gguf", field="out")
    if path.is_dir():
        raise InvalidRequest(f"{path} is a directory", field="out", hint="name a file")
    if path.exists():
        raise InvalidRequest(f"{path} is there already", field="out", hint="choose another file")
    if not path.parent.is_dir():
        raise InvalidRequest(f"there is no directory {path.parent}", field="out", hint="make it, or choose another")


def check_directory_target(path: Path) -> None:
    """Raise `InvalidRequest` where something is in the way of a directory to be made, be it a link to nothing."""
    try:
        there = path.is_symlink() or path.exists()
    except OSError as error:
        raise InvalidRequest(f"{str(path)[:200]} cannot be a directory: {error.strerror}", field="out") from None
    if there:
        raise InvalidRequest(f"{path} is there already", field="out", hint="choose another directory")


def unreadable(path: str | Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not let this process read."""
    return CheckpointError(
        f"{error.filename or path} cannot be read: {error.strerror or error}",
        hint="check that this user may read it and that the disk is sound",
    )


def import_hint(path: Path) -> str:
    """The command that makes a checkpoint of what another trainer wrote."""
    stem = (
        path.stem if path.stem not in ("ckpt", "model", "lit_model", "pytorch_model") else path.absolute().parent.name
    )
    return f"make a checkpoint of it first: topkapi import {shlex.quote(str(path))} {shlex.quote(f'imported/{stem}')}"


def checkpoint_name(path: Path) -> str:
    """What a checkpoint is called after its place: its file's or directory's name, on the hub its repository's."""
    name = hub_name_of(path)
    if name is None:
        return path.resolve().name
    return Path(name.variant or name.repository).name


def is_adapter(path: Path) -> bool:
    """Whether the directory holds an adapter, be it beside its base's config.json, and no whole weights."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (path / ADAPTER_CONFIG).is_file() and not any((path / name).is_file() for name in whole)


def _not_a_checkpoint(path: Path, wanted: str) -> CheckpointError:
    """The error for a directory without the file `wanted`, which says where checkpoints lie in it, if they do."""
    what = "an adapter" if wanted == ADAPTER_CONFIG else "a checkpoint"
    message, hint = f"{path / wanted} is missing: {path} is not {what}", f"give a directory that holds {wanted}"
    children = [child for child in path.iterdir() if may_be_read(child)]
    inside = [child for child in children if (child / "config.json").is_file() or is_adapter(child)]
    # A training run points at its checkpoints.
    pointers = [path / name for name in ("best", "last") if path / name in inside]
    if pointers:
        message = f"{path} is a training run, not {what}"
        hint = f"give one that it kept: {' or '.join(map(str, pointers))}"
    elif (path / "config.yaml").is_file():
        message, hint = f"{path} is a training run that has kept no checkpoint yet", "wait for its first save"
    elif inside:
        hint = f"give one that lies in it: {', '.join(map(str, sorted(inside)[:3]))}"
    return CheckpointError(message, hint=hint)
