"""What a run shows while it goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

# Without a terminal, a line this often.
_SECONDS_BETWEEN_LINES = 30.0
# A line's characters where it is not a terminal's; all of it stands in the run's files.
WIDE = 120
# All that a terminal may take for a command; line ends and tabs aside.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """Messages and the progress of one run. Everything goes to standard output, flushed line by line."""

    def __init__(self) -> None:
        self._rich: Any = None
        self._progress: Any = None
        self._task: Any = None
        self._total = 0
        self._last_line = 0.0
        self._news: dict[str, str] = {}
        if sys.stdout.isatty():
            try:
                import rich.console
            except ImportError:
                return
            self._rich = rich.console.Console()

    def message(self, text: str) -> None:
        """Print a line above the progress bar; control characters, which a sample may hold, as `\\x1b`."""
        text = visible(text)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def news(self, about: str, text: str) -> None:
        """Print one line, cut to the terminal's width; nothing where the last one on the same thing said the same."""
        if self._news.get(about) != text:
            self._news[about] = text
            width = shutil.get_terminal_size((WIDE, 0)).columns if self._rich is not None else WIDE
            text = visible(text)
            self.message(text if len(text) <= width else f"{text[: width - 1]}…")

    def warn(self, findings: Sequence[str]) -> None:
        """Print what was found wrong, a line each."""
        for finding in findings:
            self.message(f"warning: {finding}")

    def start(self, total: int, done: int) -> None:
        """Begin to show progress over `total` steps."""
        self._total, self._last_line = total, time.monotonic()
        if self._rich is None:
            return
        from rich import progress
        from rich.table import Column

        # On a narrow terminal it is the facts that are cut short, not how far the run is.
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._progress = progress.Progress(
            progress.BarColumn(bar_width=min(40, max(8, self._rich.width // 8))),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            progress.TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            progress.TextColumn("{task.fields[facts]}", table_column=rest),
            console=self._rich,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=total, completed=done, facts="", left="")
        self._progress.start()

    def advance(self, step: int, facts: str, seconds_left: float) -> None:
        """Step `step` is done; `facts` are its loss and speed."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, facts=facts, left=f"{duration(seconds_left)} left")
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"step {step}/{self._total}  {facts}  {duration(seconds_left)} left", flush=True)

    def count(self, what: str, done: int, total: int) -> None:
        """Progress of something before training: a line now and then."""
        if done == total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES / 6:
            self._last_line = time.monotonic()
            print(f"{what}: {done} of {total} file{'s' * (total != 1)}", flush=True)

    def stop(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def visible(text: str) -> str:
    """`text` with control characters written out, as `\\x1b`; line ends and tabs stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
