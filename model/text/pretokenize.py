"""Byte-level pre-tokenizers as one regular expression each, in the form tiktoken takes.

tiktoken splits text by one pattern and drops what the pattern does not match, so every pattern made here ends in an
alternative that matches any character.
"""

from collections.abc import Mapping
from typing import Any

from topkapi.model.text.byte_level import components

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The split of GPT-2, which `tokenizers` applies inside `ByteLevel(use_regex=True)`."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""GPT-4's split with every digit on its own, as Qwen2 and Qwen3 use it."""

LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
"""GPT-4's split: numbers in groups of up to three digits, as Llama 3 uses it."""

_ANY_CHARACTER = r"|(?s:.)"


def split_by(*patterns: str) -> dict[str, Any]:
    """The `tokenizer.json` pre-tokenizer that splits by each pattern in turn and then maps bytes to characters."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    bytes_to_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, bytes_to_characters]}


def split_digits_gpt2() -> dict[str, Any]:
    """The `tokenizer.json` pre-tokenizer of SmolLM: single digits first, then GPT-2's split of what lies between."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }


def split_gpt2() -> dict[str, Any]:
    """The `tokenizer.json` pre-tokenizer of GPT-2."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def single_pattern(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """One pattern that splits as `pre_tokenizer` does, or None where no such pattern is known.

    Known: `ByteLevel` alone; one regex `Split` and `ByteLevel`; `Digits` and `ByteLevel`.
    """
    steps = list(components(pre_tokenizer))
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    inner = GPT2_PATTERN if steps[-1].get("use_regex", True) else None
    if len(steps) == 1:
        return inner and inner + _ANY_CHARACTER
    if len(steps) > 2:
        return None
    first = steps[0]
    if first["type"] == "Digits" and inner:
        # Digits become segments of their own: the space before one stays outside, and white space there stays whole.
        digits = r"\p{N}" if first.get("individual_digits") else r"\p{N}+"
        between = inner.replace(r"| ?\p{N}+", "").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
        return digits + "|" + between + _ANY_CHARACTER
    if first["type"] == "Split" and inner is None:
        regex = first.get("pattern", {}).get("Regex")
        kept = (first.get("behavior"), bool(first.get("invert")))
        if regex and kept == ("Isolated", False):
            return f"{regex}{_ANY_CHARACTER}"
        if regex and kept == ("Removed", True):
            return str(regex)
    return None
