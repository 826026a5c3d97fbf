"""A watch that notices from outside when a thread that computes gives no sign of life any more.

A thread that hangs in the network can't tell of it, and it can't be ended either: others find out by its heartbeat.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from topkapi.engine.steps import Heartbeat
from topkapi.model.errors import EngineStopped

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Between two looks at every heartbeat."""

RETURN_SECONDS = 5.0
"""How long a thread that was given up may take to come back before the process ends for it."""


class Watched(Protocol):
    """What a watch looks after."""

    heartbeat: Heartbeat

    @property
    def trouble(self) -> EngineStopped | None:
        """Why nothing is computed at present, if nothing is."""
        ...

    @property
    def dead(self) -> bool:
        """Whether it has ended and will not begin anew by itself."""
        ...

    def abandon(self, error: EngineStopped) -> None:
        """End everything that waits with `error`, from another thread; `trouble` stays until the thread is back."""
        ...


@dataclass
class _Seen:
    count: int
    seconds: float = 0.0
    abandoned: bool = False


class Watch:
    """A thread that looks at heartbeats. What gives no sign for `limit_s` seconds (0: ever) is abandoned.

    Counted is the time that the watch itself has seen go by: a process that was stopped, or a machine that slept, has
    no thread that hangs. What is dead, or abandoned and not back after another `RETURN_SECONDS`, is `lost`: only a new
    process can help then.
    """

    def __init__(self, watched: Callable[[], Iterable[Watched]], limit_s: float) -> None:
        self.lost: EngineStopped | None = None
        self.watched, self._limit_s = watched, limit_s
        # Between two looks it keeps nobody alive.
        self._seen: WeakKeyDictionary[Watched, _Seen] = WeakKeyDictionary()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look_after, name="watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def look(self, seconds: float) -> None:
        """Look at every heartbeat, `seconds` after the last time."""
        each = list(self.watched())
        self._seen = WeakKeyDictionary(
            {watched: self._seen.get(watched) or _Seen(watched.heartbeat.count) for watched in each}
        )
        lost = None
        for watched in each:
            heartbeat, seen = watched.heartbeat, self._seen[watched]
            if not heartbeat.busy or heartbeat.count != seen.count:
                seen.count, seen.seconds, seen.abandoned = heartbeat.count, 0.0, False
            else:
                seen.seconds += seconds
            hangs = bool(self._limit_s) and seen.seconds >= self._limit_s
            if (hangs or watched.dead) and not seen.abandoned:
                seen.abandoned = True
                hung = EngineStopped(f"a step has been going on for more than {self._limit_s:g} s")
                error = watched.trouble or (hung if hangs else EngineStopped("the engine has stopped"))
                logger.critical("%r: %s; what waits for it is ended", watched, error.message)
                watched.abandon(error)
            if watched.dead or (hangs and seen.seconds >= self._limit_s + RETURN_SECONDS):
                lost = watched.trouble
        self.lost = lost

    def _look_after(self) -> None:
        last = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            now = time.monotonic()
            try:
                self.look(min(now - last, 2 * LOOK_SECONDS))
            except Exception:
                logger.exception("a look at the engines failed")
            last = now
