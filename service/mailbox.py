"""From the engine's thread to event loops: what a step brings, with one wake-up for all of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from typing import ClassVar
from weakref import WeakKeyDictionary, ref

from topkapi.engine.request import Event

Post = tuple[int, list[Event], float]
"""The number of a job, what a step brought for it, and when."""


class Mailbox:
    """What other threads hand to an event loop, which is woken once for all that has come meanwhile.

    A step has something for every request; to be woken for each would have the two threads wait for one another.
    """

    _here: ClassVar[threading.local] = threading.local()
    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox]] = WeakKeyDictionary()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Mailbox:
        """The mailbox of `loop`; to be called on its thread."""
        if loop not in cls._all:
            cls._all[loop] = cls(loop)
        return cls._all[loop]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # The table holds the loop weakly, so its value must not hold it either.
        self._loop = ref(loop)
        self._posts: deque[tuple[asyncio.Queue[Post], Post]] = deque()
        self._woken = False

    def post(self, queue: asyncio.Queue[Post], post: Post) -> None:
        """Have the loop put `post` into `queue`. Safe from any thread."""
        self._posts.append((queue, post))
        held: list[Mailbox] | None = getattr(self._here, "held", None)
        if held is None:
            self._wake()
        elif self not in held:
            held.append(self)

    @classmethod
    @contextlib.contextmanager
    def together(cls) -> Iterator[None]:
        """What this thread posts in the block wakes each loop once, at its end.

        Waking a loop lets go of the interpreter: half-way through, the loop would take it for the first post alone.
        """
        held = cls._here.held = list[Mailbox]()
        try:
            yield
        finally:
            cls._here.held = None
            for mailbox in held:
                mailbox._wake()

    def _wake(self) -> None:
        loop = self._loop()
        if self._woken or loop is None:
            return
        self._woken = True
        try:
            loop.call_soon_threadsafe(self._empty)
        except RuntimeError:
            # A closed loop: the server is going down and nobody is left to read.
            self._woken = False
            self._posts.clear()

    def _empty(self) -> None:
        # Before looking, so that what is posted from here on wakes the loop again.
        self._woken = False
        while self._posts:
            queue, post = self._posts.popleft()
            queue.put_nowait(post)
