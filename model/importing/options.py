"""What a file does not say about its network, and whoever imports it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from topkapi.model.errors import CheckpointError

USUAL_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
"""Heads of attention of GPT-2's four sizes, by the size of their embeddings."""


@dataclass(frozen=True)
class Options:
    """Flags of `topkapi import`; None or empty for what was not given."""

    tokenizer: str | None = None
    data: tuple[Path, ...] = ()
    characters: str | None = None
    heads: int | None = None
    gelu: Literal["exact", "tanh"] | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Network:
    """A network in another layout, ready to be written in ours.

    `config` is a `config.json`; `tensors` yields parameters by `Decoder`'s names. `kind` says what was recognised,
    `assumed` what was taken for granted, in words. `folder` is a directory whose tokenizer belongs to it, `dataset`
    what its trainer called the text.
    """

    kind: str
    config: dict[str, Any]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    assumed: tuple[str, ...] = ()
    folder: Path | None = None
    dataset: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)


def heads_of(hidden: int, said: object, options: Options) -> int:
    """How many heads attention has: as stored, as asked for, or as GPT-2 of that size. Raises `CheckpointError`."""
    if isinstance(said, int) and options.heads is not None and options.heads != said:
        raise CheckpointError(
            f"it has {said} heads of attention, not {options.heads}", field="heads", hint="leave it out"
        )
    heads = said if isinstance(said, int) else options.heads or USUAL_HEADS.get(hidden)
    if heads is None:
        raise CheckpointError(
            f"how many heads its attention has cannot be seen from embeddings of {hidden:,} numbers",
            field="heads",
            hint="say it with --heads N, as the network was made (n_heads in its settings)",
        )
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"{hidden:,} numbers cannot be shared by {heads} heads", field="heads")
    return heads


def count_layers(names: list[str], pattern: str) -> int:
    """How many layers there are, whose numbers follow `pattern` in names. Raises `CheckpointError` for gaps."""
    found = {
        int(rest)
        for name in names
        if name.startswith(pattern) and (rest := name[len(pattern) :].split(".")[0]).isdigit()
    }
    if found != set(range(len(found))):
        raise CheckpointError(f"its layers are not numbered from 0 on without a gap: {sorted(found)[:8]}")
    return len(found)
