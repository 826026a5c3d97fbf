"""What a training run's `best` or `last` leads to, swapped in a few seconds after it was saved."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from topkapi.model.errors import TopkapiError
from topkapi.service.locations import adapter_locations, followed, name_of_location, split_location
from topkapi.service.models import Conflict, Models

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks at where a link leads."""

State = tuple[str, int] | None


class Followed:
    """A link, and what takes the place of what it led to: `swap` is called with where it leads now."""

    def __init__(self, name: str, link: Path, swap: Callable[[Path], object]) -> None:
        self.name, self.link = name, link
        self._swap = swap
        self._seen = self._state()

    def look(self) -> bool:
        """Swap where the link leads elsewhere than it did, or what it leads to was written anew; whether that was so.

        What can't be loaded is tried again once it has changed; what others are in the way of, with the next look.
        """
        state = self._state()
        # While a link is being replaced, or leads to what is gone, what is served stays.
        if state is None or state == self._seen:
            return False
        try:
            self._swap(Path(state[0]))
        except Conflict:
            return False
        except TopkapiError:
            # The log has it, and so has /models.
            self._seen = state
            return False
        self._seen = state
        logger.warning("%s is %s from now on", self.name, state[0])
        return True

    def _state(self) -> State:
        target = os.path.realpath(self.link)
        try:
            return target, os.stat(target).st_mtime_ns
        except OSError:
            return None


def all_followed(models: Models, locations: Sequence[str]) -> list[Followed]:
    """The links among what is served."""
    found = []
    for location in locations:
        name, link = name_of_location(location), split_location(location)[1]
        if followed(link):
            found.append(Followed(name, link, partial(_swap, models, name)))
    for adapter in adapter_locations(models.settings):
        if followed(adapter.path):
            found.append(Followed(adapter.name, adapter.path, partial(_swap_adapter, models, adapter.name)))
    return found


def _swap(models: Models, name: str, path: Path) -> None:
    # What somebody has unloaded stays so.
    if name in models.names:
        models.load_as(name, path, replace=True)


def _swap_adapter(models: Models, name: str, path: Path) -> None:
    adapter = models.adapters.get(name)
    if adapter is not None:
        models.load_adapter(name, path, base=adapter.base, replace=True)


def follow(models: Models, links: Sequence[Followed]) -> None:
    """Look after links on a thread of its own, for as long as the process lives."""

    def look() -> None:
        while not models.closed.wait(LOOK_SECONDS):
            for link in links:
                try:
                    link.look()
                except Exception:
                    logger.exception("%s could not be looked after", link.name)

    if links:
        threading.Thread(target=look, name="following", daemon=True).start()
