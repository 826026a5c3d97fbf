"""Which process trains in a run directory, whether it is still there, and that it is asked to stop."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from topkapi.model.errors import SettingsError, TopkapiError

_FILE = ".process.json"
# The clock may have been set since a process was started.
_SAME_START_SECONDS = 2.0
# What another host does cannot be asked: a run of its that wrote nothing for so long was stopped.
_QUIET_SECONDS = 120.0


@contextmanager
def present(directory: Path) -> Iterator[None]:
    """Note in `directory` that this process trains there, until the block ends; a kill leaves the note behind."""
    path = directory / _FILE
    note = {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}
    try:
        path.write_text(json.dumps(note) + "\n", encoding="utf-8")
    except OSError:
        # A full disk stops the run at its next save; this file is not worth it.
        pass
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class Hold:
    """A lock on a directory that lasts until it is released or this process ends, be it by a kill.

    It leaves nothing behind. Raises `SettingsError` where another process has it. A file system that cannot lock gives
    none, as some that are shared over a network.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptor: int | None = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise SettingsError(
                f"{directory} is being trained by {training_process(directory) or 'another process'}",
                field="out",
                hint="wait for it, or choose another --out",
            ) from None
        except OSError:
            # What two hosts write at once is told by the note of `present` alone.
            self.release()

    def release(self) -> None:
        """Let another process have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def training_process(directory: Path) -> str | None:
    """The process that trains in `directory`, in words; None where there is none."""
    try:
        note: dict[str, Any] = json.loads((directory / _FILE).read_text("utf-8"))
        host, pid, started = note["host"], int(note["pid"]), note["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if host != platform.node():
        return f"process {pid} on {host}" if time.time() - _written(directory) < _QUIET_SECONDS else None
    now = _started(pid)
    if now is None or started is None:
        return f"process {pid}" if _exists(pid) else None
    # The number may have been given to another process since.
    return f"process {pid}" if now > 0 and abs(now - started) < _SAME_START_SECONDS else None


def _written(directory: Path) -> float:
    return max((path.stat().st_mtime for path in directory.glob("*.jsonl")), default=0.0)


def _started(pid: int) -> float | None:
    """When a process was started, in seconds since 1970: 0 where it is over, None where that cannot be told."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0
    except psutil.Error:
        return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is another user's.
        return True
    return True


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

        # Python tells only its main thread of signals; what trains on another one is ended by ending the process.
        ours = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
        previous = {number: signal.signal(number, ask) for number in ours}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
