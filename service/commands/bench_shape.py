"""What `topkapi bench` measures, and what it is refused for before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from topkapi.model.errors import SettingsError

RANDOM_CONTEXT = 1024
"""Tokens that GPT-2's shape with random weights has room for."""


@dataclass(frozen=True)
class Shape:
    """What is measured: `streams` requests of `prompt_tokens` at once, each continued by `tokens`."""

    streams: int = 32
    tokens: int = 64
    prompt_tokens: int = 64
    repeats: int = 5


def check_shape(shape: Shape, context_length: int | None, slots: int | None = None, name: str = "") -> None:
    """Raise `SettingsError` naming the flag for a shape that cannot be measured on the checkpoint called `name`, which
    has room for `context_length` tokens and computes `slots` requests together (None: not known yet)."""
    for field, least in (("streams", 1), ("tokens", 8), ("prompt_tokens", 1), ("repeats", 1)):
        if getattr(shape, field) < least:
            flag = f"--{field.replace('_', '-')}"
            raise SettingsError(f"{flag} must be at least {least}, not {getattr(shape, field)}", field=field)
    if context_length is not None and shape.prompt_tokens + shape.tokens > context_length:
        raise SettingsError(
            f"{shape.prompt_tokens} prompt tokens and {shape.tokens} more do not fit the context of {context_length} "
            "tokens",
            field="tokens",
            hint="give fewer with --prompt-tokens or --tokens",
        )
    if slots is not None and shape.streams > slots:
        raise SettingsError(
            f"{name} computes up to {slots} requests together, not {shape.streams}",
            field="streams",
            hint=f"give at most --streams {slots}",
        )
