"""Embeddings beside the engine: on a thread of their own, which reads the network's weights and nothing else.

The engine's loop, cache and queue are not touched, so answers are the same with embeddings computed beside them. All
texts take turns on one thread, and past a limit more are refused.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from topkapi.engine.engine import LONGEST_WAIT
from topkapi.engine.steps import Heartbeat
from topkapi.model.embedding import embed
from topkapi.model.errors import EngineError, EngineStopped, Overloaded, TopkapiError
from topkapi.model.live_adapter import LiveAdapter
from topkapi.model.transformer import Decoder

MOST_WAITING = 64
"""Requests that may wait for the thread."""

LOOK_SECONDS = 0.25
"""Between two looks at whether the thread has been given up."""

Vector = list[float]


class Embedder:
    """The thread that embeds, one text at a time. It is watched as engines are."""

    dead = False

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self._given_up: tuple[EngineStopped, int] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embeddings")
        self._waiting: dict[object, int] = {}
        self._seconds_per_token = 0.0

    def __repr__(self) -> str:
        return "the thread that embeds"

    @property
    def trouble(self) -> EngineStopped | None:
        """Why nothing is embedded at present: the thread has given no sign of life since it was given up."""
        if self._given_up is None:
            return None
        error, count = self._given_up
        return error if self.heartbeat.busy and self.heartbeat.count == count else None

    def abandon(self, error: EngineStopped) -> None:
        """End everything that waits with `error`; nothing is accepted until the thread is back."""
        self._given_up = error, self.heartbeat.count

    async def embedded(
        self, model: Decoder, texts: Sequence[Sequence[int]], adapter: LiveAdapter | None = None
    ) -> list[Vector]:
        """The vectors of texts given as token ids, in order. When it is cancelled, no further text is begun.

        Raises `Overloaded` where too many requests wait, `EngineStopped` where the thread does not get on.
        """
        if len(self._waiting) >= MOST_WAITING:
            seconds = math.ceil(sum(self._waiting.values()) * self._seconds_per_token)
            message, hint = f"{len(self._waiting)} requests wait for embeddings", "try again in a moment"
            raise Overloaded(message, retry_after=max(1, min(LONGEST_WAIT, seconds)), hint=hint)
        request = object()
        self._waiting[request] = sum(map(len, texts))
        try:
            vectors = []
            for text in texts:
                vectors.append(await self._turn(partial(self._embed, model, text, adapter)))
                self._waiting[request] -= len(text)
            return vectors
        finally:
            del self._waiting[request]

    async def _turn(self, call: Callable[[], Vector | TopkapiError]) -> Vector:
        turn = asyncio.get_running_loop().run_in_executor(self._thread, call)
        try:
            while not turn.done():
                if self.trouble is not None:
                    raise EngineStopped(self.trouble.message)
                await asyncio.wait({turn}, timeout=LOOK_SECONDS)
            result = turn.result()
        finally:
            turn.cancel()
        if isinstance(result, TopkapiError):
            raise result
        return result

    def _embed(self, model: Decoder, text: Sequence[int], adapter: LiveAdapter | None) -> Vector | TopkapiError:
        """The vector, or what went wrong: what is no `Exception` would take the event loop down with it."""
        began = time.perf_counter()
        try:
            return embed(model, text, self.heartbeat.beat, adapter)
        except TopkapiError as error:
            return error
        except BaseException as error:
            message = f"embedding failed: {type(error).__name__}: {error}"
            return EngineError(message, hint="send the request again; if it fails again, please report it")
        finally:
            self._seconds_per_token = (time.perf_counter() - began) / max(len(text), 1)
            self.heartbeat.rest()


EMBEDDER = Embedder()
"""The one of this process."""

embedded = EMBEDDER.embedded
