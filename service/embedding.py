"""Embeddings beside the engine: on a thread of their own, which reads the network's weights and nothing else.

The engine's loop, cache and queue are not touched, so answers are the same with embeddings computed beside them. All
texts take turns on one thread, and past a limit more are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from model.embedding import embed
from model.errors import Overloaded
from service.models import LoadedModel

MOST_WAITING = 64
"""Requests that may wait for the thread."""

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embeddings")
_waiting: set[object] = set()


async def embedded(model: LoadedModel, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The vectors of texts given as token ids, in order. When it is cancelled, no further text is begun.

    Raises `Overloaded` where too many requests wait.
    """
    if len(_waiting) >= MOST_WAITING:
        raise Overloaded(f"{len(_waiting)} requests wait for embeddings", hint="try again in a moment")
    request = object()
    _waiting.add(request)
    try:
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(_thread, embed, model.checkpoint.model, text) for text in texts]
    finally:
        _waiting.discard(request)
