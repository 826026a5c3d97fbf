"""How fast a prompt was read and an answer written, as llama.cpp tells it."""

from __future__ import annotations

import math
import time
from typing import Any

from pydantic import BaseModel

from topkapi.service.generation import CompletionOutput, Generation


class LlamaTimings(BaseModel):
    """Counts and milliseconds of reading the prompt and of writing."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float | None
    predicted_per_second: float | None


class Stopwatch:
    """The timings of one generation, from now on."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._started = time.monotonic()
        self._first: dict[int, float] = {}

    def token(self, output: CompletionOutput) -> None:
        """A token of `output` has come."""
        self._first.setdefault(output.index, time.monotonic())

    def of(self, output: CompletionOutput) -> dict[str, Any]:
        """The timings of one output so far."""
        done = self._generation.completed.get(output.prompt_index)
        if done is None:
            # The engine reports at the end; until then, as seen from here.
            now = time.monotonic()
            first, cached = self._first.get(output.index, now), 0
            prefill, decode = (first - self._started) * 1000, (now - first) * 1000
        else:
            cached, prefill, decode = done.cached_tokens, done.timings.prefill_s * 1000, done.timings.decode_s * 1000
        prompt = len(self._generation.plan.prompts[output.prompt_index]) - cached
        return {
            "cache_n": cached,
            **_speed("prompt", prompt, prefill),
            **_speed("predicted", len(output.tokens), decode),
        }


def _speed(kind: str, count: int, milliseconds: float) -> dict[str, Any]:
    measured = count > 0 and milliseconds > 0 and math.isfinite(milliseconds)
    return {
        f"{kind}_n": count,
        f"{kind}_ms": milliseconds,
        f"{kind}_per_token_ms": milliseconds / count if measured else None,
        f"{kind}_per_second": count / milliseconds * 1000 if measured else None,
    }
