"""What a checkpoint says of itself for people to read: its card, and the licence it may be used under."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from topkapi.model.errors import CheckpointError
from topkapi.model.reading import check_place

LARGEST_CARD = 1 << 20
"""Bytes of a card; of a longer one the rest is left out."""
_LONGEST_LICENCE = 200
_HEAD = 1 << 16
# Bytes of GGUF's kinds of values by their numbers; texts (8) and lists (9) say how long they are.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT = 8


@dataclass(frozen=True)
class Card:
    """The `text` of a checkpoint's README.md without what is meant for the hub, and its `license`; None for neither."""

    text: str | None = None
    license: str | None = None


def read_card(path: Path) -> Card:
    """The card of the checkpoint at `path`. Never raises: one that can't be read says nothing."""
    try:
        if path.is_file():
            return Card(None, _plain(_gguf_licence(path)))
        with check_place(path / "README.md").open("rb") as file:
            text = file.read(LARGEST_CARD).decode("utf-8", "replace")
    except (OSError, CheckpointError):
        return Card()
    head, body = _parted(text.replace("\r\n", "\n"))
    return Card(body.strip() or None, _plain(_licence(head)))


def _parted(text: str) -> tuple[str, str]:
    """The lines between the dashes that a card on the hub begins with, and what follows."""
    found = re.match(r"\ufeff?---\n(.*?)\n---[ \t]*(?:\n|\Z)", text, re.DOTALL)
    return ("", text) if found is None else (found[1], text[found.end() :])


def _licence(head: str) -> str | None:
    """`license`, or its name where it is another than the hub knows; several are joined."""
    said = _field(head, "license")
    return _field(head, "license_name") or said if said in (None, "other") else said


def _field(head: str, name: str) -> str | None:
    """The value of a line `name: value`, or of the lines of a list below it. Libraries for YAML read far more."""
    found = re.search(rf"^{name}:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", head, re.MULTILINE)
    if found is None:
        return None
    values = [value.strip(" \t-\"'") for value in re.split(r"\n|,", found[1].strip(" \t[]"))]
    return ", ".join(value for value in values if value) or None


def _gguf_licence(path: Path) -> str | None:
    """`general.license` of a GGUF file, which stands before the vocabulary."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    try:
        magic, version, _, count = struct.unpack_from("<4sIQQ", head)
        if magic != b"GGUF" or version < 2:
            return None
        at = struct.calcsize("<4sIQQ")
        for _ in range(count):
            key, at = _gguf_text(head, at)
            (kind,) = struct.unpack_from("<I", head, at)
            at += 4
            if kind == _TEXT:
                value, at = _gguf_text(head, at)
                if key == "general.license":
                    return value
            elif kind in _WIDTHS:
                at += _WIDTHS[kind]
            else:
                of, length = struct.unpack_from("<IQ", head, at)
                at += 12
                if of in _WIDTHS:
                    at += _WIDTHS[of] * length
                    continue
                for _ in range(length):
                    _, at = _gguf_text(head, at)
    except (struct.error, OverflowError):
        # The head is over, or no head of such a file.
        pass
    return None


def _gguf_text(head: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", head, at)
    end = at + 8 + length
    if end > len(head):
        raise struct.error
    return head[at + 8 : end].decode("utf-8", "replace"), end


def _plain(licence: str | None) -> str | None:
    shown = " ".join("".join(sign if sign.isprintable() else " " for sign in licence or "").split())
    return shown[:_LONGEST_LICENCE] or None
