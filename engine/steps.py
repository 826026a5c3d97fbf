"""What a step computes: the shares of a plan read in one pass of the network, then the next tokens chosen.

The engine sees of a network that tokens go into slots and logits come out (`Network`). Tests put a fake in its place.
"""

from __future__ import annotations

import logging
import os
import time
from collections import abc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from topkapi.engine.scheduler import Allocation, Scheduler, Share, Speed
from topkapi.engine.sequences import Choosing, Continuation, Sequence, Submitted
from topkapi.model.cache import NetworkOutput, SlotCache, Work, outputs
from topkapi.model.decoding.choosing import Choice, choose, drawing
from topkapi.model.decoding.scan import Ahead, Scanner
from topkapi.model.decoding.speculation import Drafter
from topkapi.model.decoding.stage import Row
from topkapi.model.errors import EngineError, TopkapiError
from topkapi.model.invariance import calibrate
from topkapi.model.transformer import Decoder


class Network(Protocol):
    """What the engine needs of a network with `slots` cache slots of `capacity` tokens."""

    slots: int
    capacity: int
    deterministic: bool
    scanner: Scanner | None
    """What looks through its logits faster than numpy does, if something can."""

    def run(self, works: abc.Sequence[Work]) -> list[NetworkOutput]:
        """Read every work's tokens; what each asked for."""
        ...

    def steps(self, works: abc.Sequence[Work], rows: abc.Sequence[Row], ahead: Ahead) -> list[tuple[float, list[int]]]:
        """Read a token of every work, then what is chosen for its row, and so on: after how many seconds each step was
        done, and a token of each row. Nothing where some row, or the network, has to be asked one step at a time."""
        ...

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Give slot `target` the tokens from `start` to before `end` of slot `source`."""
        ...

    def reset(self) -> None:
        """Forget what is in every slot, whatever state it was left in."""
        ...


class DecoderNetwork:
    """A `Decoder` over a `SlotCache`. `deterministic` is whether rows were found independent of their neighbours.

    A slot has `capacity` tokens (None: a context). There are fewer than `slots` slots, and at worst one that holds
    less, where all of them full would take more than half of the memory.
    """

    def __init__(self, model: Decoder, slots: int, capacity: int | None = None) -> None:
        self.model = model
        token_bytes = SlotCache.token_bytes(model)
        affordable = max(1, memory_bytes(model.device) // 2 // token_bytes)
        self.capacity = min(capacity or model.config.context_length, affordable)
        self.slots = min(slots, affordable // self.capacity)
        self.deterministic = calibrate(model)
        self.scanner: Scanner | None = None if model.core is None else model.core.scanner
        self._cache = SlotCache(model, self.slots, self.capacity)

    def run(self, works: abc.Sequence[Work]) -> list[NetworkOutput]:
        return outputs(self.model, self._cache, works)

    @torch.inference_mode()
    def steps(self, works: abc.Sequence[Work], rows: abc.Sequence[Row], ahead: Ahead) -> list[tuple[float, list[int]]]:
        core, slots = self.model.core, self._cache.native
        how = None if core is None else drawing(rows)
        if core is None or slots is None or how is None:
            return []
        spans = [(work.slot, work.start, work.token_ids) for work in works]
        adapters = [None if work.adapter is None else work.adapter.core for work in works]
        return core.steps(slots, spans, how, ahead, adapters if any(adapters) else ())

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        self._cache.copy(source, target, start, end)

    def reset(self) -> None:
        # The old one goes first: there may be no room for two.
        del self._cache
        self._cache = SlotCache(self.model, self.slots, self.capacity)


CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much a container may take, by version 2 and 1 of its control groups."""


def memory_bytes(device: torch.device) -> int:
    """Memory of the machine, or what of it this container may take, or of the accelerator, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in CGROUP_LIMITS:
        try:
            found.append(int(Path(place).read_text()))
        except (OSError, ValueError):
            # There is none, or it is "max".
            continue
    return min(found)


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

BEYOND_A_JOB = (KeyboardInterrupt, torch.AcceleratorError)
"""What no single job can be blamed for: after an accelerator's error, everything that is asked of it fails."""


AHEAD_SECONDS, MOST_AHEAD = 0.016, 32
"""How long steps go on without anybody being told of their tokens, and how many at most."""


class Heartbeat:
    """A thread's signs of life: `count` grows with each; `busy` between a sign and the rest after it."""

    def __init__(self) -> None:
        self.count = 0
        self.busy = False

    def beat(self) -> None:
        """Something begins that should not take long."""
        self.count += 1
        self.busy = True

    def rest(self) -> None:
        """There is nothing to do."""
        self.busy = False


@dataclass
class Counters:
    """What an engine has done since it started."""

    steps: int = 0
    read_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    failed_steps: int = 0
    restarts: int = 0
    network_seconds: float = 0.0
    step_seconds: float = 0.0


class Steps:
    """Computes for the sequences of a scheduler. What a job's own step throws ends that job alone.

    Jobs that leave the queue are told so within `handing_out()`.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        drafter: Drafter | None,
        step_tokens: int,
        handing_out: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.name, self.network, self.drafter = name, network, drafter
        self.counters = Counters()
        self.speed = Speed()
        self.heartbeat = Heartbeat()
        self._step_tokens, self._handing_out = step_tokens, handing_out
        self._starting: list[Submitted] = []
        self.scheduler = self._fresh_scheduler()
        # Set by whoever has something for the next step to take in.
        self.interrupted = np.zeros(1, dtype=np.int32)

    def step(self, began: float) -> None:
        """Plan a step and compute it. `began` is when it did, in `time.perf_counter()` seconds."""
        shares = self.scheduler.plan()
        if self._starting:
            self._tell_who_starts()
        if not shares:
            return
        if self.drafter is not None:
            self._draft(self.drafter, shares)
        steps = self._go_ahead(shares)
        if not steps:
            self._run(shares)
            steps = 1
        seconds = time.perf_counter() - began
        self.counters.steps += steps
        self.counters.step_seconds += seconds
        read = sum(share.count for share in shares if share.count > 1)
        generated = any(share.count == 1 for share in shares)
        for _ in range(steps):
            self.speed.step(seconds / steps, read, generated=generated)

    def begin_anew(self) -> None:
        """Let go of every sequence, and of everything in the caches."""
        self.scheduler, self._starting = self._fresh_scheduler(), []
        self.network.reset()
        if self.drafter is not None:
            self.drafter = Drafter(self.drafter.network, self.drafter.budget)

    def check_idle(self) -> None:
        """See that nothing is held where no job is left."""
        scheduler = self.scheduler
        if scheduler.running or scheduler.waiting or scheduler.pool.free != self.network.slots:
            logger.error("%s is idle but holds slots or sequences; starting afresh", self.name)
            self.scheduler = self._fresh_scheduler()

    def _fresh_scheduler(self) -> Scheduler:
        return Scheduler(self.network.slots, self._step_tokens, self._admitted)

    def _admitted(self, sequence: Sequence, allocation: Allocation) -> None:
        if sequence.owner.started_at is None:
            owner = sequence.owner
            owner.started_at = time.monotonic()
            self.speed.began(owner.foretold, owner.started_at - owner.queued_at)
            if owner.starting is not None:
                self._starting.append(owner)
        if allocation.copy_from is not None:
            self.network.copy(allocation.copy_from, allocation.slot, 0, allocation.cached)
        if sequence is sequence.owner.sequences[0]:
            sequence.owner.cached_tokens = allocation.cached
        self.counters.cached_tokens += allocation.cached

    def _tell_who_starts(self) -> None:
        starting, self._starting = self._starting, []
        with self._handing_out():
            for owner in starting:
                assert owner.starting is not None, "it asked to be told"
                try:
                    owner.starting()
                except BaseException:
                    logger.exception("a receiver of %s failed; its job is cancelled", self.name)
                    owner.cancelled = True

    def _draft(self, drafter: Drafter, shares: list[Share]) -> None:
        """Let the draft network guess for sequences that have found nothing to guess themselves."""
        began = time.perf_counter()
        left = self.scheduler.budget - sum(share.count + len(share.guesses) for share in shares)
        drafts = []
        for share in shares:
            if isinstance(share.sequence, Continuation) and not share.guesses:
                draft = share.sequence.drafted(left)
                if draft is not None:
                    left -= draft.length
                    drafts.append((share, draft))
        self.heartbeat.beat()
        try:
            drafter.guess(draft for _, draft in drafts)
        except BEYOND_A_JOB:
            raise
        except BaseException:
            logger.exception("the draft network of %s failed; it begins anew", self.name)
            self.drafter = Drafter(drafter.network, drafter.budget)
            drafts = []
        for share, draft in drafts:
            share.guesses.extend(draft.guesses)
        self.counters.network_seconds += time.perf_counter() - began

    def _go_ahead(self, shares: list[Share]) -> int:
        """Several steps in one call of the network, where every sequence needs no more than tokens; how many."""
        alone = [
            share.sequence for share in shares if isinstance(share.sequence, Continuation) and share.sequence.alone
        ]
        if len(alone) < len(shares):
            return 0
        began, at = time.perf_counter(), time.monotonic()
        ends = [(row, token_id) for row, sequence in enumerate(alone) for token_id in sequence.ends]
        most = min(MOST_AHEAD, *(sequence.work_left()[1] for sequence in alone))
        ahead = Ahead(most, AHEAD_SECONDS, self.interrupted, ends)
        self.heartbeat.beat()
        try:
            found = self.network.steps([_work(share) for share in shares], [sequence.row for sequence in alone], ahead)
        except BEYOND_A_JOB:
            raise
        except BaseException:
            # One step at a time it shows whose fault it is.
            logger.exception("several steps of %s at once failed; they are taken one at a time", self.name)
            self.counters.failed_steps += 1
            self.scheduler.pool.forget()
            return 0
        self.counters.network_seconds += time.perf_counter() - began
        for seconds, token_ids in found:
            for sequence, token_id in zip(alone, token_ids, strict=True):
                if not sequence.done and not sequence.owner.over:
                    sequence.computed += 1
                    self.counters.read_tokens += 1
                    self.counters.generated_tokens += 1
                    self._attempt(sequence.owner, partial(sequence.take, Choice(token_id), at=at + seconds))
        # The plan has counted one.
        self.scheduler.wrote(shares, max(0, len(found) - 1))
        return len(found)

    def _run(self, shares: list[Share]) -> None:
        """Read every share, then choose; a failure is traced to the jobs that cause it by running them alone."""
        began = time.perf_counter()
        works = [_work(share) for share in shares]
        self.heartbeat.beat()
        try:
            outputs = self.network.run(works)
        except BEYOND_A_JOB:
            raise
        except BaseException as error:
            self.counters.failed_steps += 1
            self.scheduler.pool.forget()
            if len(shares) == 1:
                self._fail(shares[0].sequence.owner, error)
                return
            for share in shares:
                if not share.sequence.done:
                    self._run([share])
            return
        self.counters.network_seconds += time.perf_counter() - began
        choosing: list[Continuation] = []
        for share, output in zip(shares, outputs, strict=True):
            sequence = share.sequence
            sequence.computed += share.count
            self.counters.read_tokens += share.count
            ready = self._attempt(sequence.owner, partial(sequence.receive, output, share.guesses))
            if isinstance(ready, Continuation):
                choosing.append(ready)
            elif isinstance(ready, Choosing):
                self._attempt(ready.owner, partial(ready.advance, self.network.copy))
                self.counters.generated_tokens += 1
        self._choose_in_turn(choosing)

    def _choose_in_turn(self, choosing: list[Continuation]) -> None:
        """Choose from each sequence's logits for as long as its guesses are what is chosen."""
        depth = 0
        while choosing:
            self._choose(choosing, [sequence.logits(depth) for sequence in choosing], guessed=depth > 0)
            going_on = []
            for sequence in choosing:
                guesses = sequence.guesses
                right = not sequence.owner.over and depth < len(guesses) and sequence.tokens[-1] == guesses[depth]
                if right:
                    # The guess was read in this step already.
                    sequence.computed += 1
                if right and not sequence.done:
                    going_on.append(sequence)
                else:
                    self.counters.guessed_tokens += len(guesses)
                    self.counters.accepted_tokens += depth + right
                    sequence.learn(depth + right)
            choosing, depth = going_on, depth + 1

    def _choose(self, sequences: list[Continuation], logits: list[Tensor], guessed: bool) -> None:
        try:
            rows = [sequence.row for sequence in sequences]
            choices = choose(logits, rows, scanner=self.network.scanner)
        except BEYOND_A_JOB:
            raise
        except BaseException as error:
            if len(sequences) == 1:
                self._fail(sequences[0].owner, error)
                return
            for index, sequence in enumerate(sequences):
                self._choose([sequence], [logits[index]], guessed)
            return
        self.counters.generated_tokens += len(choices)
        for sequence, choice in zip(sequences, choices, strict=True):
            self._attempt(sequence.owner, partial(sequence.take, choice, guessed))

    def _attempt(self, owner: Submitted, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except BEYOND_A_JOB:
            raise
        except BaseException as error:
            self._fail(owner, error)
            return None

    def _fail(self, owner: Submitted, error: BaseException) -> None:
        if owner.over:
            return
        if not isinstance(error, TopkapiError):
            logger.error("a step of %s failed", self.name, exc_info=error)
            message = f"the step failed: {type(error).__name__}: {error}"
            error = EngineError(message, hint="the server's log has more")
        owner.fail(error)


def _work(share: Share) -> Work:
    sequence = share.sequence
    assert sequence.slot is not None, "a running sequence has a slot"
    end = sequence.computed + share.count
    tokens = [*sequence.tokens[sequence.computed : end], *share.guesses]
    wanted = sequence.wanted(share.count) + len(share.guesses)
    layers = sequence.layers if wanted else ()
    states, adapter = sequence.states(share.count), sequence.owner.job.adapter
    return Work(sequence.slot, sequence.computed, tokens, wanted, states, layers, adapter)
