"""What checkpoints say of themselves: cards as the hub has them, damaged ones, and GGUF's licence."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from topkapi.model.reading import confined
from topkapi.model.storage.card import Card, read_card

HUB = "---\nlanguage: en\n{}\ntags:\n- a\n---\n\n# Name\n\nlicense: not this\n"


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ('license: "mit"', "mit"),
        ("license: other\nlicense_name: llama3.2", "llama3.2"),
        ("license: other", "other"),
        ("license:\n- mit\n- cc-by-4.0", "mit, cc-by-4.0"),
        ("license: [mit, cc-by-4.0]", "mit, cc-by-4.0"),
        ("license:", None),
        ("licence: mit", None),
        ("license: a\u202eb" + "c" * 500, "a b" + "c" * 197),
    ],
)
def test_a_card_of_the_hub_names_the_licence(tmp_path: Path, lines: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(HUB.format(lines), encoding="utf-8")
    assert read_card(tmp_path) == Card("# Name\n\nlicense: not this", licence)


def test_what_is_no_card_says_nothing(tmp_path: Path) -> None:
    assert read_card(tmp_path) == read_card(tmp_path / "nowhere") == Card()
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n\xff")
    assert read_card(tmp_path) == Card("\ufffd", "mit")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nno end")
    assert read_card(tmp_path) == Card("---\nlicense: mit\nno end", None)


def test_a_card_outside_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "README.md").symlink_to(tmp_path / "secret")
    assert read_card(inside) == Card("secret")
    with confined(inside):
        assert read_card(inside) == Card()


def test_a_gguf_file_names_its_licence(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.quantization_version") + struct.pack("<II", 4, 2),
        text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("general.numbers") + struct.pack("<IIQ", 9, 0, 3) + b"abc",
        text("general.license") + struct.pack("<I", 8) + text("apache-2.0"),
    ]
    file = tmp_path / "model.gguf"
    whole = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + b"".join(fields)
    file.write_bytes(whole)
    assert read_card(file) == Card(None, "apache-2.0")
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert read_card(file) == Card()
    file.write_bytes(whole.replace(struct.pack("<IIQ", 9, 0, 3), struct.pack("<IIQ", 9, 0, 2**63)))
    assert read_card(file) == Card()
