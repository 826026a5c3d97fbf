"""LoRA adapters by name, each beside a loaded checkpoint: read when they are asked for, within a budget of memory.

What a request was given stays in memory until it is over; of the others the least recently used ones go first.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.conversation.template_trial import try_template
from topkapi.model.errors import CheckpointError, Overloaded, UnknownModel
from topkapi.model.hub.cache import hub_name_of
from topkapi.model.live_adapter import LiveAdapter, memory_bytes
from topkapi.model.storage.beside import StoredAdapter, load_adapter
from topkapi.model.storage.checkpoint import Checkpoint, weights_digest

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

MIB = 2**20


class Budget(Generic[Key, Value]):
    """What is in memory, up to `most` bytes together: the least recently used that is not `busy` goes first.

    Not safe from several threads.
    """

    def __init__(self, most: int, busy: Callable[[Value], bool]) -> None:
        self.most = most
        self._busy = busy
        # The least recently used one first.
        self._held: dict[Key, tuple[Value, int]] = {}

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._held))

    @property
    def taken(self) -> int:
        """Bytes that are taken."""
        return sum(size for _, size in self._held.values())

    def get(self, key: Key) -> Value | None:
        """What is held by that key, from now on the most recently used."""
        held = self._held.pop(key, None)
        if held is None:
            return None
        self._held[key] = held
        return held[0]

    def drop(self, key: Key) -> None:
        """Hold it no longer."""
        self._held.pop(key, None)

    def make(self, size: int) -> bool:
        """Let go of what it takes for `size` more bytes; whether there is room. Where there can't be, nothing goes."""
        missing = self.taken + size - self.most
        going = []
        for key, (value, held) in self._held.items():
            if missing <= 0:
                break
            if not self._busy(value):
                going.append(key)
                missing -= held
        if missing > 0:
            return False
        for key in going:
            del self._held[key]
        return True

    def put(self, key: Key, value: Value, size: int) -> None:
        """Hold what there is room for."""
        assert self.taken + size <= self.most, "room is made first"
        self._held[key] = value, size


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that can be asked for by its `name`. Its numbers are in memory only while they are of use.

    `base` is the name of the checkpoint beside which it stands, `size` how many bytes it takes in memory.
    """

    name: str
    path: Path
    within: Path | None
    base: str
    rank: int
    size: int
    created: int
    chat: ChatTemplate | None
    generation: dict[str, object] | None

    def beside(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as requests for the adapter see it."""
        generation = checkpoint.generation if self.generation is None else self.generation
        return replace(checkpoint, chat=self.chat or checkpoint.chat, generation=generation)


class Use:
    """One request's use of an adapter; as long as it lives, the adapter's numbers stay in memory."""

    def __init__(self, adapters: Adapters, adapter: Adapter, base: Checkpoint) -> None:
        self.adapter, self.base = adapter, base
        self._adapters = adapters
        self._live: LiveAdapter | None = None

    def live(self) -> LiveAdapter:
        """The adapter in memory, read if need be: not for the event loop.

        Raises `UnknownModel` for what is no longer there, or no longer fits, and `Overloaded` where other requests'
        adapters leave no room.
        """
        if self._live is None:
            self._live = self._adapters.read(self)
        return self._live


@dataclass(eq=False)
class _Held:
    live: LiveAdapter
    base: Checkpoint
    uses: weakref.WeakSet[Use]


class Adapters:
    """The adapters of a process, by name. Safe from any thread."""

    def __init__(self, most_bytes: int) -> None:
        # Replaced whole, never changed, so that whoever iterates over it is not disturbed.
        self._adapters: dict[str, Adapter] = {}
        self._budget: Budget[Adapter, _Held] = Budget(most_bytes, lambda held: bool(held.uses))
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._digests: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def get(self, name: str | None) -> Adapter | None:
        """The adapter of that name."""
        return self._adapters.get(name or "")

    def loaded(self, adapter: Adapter) -> bool:
        """Whether its numbers are in memory."""
        with self._lock:
            return adapter in self._budget

    @property
    def taken(self) -> int:
        """Bytes of adapters in memory."""
        with self._lock:
            return self._budget.taken

    def add(self, name: str, path: Path, base_name: str, base: Checkpoint, *, within: Path | None = None) -> Adapter:
        """Make the adapter at `path` one that requests may name, in the place of an earlier one of that name.

        It is read to see that it can be. Raises `CheckpointError` for one that can't, that does not fit the base, or
        that alone takes more than the budget.
        """
        stored = self._load(path, base, within)
        if stored.chat is not None:
            try_template(stored.chat, base.tokenizer)
        size, most = memory_bytes(stored.matrices), self._budget.most
        if size > most:
            raise CheckpointError(
                f"the adapter {path} takes {_mib(size)} of memory, and all together may take {_mib(most)}",
                hint="start the server with more --adapter-memory",
            )
        now = int(time.time())
        adapter = Adapter(
            name, path, within, base_name, stored.rank, size, now, stored.chat, stored.generation
        )  # fmt: skip
        with self._lock:
            before = self._adapters.get(name)
            self._adapters = self._adapters | {name: adapter}
            if before is not None:
                self._budget.drop(before)
        return adapter

    def remove(self, name: str) -> None:
        """Let nobody name it any more. What runs with it ends as it would have."""
        with self._lock:
            adapter = self._adapters.get(name)
            if adapter is not None:
                self._adapters = {each: other for each, other in self._adapters.items() if each != name}
                self._budget.drop(adapter)

    def read(self, use: Use) -> LiveAdapter:
        """What a use gives; see there."""
        adapter = use.adapter
        found = self._held(use)
        if found is None:
            with self._reading:
                # Somebody else may have read it meanwhile.
                found = self._held(use)
                if found is None:
                    self._make_room(adapter.size, adapter.name)
                    found = self._read(use)
        return found

    def _held(self, use: Use) -> LiveAdapter | None:
        with self._lock:
            held = self._budget.get(use.adapter)
            if held is None:
                return None
            if held.base.model is not use.base.model:
                # Made for the checkpoint that had the base's name before.
                self._budget.drop(use.adapter)
                return None
            held.uses.add(use)
            return held.live

    def _make_room(self, size: int, name: str) -> None:
        with self._lock:
            if self._budget.make(size):
                return
        # What is over may still be held by itself.
        gc.collect()
        with self._lock:
            if not self._budget.make(size):
                taken = _mib(self._budget.taken)
                message = (
                    f"the adapter {name} takes {_mib(size)} of memory, and running requests use {taken} for others"
                )
                raise Overloaded(f"{message}, of {_mib(self._budget.most)}", hint="send the request again in a moment")

    def _read(self, use: Use) -> LiveAdapter:
        adapter = use.adapter
        try:
            stored = self._load(adapter.path, use.base, adapter.within)
            if memory_bytes(stored.matrices) != adapter.size:
                raise CheckpointError(f"{adapter.path} is not what it was when it was loaded")
        except CheckpointError as error:
            logger.error("the adapter %s can no longer be read: %s", adapter.name, error.message)
            # Where it lies is no concern of whoever asks for it.
            problem = error.message.replace(f"{adapter.path.parent}{os.sep}", "")
            message = f"the adapter {adapter.name} can no longer be read: {problem}"
            raise UnknownModel(message, field="model", hint="whoever runs the server may load it again") from None
        live = LiveAdapter(use.base.model, stored.matrices)
        held = _Held(live, use.base, weakref.WeakSet([use]))
        with self._lock:
            # One that was taken away meanwhile is this request's alone.
            if self._adapters.get(adapter.name) is adapter:
                self._budget.put(adapter, held, adapter.size)
        logger.info(
            "the adapter %s is in memory: %s of %s are taken", adapter.name, _mib(self.taken), _mib(self._budget.most)
        )
        return live

    def _load(self, path: Path, base: Checkpoint, within: Path | None) -> StoredAdapter:
        stored = load_adapter(path, base, within=within)
        if stored.digest is not None and stored.digest != self._digest(base):
            raise CheckpointError(
                f"the adapter {path} was trained on other weights than {base.name}'s",
                hint="name the base that it was trained on",
            )
        return stored

    def _digest(self, base: Checkpoint) -> str:
        verified = (base.details.get("sha256") or {}).get("model.safetensors")
        if isinstance(verified, str):
            return verified
        # Reading a whole checkpoint takes a while.
        if base.model not in self._digests:
            self._digests[base.model] = weights_digest(base.path)
        return self._digests[base.model]


def is_base(named: str, checkpoint: Checkpoint, names: list[str]) -> bool:
    """Whether the base that an adapter names, a path or a model of the hub, is `checkpoint`, which is called `names`.

    Weights are compared where the adapter has their digest; a copy elsewhere has the same name at its end.
    """
    hub, place = hub_name_of(checkpoint.path), checkpoint.path.resolve()
    known = {str(place), place.name, checkpoint.name, *names, *([hub.repository] if hub else [])}
    last = named.rstrip("/").rpartition("/")[2]
    return bool({named.casefold(), last.casefold()} & {each.casefold() for each in known})


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
