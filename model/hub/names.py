"""Models by their names on the Hugging Face hub, as people type and paste them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from topkapi.model.errors import CheckpointError

EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BOTH_WAYS = (
    "give a checkpoint directory or a .gguf file, or the name of a model on the Hugging Face hub as owner/name, such "
    f"as {EXAMPLE}"
)
"""The hint for what is neither a path nor the name of a model."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_PREFIX = r"(?:hf://|(?:https?:/{1,2})?(?:www\.)?(?:hf\.co|huggingface\.co)/)(?:models/)?"
_NAME = re.compile(
    rf"(?P<prefix>{_PREFIX})?(?P<repository>{_PART}/{_PART})"
    r"(?:/(?:tree|resolve|blob)/(?P<branch>[^/\s?@:]+)(?:/(?P<file>[^\s?@:]+))?)?/?(?:\?[^\s]*)?"
    r"(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./-]*))?"
    r"(?::(?P<variant>[A-Za-z0-9_][A-Za-z0-9_./-]*))?"
)
_EXPLICIT = re.compile(_PREFIX)
_OURS = ("runs", "checkpoints")
"""Directories that the documents speak of; nobody of that name publishes models."""

FILES = (".gguf", ".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".json", ".yaml", ".txt")
"""What a file's name ends in, and no model's on the hub."""


@dataclass(frozen=True)
class HubName:
    """A model on the hub: `owner/name`, a branch, tag or commit of it (None: main), and, of a repository of GGUF files,
    the quantisation or the file that is meant (None: the usual one)."""

    repository: str
    revision: str | None = None
    variant: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repository}{revision}" + ("" if self.variant is None else f":{self.variant}")


def hub_name(text: str) -> HubName | None:
    """The model that `text` names, be it there or not; None where it cannot be the name of one.

    Raises `CheckpointError` for what begins as an address of the hub and names no model.
    """
    found = _NAME.fullmatch(text)
    if found is None or (found["prefix"] is None and _EXPLICIT.match(text)):
        if _EXPLICIT.match(text):
            raise CheckpointError(
                f"{text} names no model on the Hugging Face hub",
                hint=f"write owner/name, owner/name@revision or owner/name:Q4_K_M, such as {EXAMPLE}",
            )
        return None
    repository, revision = found["repository"], found["revision"] or found["branch"]
    if "--" in repository or ".." in f"{repository} {revision}":
        return None  # the hub has no such names, and in the cache they would lead elsewhere
    return HubName(repository, revision, found["variant"] or found["file"])


def meant(text: str | Path) -> HubName | None:
    """The model on the hub that is meant by what was given as a checkpoint; None for a path.

    What exists is a path, and so is what looks like one: it begins with a sign of paths, ends as files do, or lies in a
    directory that is there.
    """
    text = os.fspath(text)
    if os.path.lexists(os.path.expanduser(text)):
        return None
    name = hub_name(text)
    if name is None or _EXPLICIT.match(text):
        return name
    if text.lower().endswith(FILES) and ":" not in text:
        return None
    return None if text.partition("/")[0] in _OURS or Path(text.partition("/")[0]).is_dir() else name
