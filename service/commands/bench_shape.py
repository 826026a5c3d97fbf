"""What `topkapi bench` measures, and what it is refused for before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from topkapi.model.errors import SettingsError

RANDOM_CONTEXT = 1024
"""Tokens that GPT-2's shape with random weights has room for."""

LEAST_STEPS = 4
"""Steps that a rate is taken from, at least: of fewer, when they are noticed decides more than how long they took."""

STEP_TOKENS = 256
"""Tokens that the engine computes in a step, those of prompts and one of each text that has begun."""


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
    if shape.tokens < (least := _least_tokens(shape)):
        raise SettingsError(
            f"with --tokens {shape.tokens} the first of {shape.streams} streams ends before all have begun, so that "
            "nothing of them together could be measured",
            field="tokens",
            hint=f"give at least --tokens {least}, or fewer --streams or --prompt-tokens",
        )
    if slots is not None and shape.streams > slots:
        raise SettingsError(
            f"{name} computes up to {slots} requests together, not {shape.streams}",
            field="streams",
            hint=f"give at most --streams {slots}",
        )


def check_shapes(
    streams: Sequence[int], shape: Shape, context: int | None, name: str = "", slots: int | None = None
) -> None:
    """`check_shape` for each number of streams."""
    for count in streams:
        check_shape(replace(shape, streams=count), context, slots, name)


def _least_tokens(shape: Shape) -> int:
    """Tokens that the first stream generates while the prompts of the others are read, and while they are measured."""
    # On average half of the streams have begun, and take their part of each step.
    left = max(STEP_TOKENS, shape.streams) - shape.streams // 2
    reading = -(-shape.streams * shape.prompt_tokens // left)
    return reading + LEAST_STEPS + 2
