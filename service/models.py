"""The loaded checkpoints, each with an engine of its own, and the adapters that stand beside them.

A checkpoint that is replaced goes in peace: its engine ends what has begun, then it is taken down (`Leaving`).
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import cached_property
from pathlib import Path

from topkapi.engine.engine import Engine
from topkapi.engine.watch import Watch
from topkapi.model.conversation.template_trial import try_template
from topkapi.model.errors import Cancelled, CheckpointError, EngineStopped, SettingsError, TopkapiError, UnknownModel
from topkapi.model.hub.cache import hub_name_of
from topkapi.model.reading import confined
from topkapi.model.serving import cache_bytes, kernels, prepare, reading, try_network, weight_bytes
from topkapi.model.speed import explained
from topkapi.model.storage.beside import base_named, same_vocabulary
from topkapi.model.storage.card import Card, read_card
from topkapi.model.storage.checkpoint import Checkpoint, load_checkpoint
from topkapi.model.user_files import expanded
from topkapi.service.adapters import MIB, Adapter, Adapters, Use, is_base
from topkapi.service.embedding import EMBEDDER
from topkapi.service.garbage import give_back, sweep
from topkapi.service.keys import KeyRing
from topkapi.service.locations import name_of, split_location
from topkapi.service.mailbox import Mailbox
from topkapi.service.metrics import Metrics, ModelMetrics
from topkapi.service.settings import Settings
from topkapi.service.tracing import Tracing, tracing_of_environment

logger = logging.getLogger(__name__)

__all__ = ["Conflict", "LoadedModel", "Models"]


class Hold:
    """Alive as long as somebody has the checkpoint in hand that it belongs to, alone or beside an adapter."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory, the engine that computes it, and its metrics; or these as an adapter's requests see them.

    Whoever has one in hand may use it: it is taken down only after that.
    """

    name: str
    checkpoint: Checkpoint
    engine: Engine
    metrics: ModelMetrics
    created: int
    control_ids: frozenset[int]
    why: str = ""
    """Why its matrices are held in what they are held in."""
    warnings: tuple[str, ...] = ()
    """What whoever loads it should know."""
    card: Card = field(default_factory=Card)
    """What it says of itself."""
    use: Use | None = None
    """The adapter that is asked for by this name, if it is an adapter's."""
    hold: Hold = field(default_factory=Hold, repr=False)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together: the checkpoint's, or fewer where memory is short."""
        return self.engine.config.context_length

    @property
    def dtype(self) -> str:
        """What the matrices are held in."""
        return self.checkpoint.model.held_in

    @property
    def cache_dtype(self) -> str:
        """What keys and values are held in."""
        return self.checkpoint.model.cache_dtype

    @property
    def memory(self) -> dict[str, int]:
        """About how many bytes its `weights` take, and its `cache` of keys and values once all of it is in use."""
        network = self.engine.network
        of_cache = network.slots * network.capacity * cache_bytes(self.checkpoint.model)
        return {"weights": weight_bytes(self.checkpoint.model), "cache": of_cache}

    @property
    def kernels(self) -> str:
        """What computes the network: the native core, on which instruction set, or PyTorch."""
        return kernels(self.checkpoint.model)

    def token_text(self, token_id: int) -> str:
        """The bytes of one token as text; a part of a character shows as U+FFFD."""
        return self.checkpoint.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def answer_bytes(self, token_id: int) -> bytes:
        """What a generated token adds to the answer's text: nothing for control tokens."""
        return b"" if token_id in self.control_ids else self.checkpoint.tokenizer.token_bytes(token_id)


class Conflict(SettingsError):
    """A name is taken, or another checkpoint is being loaded at the moment."""

    status = 409
    kind = "conflict"


class Models:
    """The checkpoints a process serves, by name, the default one first.

    They may be loaded and unloaded while others serve, from any thread, one at a time.
    """

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics()
        self.settings = settings
        self.draining = False
        """Whether what runs is finished and nothing new is taken."""
        self.replica = ""
        """The name of this process among several that serve the same, by which the streams it keeps are found."""
        self.metrics.draining.set_function(lambda: self.draining)
        self.loading: str | None = None
        """The name of the checkpoint that is being loaded."""
        # Replaced whole, never changed, so that whoever iterates over it is not disturbed.
        self._models: dict[str, LoadedModel] = {}
        self._aliases: dict[str, str] = {}
        self._changing = threading.Lock()
        self._draft: Checkpoint | None = None
        self.adapters = Adapters(settings.adapter_memory * MIB)
        self.failures: dict[str, str] = {}
        """Why the newest checkpoint of a name could not take the place of the one that is served, by name."""
        self.closed = threading.Event()
        """Set once the engines are to end."""
        self._leaving = Leaving(self.closed)
        self._watch = Watch(lambda: (EMBEDDER, *self._engines), settings.step_timeout)

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    @cached_property
    def keys(self) -> KeyRing:
        """Whose requests are answered. Raises `SettingsError` for keys that can't be read."""
        return KeyRing.of(self.settings)

    @cached_property
    def tracing(self) -> Tracing | None:
        """What tells OpenTelemetry of requests, where that is wanted. Raises `SettingsError` where it can't be had."""
        return tracing_of_environment() if self.settings.traces else None

    @property
    def names(self) -> list[str]:
        """The names of the loaded checkpoints."""
        return list(self._models)

    @property
    def _engines(self) -> tuple[Engine, ...]:
        """Those of the loaded checkpoints, and of replaced ones that end what they have begun."""
        return (*(model.engine for model in self), *self._leaving)

    @property
    def trouble(self) -> tuple[str, EngineStopped] | None:
        """Which thread computes nothing at present, and why; None while all do."""
        return next(((repr(each), each.trouble) for each in self._watch.watched() if each.trouble is not None), None)

    @property
    def lost(self) -> EngineStopped | None:
        """Why only a new process can help, if so."""
        return self._watch.lost

    def load(self, location: str) -> LoadedModel:
        """Load `PATH` or `NAME=PATH` and start its engine.

        Raises `CheckpointError` for what cannot be loaded and `Conflict` for a name that is taken.
        """
        name, path = split_location(location)
        hub = hub_name_of(path)
        # Clients of other servers ask for a model by its whole name on the hub.
        known = hub is None or self._owner(hub.repository) is not None
        return self.load_as(name or name_of(path), path, aliases=() if hub is None or known else (hub.repository,))

    def load_as(
        self,
        name: str,
        path: Path,
        *,
        aliases: Sequence[str] = (),
        default: bool = False,
        replace: bool = False,
        within: Path | None = None,
    ) -> LoadedModel:
        """Load the checkpoint at `path` and start its engine; with `default` it answers requests that name none.

        With `replace` it takes the place of the one with its name: requests that have begun there end there, those that
        come from now on begin here, and where it can't be loaded the old one stays (`failures` says why). With
        `within`, nothing is read that lies outside that directory. Raises as `load` does.
        """
        with self._alone():
            if (owner := self._owner(name)) and not (replace and owner == name and name in self._models):
                raise self._taken(name)
            self._check_aliases(name, aliases)
            self.loading = name
            before = self._models.get(name)
            try:
                checkpoint = load_checkpoint(path, within=within, **reading(self.settings.dtype))
                with confined(within):
                    card = read_card(path)
                loaded = self._start(name, checkpoint, path, card)
            except Exception as error:
                if before is not None:
                    self._not_replaced(name, path, error)
                raise
            finally:
                self.loading = None
                give_back()
            self.failures.pop(name, None)
            if default:
                self._models = {name: loaded} | self._models
            if aliases or before is None:
                self._name_also(name, aliases)
            if before is not None:
                self._leaving.see_off(before.engine, weakref.ref(before.hold))
        return loaded

    def _not_replaced(self, name: str, path: Path, error: Exception) -> None:
        problem = error.message if isinstance(error, TopkapiError) else f"{type(error).__name__}: {error}"
        # Where it lies is no concern of whoever asks what is loaded.
        self.failures = self.failures | {name: problem.replace(f"{path.parent}{os.sep}", "")}
        logger.error("%s is served as before, for %s could not take its place: %s", name, path, problem)

    def _start(self, name: str, checkpoint: Checkpoint, path: Path, card: Card) -> LoadedModel:
        try:
            return self.add(name, checkpoint, math.floor(path.stat().st_mtime), card)
        except TopkapiError:
            raise
        except Exception as error:  # weights that no kernel takes, or no memory for the cache
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CheckpointError(f"{path} is read but cannot be served ({problem})") from error

    def unload(self, name: str) -> None:
        """Let go of a checkpoint with the adapters beside it; their running requests end as cancelled.

        An adapter's own requests end as they would have. Raises `UnknownModel`.
        """
        with self._alone():
            loaded = self.get(name)
            if loaded.use is not None:
                self.adapters.remove(name)
                return
            for adapter in self.adapters_of(loaded.name):
                self.adapters.remove(adapter.name)
            self._models = {each: model for each, model in self._models.items() if model is not loaded}
            self._name_also(loaded.name, ())
        loaded.engine.close()
        loaded.metrics.forget()
        del loaded
        sweep()

    def change(self, name: str, *, aliases: Sequence[str] | None = None, default: bool = False) -> LoadedModel:
        """Give a checkpoint other aliases than it had, or make it the default one.

        Raises `UnknownModel`, and `Conflict` for an alias that is taken.
        """
        with self._alone():
            loaded = self.get(name)
            if loaded.use is not None:
                hint = f"its base is {loaded.use.adapter.base}"
                raise Conflict(f"{name} is an adapter, which has neither aliases nor is the default one", hint=hint)
            if aliases is not None:
                self._check_aliases(loaded.name, aliases)
                self._name_also(loaded.name, aliases)
            if default:
                self._models = {loaded.name: loaded} | self._models
        return loaded

    def load_adapter(
        self, name: str, path: Path, *, base: str | None = None, replace: bool = False, within: Path | None = None
    ) -> LoadedModel:
        """Let requests name the adapter at `path`, beside the checkpoint `base` (None: the one that it was trained on).

        Raises `CheckpointError` for one that can't be read, or for whose base no checkpoint is loaded, `Conflict` for a
        name that is taken, `UnknownModel` for a base.
        """
        with self._alone():
            if self._owner(name) and not (replace and self.adapters.get(name)):
                raise self._taken(name)
            self.loading = name
            try:
                loaded = self._base_of(path, within) if base is None else self.get(base)
                if loaded.use is not None:
                    raise Conflict(f"{base} is an adapter itself", field="base", hint="name a checkpoint")
                self.adapters.add(name, path, loaded.name, loaded.checkpoint, within=within)
            except TopkapiError as error:
                if self.adapters.get(name):
                    self._not_replaced(name, path, error)
                raise
            finally:
                self.loading = None
            self.failures.pop(name, None)
        return self.get(name)

    def _base_of(self, path: Path, within: Path | None) -> LoadedModel:
        with confined(within):
            named = base_named(path)
        for loaded in self:
            if named and is_base(named, loaded.checkpoint, [loaded.name, *self.aliases(loaded.name)]):
                return loaded
        said = "a base that it does not name" if named is None else "another base" if within else repr(named)
        raise CheckpointError(
            f"the adapter {path} was trained on {said}, and no loaded checkpoint is known to be that",
            field="base",
            hint=f"say beside which it is to stand ({', '.join(self.names) or 'none is loaded'}): base in a request, "
            "NAME@BASE=PATH on the command line",
        )

    def adapters_of(self, name: str) -> list[Adapter]:
        """The adapters beside a checkpoint."""
        return [adapter for adapter in self.adapters if adapter.base == name]

    @property
    def everything(self) -> list[LoadedModel]:
        """What requests may name: each checkpoint, then the adapters beside it."""
        found = []
        for loaded in self:
            found += [loaded, *(self._beside(loaded, adapter) for adapter in self.adapters_of(loaded.name))]
        return found

    def _beside(self, loaded: LoadedModel, adapter: Adapter) -> LoadedModel:
        checkpoint, use = adapter.beside(loaded.checkpoint), Use(self.adapters, adapter, loaded.checkpoint)
        return replaced(loaded, name=adapter.name, checkpoint=checkpoint, created=adapter.created, use=use, card=Card())

    def aliases(self, name: str) -> list[str]:
        """The other names of a checkpoint."""
        return [alias for alias, target in self._aliases.items() if target == name]

    @property
    def every_alias(self) -> list[str]:
        """The other names of all checkpoints."""
        return list(self._aliases)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._changing.acquire(blocking=False):
            busy = f"{self.loading} is being loaded" if self.loading else "another change is under way"
            raise Conflict(f"{busy}, and checkpoints change one at a time", hint="try again when it is done")
        try:
            yield
        finally:
            self._changing.release()

    def _owner(self, name: str) -> str | None:
        return name if name in self._models or self.adapters.get(name) else self._aliases.get(name)

    def _check_aliases(self, name: str, aliases: Sequence[str]) -> None:
        for position, alias in enumerate(aliases):
            if self._owner(alias) not in (None, name):
                raise self._taken(alias)
            if alias == name or alias in aliases[:position]:
                raise Conflict(f"the name {alias!r} is given twice", field="aliases", hint="give it once")

    def _taken(self, name: str) -> Conflict:
        hint = "give this one another name (NAME=PATH on the command line), or unload the other one first"
        return Conflict(f"a checkpoint named {name!r} is loaded already", field="name", hint=hint)

    def _name_also(self, name: str, aliases: Sequence[str]) -> None:
        others = {alias: target for alias, target in self._aliases.items() if target != name}
        self._aliases = others | dict.fromkeys(aliases, name)

    def add(self, name: str, checkpoint: Checkpoint, created: int = 0, card: Card | None = None) -> LoadedModel:
        """Start an engine for a checkpoint that is in memory already. Its matrices become unfit for training.

        Raises `CheckpointError` where its chat template fails on every conversation, or its network on a token.
        """
        chat = checkpoint.chat
        warnings = () if chat is None else tuple(try_template(chat, checkpoint.tokenizer))
        prepare(checkpoint.model, self.settings.dtype, self.settings.kv_cache_dtype)
        try_network(checkpoint.model)
        why = explained(checkpoint.model, self.settings.dtype)
        draft = self._draft_for(name, checkpoint)
        engine = Engine(
            checkpoint.model,
            name=name,
            max_queue=self.settings.max_queue,
            max_queued_tokens=self.settings.max_queue_tokens,
            max_queue_seconds=self.settings.max_queue_seconds or None,
            draft=None if draft is None else draft.model,
            handing_out=Mailbox.together,
        )
        engine.start()
        self._watch.start()
        metrics = ModelMetrics(self.metrics, name, engine)
        control_ids = frozenset(checkpoint.tokenizer.control_tokens.values())
        known = (why, warnings, card or Card())
        loaded = LoadedModel(name, checkpoint, engine, metrics, created, control_ids, *known)
        self._models = self._models | {name: loaded}
        return loaded

    def _draft_for(self, name: str, checkpoint: Checkpoint) -> Checkpoint | None:
        """The draft checkpoint of the settings, for checkpoints with its vocabulary.

        Raises `SettingsError` where not even the first checkpoint has it.
        """
        if self.settings.draft is None:
            return None
        if self._draft is None:
            self._draft = load_checkpoint(expanded(self.settings.draft), **reading(self.settings.dtype))
            prepare(self._draft.model, self.settings.dtype, self.settings.kv_cache_dtype)
        if same_vocabulary(self._draft.tokenizer, checkpoint.tokenizer):
            return self._draft
        if not self._models:
            raise SettingsError(
                f"the draft checkpoint {self.settings.draft} has another vocabulary than {name}",
                field="draft",
                hint="name one with the same tokenizer, for example an earlier or a smaller one trained beside it",
            )
        return None

    def get(self, name: str | None = None) -> LoadedModel:
        """The checkpoint of that name or alias, or the first one. Raises `UnknownModel` listing the loaded ones."""
        models = self._models
        found = next(iter(models.values()), None) if name is None else models.get(self._aliases.get(name, name))
        if found is None and (adapter := self.adapters.get(name)) is not None and adapter.base in models:
            found = self._beside(models[adapter.base], adapter)
        if found is None:
            names = ", ".join([*models, *self._aliases, *(each.name for each in self.adapters)])
            asked = "no checkpoint" if name is None else f"no checkpoint named {name!r}"
            hint = f"loaded: {names}" if names else "load one with POST /models, or start the server with one"
            raise UnknownModel(f"{asked} is loaded", field="model", hint=hint)
        return found

    @property
    def idle(self) -> bool:
        """Whether no engine has anything to do."""
        return not any(engine.running or engine.waiting for engine in self._engines)

    def stop(self) -> None:
        """Have every engine end what it does as cancelled. Does not wait."""
        self._watch.stop()
        self.closed.set()
        for engine in self._engines:
            engine.stop(Cancelled("the server is stopping", hint="try again in a moment"))

    @property
    def stopped(self) -> bool:
        """Whether every engine has ended what it did."""
        return all(engine.stopped for engine in self._engines)

    def close(self, timeout: float = 1.0) -> None:
        """Stop every engine; running requests end as cancelled, at the latest when `timeout` seconds are over."""
        self.stop()
        end = time.monotonic() + timeout
        for engine in self._engines:
            engine.close(max(0.0, end - time.monotonic()))


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
