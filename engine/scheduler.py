"""Who reads how many tokens in the next step, and in which cache slot. No phases: each sequence's `computed` chases its
length.

One budget of tokens per step: sequences that generate come first with one token each, prompts share what is left in
order of priority and arrival, so a long prompt delays the others by at most one budget.

Callers take turns: of those with the highest precedence, room goes to the one that has been given the fewest tokens
(Sheng et al. 2024, Fairness in Serving Large Language Models: the virtual token counter). Among the sequences of one
caller, and where all have the same, priority and then arrival decide.

Of what earlier sequences left in a slot (`SlotPool`), a new one may start from what is the same.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from topkapi.engine.request import Caller
from topkapi.engine.submitted import Sequence

WRITTEN = 2.0
"""What a written token counts for beside one that is read: it takes a pass of the network, with others."""


@dataclass(frozen=True)
class Share:
    """`sequence` reads its next `count` tokens in this step, and `guesses` after them."""

    sequence: Sequence
    count: int
    guesses: list[int] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences over `slots` cache slots; `admitted(sequence, allocation)` is told of each one that
    gets its own."""

    def __init__(self, slots: int, budget: int, admitted: Callable[[Sequence, Allocation], None]) -> None:
        self.pool = SlotPool(slots)
        self.budget = max(budget, slots)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._admitted = admitted
        self._arrivals: dict[Sequence, int] = {}
        self._next_arrival = 0
        self._given: dict[str, float] = {}

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences behind those of equal priority."""
        for sequence in sequences:
            self._welcome(sequence.owner.job.caller.name)
            self._arrivals[sequence] = self._next_arrival
            self._next_arrival += 1
            self._queue(sequence)

    def drop_done(self) -> None:
        """Forget the sequences that are done and give their slots back."""
        for sequence in self.running:
            if sequence.done:
                self._release(sequence)
        for sequence in [*self.running, *self.waiting]:
            if sequence.done:
                del self._arrivals[sequence]
        self.running = [sequence for sequence in self.running if not sequence.done]
        self.waiting = [sequence for sequence in self.waiting if not sequence.done]

    def plan(self) -> list[Share]:
        """Admit what fits and share the step's budget; empty only when nothing is left to do."""
        self._admit()
        left = self.budget
        shares = []
        for sequence in sorted(self.running, key=lambda sequence: (sequence.pending > 1, self._rank(sequence))):
            count = min(sequence.pending, left)
            if count:
                if sequence.pending == 1:
                    self._given[sequence.owner.job.caller.name] += WRITTEN
                shares.append(Share(sequence, count))
                left -= count
        # Guesses take only what nobody else wants.
        for share in shares:
            share.guesses.extend(share.sequence.guess(left))
            left -= len(share.guesses)
        return shares

    def _admit(self) -> None:
        for first in self._in_turn():
            group = first.group
            if first is not next(iter(group)) or not first.ready:
                continue
            while self.pool.free < len(group):
                if not self._preempt_for(first):
                    return
            for sequence in group:
                allocation = self.pool.acquire(sequence, sequence.reusable)
                assert allocation is not None, "a slot is free"
                sequence.slot, sequence.computed = allocation.slot, allocation.cached
                self.waiting.remove(sequence)
                self.running.append(sequence)
                self._given[sequence.owner.job.caller.name] += sequence.pending
                self._admitted(sequence, allocation)

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Take the slots of a running group of lower priority; it waits again and loses nothing but time."""
        victim = max((each for each in self.running if _gives_way(each, sequence)), key=self._rank, default=None)
        if victim is None:
            return False
        for member in victim.group:
            self.running.remove(member)
            self._release(member)
            self._queue(member)
        return True

    def _in_turn(self) -> Iterator[Sequence]:
        """The waiting sequences in the order in which they get room; each is looked for once the one before has its."""
        waiting = list(self.waiting)
        if all(sequence.owner.job.caller is waiting[0].owner.job.caller for sequence in waiting):
            # They lie in their order already. Looked for in every step, so that the rest would take a while.
            yield from waiting
            return
        queues: dict[Caller, deque[Sequence]] = {}
        for sequence in waiting:
            queues.setdefault(sequence.owner.job.caller, deque()).append(sequence)
        # Of callers that have been given as much, the one that has waited longest.
        oldest = {caller: min(map(self._arrivals.__getitem__, queue)) for caller, queue in queues.items()}
        while queues:
            turn = min(queues, key=lambda caller: (-caller.precedence, self._given[caller.name], oldest[caller]))
            yield queues[turn].popleft()
            if not queues[turn]:
                del queues[turn]

    def _welcome(self, name: str) -> None:
        """Count for a caller that has nothing here: from what the others have, not from when it was here last."""
        here = {sequence.owner.job.caller.name for sequence in (*self.running, *self.waiting)}
        if name not in here:
            least = min((self._given[other] for other in here), default=0.0)
            before = self._given.get(name, 0.0) if here else 0.0
            self._given = {other: self._given[other] for other in here} | {name: max(least, before)}

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "a running sequence has a slot"
        self.pool.release(sequence.slot)
        sequence.slot, sequence.computed, sequence.output = None, 0, None

    def _queue(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=self._rank)

    def _rank(self, sequence: Sequence) -> tuple[int, int, int]:
        job = sequence.owner.job
        return -job.caller.precedence, -job.priority, self._arrivals[sequence]


def _gives_way(running: Sequence, sequence: Sequence) -> bool:
    """Whether a running sequence may be pushed aside for another one: priorities are among those of one caller."""
    own, other = running.owner.job, sequence.owner.job
    if own.caller.precedence != other.caller.precedence:
        return own.caller.precedence < other.caller.precedence
    return own.caller.name == other.caller.name and own.priority < other.priority


# Copying a shorter prefix from another slot saves less than the copy costs.
LEAST_COPIED = 16


class Holder(Protocol):
    """A sequence in a slot: the first `computed` of its `tokens` are in the cache, as its `weights` made them."""

    tokens: list[int]
    computed: int

    @property
    def weights(self) -> int:
        """The same for sequences that may start from one another's cache, and for no others."""
        ...


Content = tuple[int, list[int]]
"""The tokens in a slot, and which weights their keys and values were computed with."""


@dataclass(frozen=True)
class Allocation:
    """A slot, the tokens already in it, and the slot they must first be copied from, if any."""

    slot: int
    cached: int
    copy_from: int | None = None


class SlotPool:
    """Allocates slots. A released one keeps its content until another sequence needs it, the least recent one first."""

    def __init__(self, slots: int) -> None:
        self._holders: list[Holder | None] = [None] * slots
        self._left: list[Content] = [(0, [])] * slots
        self._released_at = [0] * slots
        self._clock = 0

    @property
    def free(self) -> int:
        """Slots nobody holds."""
        return sum(holder is None for holder in self._holders)

    def acquire(self, holder: Holder, reusable: int) -> Allocation | None:
        """A slot for `holder`, with at most `reusable` of its tokens taken from the cache; None when all are held."""
        candidates = [slot for slot, other in enumerate(self._holders) if other is None]
        if not candidates:
            return None
        wanted = holder.tokens[:reusable]
        contents = [self._content(slot) for slot in range(len(self._holders))]
        shared = [common_prefix(held, wanted) if weights == holder.weights else 0 for weights, held in contents]
        best = max(range(len(shared)), key=lambda slot: (shared[slot], self._holders[slot] is None))
        if self._holders[best] is None and shared[best]:
            allocation = Allocation(best, shared[best])
        else:
            slot = min(candidates, key=lambda candidate: self._released_at[candidate])
            allocation = Allocation(slot, shared[best], best) if shared[best] >= LEAST_COPIED else Allocation(slot, 0)
        self._holders[allocation.slot] = holder
        return allocation

    def release(self, slot: int) -> None:
        """Give a slot back; what is in it may serve others."""
        self._left[slot] = self._content(slot)
        self._holders[slot] = None
        self._clock += 1
        self._released_at[slot] = self._clock

    def forget(self) -> None:
        """Trust nothing that was left in free slots (after a failed step)."""
        self._left = [(0, [])] * len(self._left)

    def _content(self, slot: int) -> Content:
        holder = self._holders[slot]
        return self._left[slot] if holder is None else (holder.weights, holder.tokens[: holder.computed])


def common_prefix(first: list[int], second: list[int]) -> int:
    """Number of tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])
