"""Being asked to stop: Ctrl-C and SIGTERM end a run where it can be continued."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from topkapi.model.errors import TopkapiError


class Interrupted(TopkapiError):
    """The run was asked to stop; it has saved its state and can be resumed."""

    kind = "interrupted"


class StopRequest:
    """The signal that asks to stop, once one has come; `notice` is told so."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.asked: signal.Signals | None = None
        self._notice = notice

    @property
    def name(self) -> str:
        """The signal's; where another process got it, what that most likely was."""
        return (self.asked or signal.SIGTERM).name

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """In the block, Ctrl-C and SIGTERM are noted; a second one ends the process at once."""

        def ask(number: int, _: object) -> None:
            if self.asked is not None:
                raise KeyboardInterrupt
            self.asked = signal.Signals(number)
            self._notice(f"{self.name}: saving after this step")

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
