"""Engines of checkpoints that have been replaced: they end what has begun, then they are taken down."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

from topkapi.engine.engine import Engine
from topkapi.model.errors import Cancelled
from topkapi.service.garbage import sweep

LOOK_SECONDS = 0.1
"""Between two looks at whether a replaced checkpoint is still in somebody's hands."""

LOOKS_A_COLLECTION, IDLE_SECONDS = 30, 120.0
"""How often garbage is collected meanwhile, and how long somebody may do nothing with what is in their hands."""


class Leaving:
    """The engines that are on their way out; once `closed` is set, none is waited for."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self._engines: set[Engine] = set()

    def __iter__(self) -> Iterator[Engine]:
        return iter(tuple(self._engines))

    def __len__(self) -> int:
        return len(self._engines)

    def see_off(self, engine: Engine, held: Callable[[], object | None]) -> None:
        """Close `engine` once nobody has its checkpoint in hand: until then `held` gives what they have."""
        self._engines.add(engine)
        threading.Thread(target=self._wait, args=([engine], held), name=f"replaced-{engine.name}", daemon=True).start()

    def _wait(self, engines: list[Engine], held: Callable[[], object | None]) -> None:
        # A thread has its arguments until it is over, and the engine is to be gone before.
        engine, looks, idle_since = engines.pop(), 0, time.monotonic()
        while held() is not None and not self._closed.wait(LOOK_SECONDS):
            looks, now = looks + 1, time.monotonic()
            if engine.running or engine.waiting:
                idle_since = now
            elif now - idle_since > IDLE_SECONDS:
                # Somebody has it in hand who does nothing with it.
                break
            elif looks % LOOKS_A_COLLECTION == 0:
                # What is over may still be held by itself.
                gc.collect()
        engine.close(why=Cancelled(f"{engine.name} has been replaced", hint="send the request again"))
        self._engines.discard(engine)
        del engine
        sweep()
