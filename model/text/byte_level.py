"""What bytes a vocabulary entry stands for.

A `tokenizer.json` stores its entries as text. Byte-level BPE (GPT-2 section 2.2) writes each byte as one printable
character; SentencePiece vocabularies write a space as U+2581 and bytes without an entry as `<0x0A>`; WordPiece marks
what continues a word. Everything that streams, stops or scores text works on the bytes.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from topkapi.model.errors import CheckpointError


def _byte_characters() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in characters)
    characters.update({byte: chr(0x100 + index) for index, byte in enumerate(others)})
    return characters


BYTE_TO_CHARACTER: Mapping[int, str] = _byte_characters()
CHARACTER_TO_BYTE: Mapping[str, int] = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}
_BYTE_ENTRY = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_bytes(entry: str) -> bytes | None:
    """The bytes of a byte-level entry, or None where `entry` holds a character outside GPT-2's table."""
    try:
        return bytes([CHARACTER_TO_BYTE[character] for character in entry])
    except KeyError:
        return None


def _byte_level_or_text(entry: str) -> bytes:
    data = byte_level_bytes(entry)
    return entry.encode() if data is None else data


def components(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The leaves of a `tokenizer.json` normalizer, pre-tokenizer or decoder, its Sequences flattened, in order."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for member in part.get(key) or []:
                yield from components(member)
    else:
        yield part


def entry_decoder(definition: Mapping[str, Any]) -> Callable[[str], bytes]:
    """A function from a vocabulary entry of this `tokenizer.json` to the bytes it stands for.

    What a decoder does to the beginning of a whole text is left out: an answer goes on from its prompt.
    Raises CheckpointError for a decoder that no entry's bytes can show.
    """
    model = definition["model"]
    decoders = list(components(definition.get("decoder")))
    for step in decoders:
        _check_decoder(step)
    leaves = [*components(definition.get("pre_tokenizer")), *decoders]
    kinds = {leaf["type"]: leaf for leaf in leaves}
    if "ByteLevel" in kinds or any(step["type"] == "ByteLevel" for step in components(definition.get("normalizer"))):
        return _byte_level_or_text
    if model.get("type") == "WordPiece" or "WordPiece" in kinds:
        prefix = kinds.get("WordPiece", {}).get("prefix") or model.get("continuing_subword_prefix") or "##"
        return lambda entry: entry.removeprefix(prefix).encode() if entry.startswith(prefix) else b" " + entry.encode()
    suffix = kinds.get("BPEDecoder", {}).get("suffix") or model.get("end_of_word_suffix")
    if suffix:
        return lambda entry: entry.removesuffix(suffix).encode() + (b" " if entry.endswith(suffix) else b"")
    replaced = [("\u2581", " ")]
    for leaf in leaves:
        if leaf["type"] == "Metaspace":
            replaced.append((leaf.get("replacement", "\u2581"), " "))
    replaced += [(step["pattern"]["String"], step["content"]) for step in decoders if step["type"] == "Replace"]

    def sentencepiece(entry: str) -> bytes:
        match = _BYTE_ENTRY.fullmatch(entry)
        if match:
            return bytes([int(match[1], 16)])
        for old, new in replaced:
            entry = entry.replace(old, new)
        return entry.encode()

    return sentencepiece


def _check_decoder(step: Mapping[str, Any]) -> None:
    known = ("BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")
    problem = None
    if step["type"] not in known:
        problem = f"a decoder of the type {step['type']!r}"
    elif step["type"] == "Replace" and "String" not in step["pattern"]:
        problem = "a decoder that replaces by a regular expression"
    elif step["type"] == "Strip" and step["content"] != " ":
        problem = f"a decoder that strips {step['content']!r}"
    if problem:
        hint = f"known decoders: {', '.join(known)}"
        raise CheckpointError(f"the tokenizer has {problem}, which is not supported", field="decoder", hint=hint)
