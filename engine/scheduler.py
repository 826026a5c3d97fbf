"""Who may wait, who reads how many tokens in the next step, and in which cache slot.

Once a job is let in there are no phases: each sequence's `computed` chases its length. One budget of tokens per step:
sequences that generate come first with one token each, prompts share what is left in order of priority and arrival, so
a long prompt delays the others by at most one budget.

Callers take turns: of those with the highest precedence, room goes to the one that has been given the fewest tokens
(Sheng et al. 2024, Fairness in Serving Large Language Models: the virtual token counter). Among the sequences of one
caller, and where all have the same, priority and then arrival decide.

Of what earlier sequences left in a slot (`SlotPool`), a new one may start from what is the same.

What can't begin in time is refused before it costs anything (`check_room`); how long it would wait is told by how fast
the engine has been of late (`Speed`). What one caller has waiting keeps others little. So that it does not fill the
queue either, a caller that has a name may hold as many places as are free, and as many again (the dynamic threshold of
Choudhury and Hahne, 1998, with a factor of two). Alone it has two thirds of the queue, and however many there are, each
has as much as any other and some is left for one that comes later.
"""

from __future__ import annotations

import bisect
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from topkapi.engine.request import Caller, GenerateJob, Job
from topkapi.engine.sequences import Sequence, Submitted
from topkapi.model.errors import Overloaded

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

    def wrote(self, shares: Iterable[Share], tokens: int) -> None:
        """Count so many more tokens for what was planned as one."""
        for share in shares:
            self._given[share.sequence.owner.job.caller.name] += WRITTEN * tokens

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
        victim = max(
            (each for each in self.running if _gives_way(each.owner.job, sequence.owner.job)),
            key=self._rank,
            default=None,
        )
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


FORGETTING = 0.99
"""What a step leaves of the weight of those before it, so that the last hundred or so count."""

WORTH_LEARNING = 0.5
"""Seconds from which on a wait that was foretold tells how right such foretelling is."""

MOST_WRONG = 4.0
"""How far off foretelling is taken to be at most."""


class Speed:
    """Seconds per token of a prompt and per step that only generates, as measured; None where nothing was yet."""

    def __init__(self) -> None:
        self._reading = [0.0, 0.0]
        self._generating = [0.0, 0.0]
        self._used = [0.0, 0.0]
        self._waited = [0.0, 0.0]

    def step(self, seconds: float, prompt_tokens: int, *, generated: bool = False) -> None:
        """Take in a step that read so many tokens of prompts or texts, and generated beside that if it says so.

        A step that does both takes as long as one that generates, and what is left is for the tokens that are read:
        with many short requests nearly every step does, and counted twice they would seem to take twice as long.
        """
        if prompt_tokens and generated:
            seconds = max(0.0, seconds - (_rate(self._generating) or 0.0))
        kind, amount = (self._reading, prompt_tokens) if prompt_tokens else (self._generating, 1)
        kind[:] = [kind[0] * FORGETTING + seconds, kind[1] * FORGETTING + amount]

    def began(self, foretold: float | None, waited: float) -> None:
        """Take in how long a job has waited that was foretold (by `start`) to wait so long."""
        if foretold is not None and foretold >= WORTH_LEARNING:
            self._waited[:] = [
                self._waited[0] * FORGETTING + waited,
                self._waited[1] * FORGETTING + foretold,
            ]

    def ended(self, job: Submitted) -> None:
        """Take in how much of what a job might have generated it has."""
        for sequence in job.sequences:
            if sequence.most:
                left = sequence.work_left()[1]
                used = self._used[0] * FORGETTING + sequence.most - left, self._used[1] * FORGETTING + sequence.most
                self._used[:] = used

    def wait(self, jobs: Iterable[Submitted], together: int) -> float | None:
        """Seconds until all of `jobs` are done, `together` sequences at a time; None before anything was measured.

        Of the tokens that they may generate, the share counts that jobs before them have used of theirs.
        """
        reading, generating, used = self._rates()
        if reading is None and generating is None:
            return None
        left = [sequence.work_left() for job in jobs for sequence in job.sequences if not sequence.done]
        prompts = sum(tokens for tokens, _ in left)
        answers = sum(tokens for _, tokens in left) * (1.0 if used is None else used)
        # What was not measured yet is taken to cost as little as it may.
        return self.corrected(prompts * (reading or 0.0) + answers / together * (generating or reading or 0.0))

    def start(self, running: Iterable[Submitted], before: Iterable[Submitted], together: int) -> float | None:
        """Seconds until a job would begin that comes after all of `before`; None before anything was measured.

        Of what is measured alone, so that it can be compared with how long it took: `corrected` makes of it what is
        to be expected. Each of the `together` places goes to the next sequence when what it holds is written. Until a
        job has ended nobody knows what part of what they may write jobs do write, and it is taken to be none.
        """
        reading, generating, used = self._rates()
        if reading is None and generating is None:
            return None
        prompts, steps = 0, [0.0] * together
        for job in (*running, *before):
            for sequence in job.sequences:
                if not sequence.done:
                    tokens, answer = sequence.work_left()
                    prompts += tokens
                    heapq.heapreplace(steps, steps[0] + answer * (used or 0.0))
        if steps[0] == 0.0 and not prompts:
            return 0.0
        return prompts * (reading or 0.0) + steps[0] * (generating or reading or 0.0)

    def corrected(self, seconds: float) -> float:
        """Of what was foretold, what is to be expected: by what jobs have waited of late beside what was foretold of
        them. Some of what is before a job goes away, begins elsewhere or is in the cache; other programs take turns."""
        waited, foretold = self._waited
        return seconds * min(MOST_WRONG, max(1 / MOST_WRONG, waited / foretold)) if foretold else seconds

    def _rates(self) -> tuple[float | None, float | None, float | None]:
        return _rate(self._reading), _rate(self._generating), _rate(self._used)


def _rate(sums: list[float]) -> float | None:
    return sums[0] / sums[1] if sums[1] else None


LONGEST_WAIT = 3600
"""Seconds that a client is told to wait at most."""

CERTAIN = 0.8
"""The part of the time it may wait by which a job must seem to begin: what is foretold is not exact, and what was let
in and then waits too long has waited in vain."""

SHARE = 2.0
"""How many places a caller may hold for each that is free."""


@dataclass(frozen=True)
class Room:
    """What may wait: so many jobs, so many tokens of prompts, and so many seconds (None: as long as it takes)."""

    jobs: int
    tokens: int
    seconds: float | None = None


def check_room(
    job: Job, jobs: Iterable[Submitted], room: Room, speed: Speed, slots: int, *, begun: bool
) -> float | None:
    """The seconds that `job` would wait after those of `jobs` that are waiting, by `Speed.start`, if that is asked.

    Raises `Overloaded` unless it may. Of what has `begun` with an earlier job, none is refused for what it may take.
    What is going to be ended takes up no room.
    """
    wanted = [other for other in jobs if not other.unwanted]
    waiting = [other for other in wanted if other.started_at is None]
    queued = sum(length(other.job) for other in waiting)
    full = len(waiting) >= room.jobs or bool(waiting and queued + length(job) > room.tokens)
    if full:
        raise _overloaded(f"{len(waiting)} requests are waiting, the queue is full", speed.wait(wanted, slots))
    if job.caller.name:
        own = sum(other.job.caller.name == job.caller.name for other in waiting)
        if own and own >= SHARE * (room.jobs - len(waiting)):
            own_jobs = [other for other in wanted if other.job.caller.name == job.caller.name]
            message = f"{own} requests of {job.caller.name} are waiting, and the rest of the queue is for others"
            raise _overloaded(message, speed.wait(own_jobs, slots))
    if begun:
        return None
    allowed, than = room.seconds, "--max-queue-seconds"
    if job.deadline is not None:
        left = job.deadline - time.monotonic()
        if left <= 0:
            # It ends as late, which is no fault of the load.
            return None
        if allowed is None or left < allowed:
            allowed, than = left, "it was given"
    if allowed is None:
        return None
    foretold = _foretold(job, wanted, speed, slots)
    if foretold is not None and (wait := speed.corrected(foretold)) > CERTAIN * allowed:
        which = f"which {'is' if wait > allowed else 'may turn out to be'} more than {than} ({allowed:.3g} s)"
        raise _overloaded(f"the request would begin in about {math.ceil(wait)} s, {which}", wait)
    return foretold


def too_late(job: Job, waited: float, others: Iterable[Submitted], speed: Speed, slots: int) -> Overloaded:
    """What a job is told that did not begin within the seconds it may wait, though it seemed that it would: when it
    would begin after those of `others` that are before it, if it came anew."""
    message = f"the request waited {waited:.3g} s for room, and longer than --max-queue-seconds it need not"
    wanted = [other for other in others if not (other.over or other.unwanted)]
    foretold = _foretold(job, wanted, speed, slots)
    return _overloaded(message, waited if foretold is None else speed.corrected(foretold))


def length(job: Job) -> int:
    """The tokens that a job reads."""
    return len(job.prompt) + len(job.negative) if isinstance(job, GenerateJob) else len(job.token_ids)


def _foretold(job: Job, wanted: list[Submitted], speed: Speed, slots: int) -> float | None:
    """The seconds after which a job that comes now seems to begin, by `Speed.start`."""
    waiting = [other for other in wanted if other.started_at is None]
    running = [other for other in wanted if other.started_at is not None and not _gives_way(other.job, job)]
    return speed.start(running, _before(job, waiting), slots)


def _before(job: Job, waiting: list[Submitted]) -> list[Submitted]:
    """What of `waiting` begins before `job` would: of its own caller what has its priority, of every other one as many
    as its own would then be, for they take turns."""
    name, precedence = job.caller.name, job.caller.precedence
    own = sum(other.job.caller.name == name and other.job.priority >= job.priority for other in waiting)
    taken: dict[str, int] = {}
    before = []
    for other in waiting:
        caller = other.job.caller
        if caller.precedence != precedence:
            ahead = caller.precedence > precedence
        elif caller.name == name:
            ahead = other.job.priority >= job.priority
        else:
            taken[caller.name] = taken.get(caller.name, 0) + 1
            ahead = taken[caller.name] <= own + 1
        if ahead:
            before.append(other)
    return before


def _gives_way(running: Job, job: Job) -> bool:
    """Whether a running job is pushed aside for another one: priorities are among those of one caller."""
    if running.caller.precedence != job.caller.precedence:
        return running.caller.precedence < job.caller.precedence
    return running.caller.name == job.caller.name and running.priority < job.priority


def _overloaded(message: str, wait: float | None) -> Overloaded:
    retry_after = max(1, min(LONGEST_WAIT, math.ceil(wait or 0)))
    hint = "try again in a moment" if wait is None else f"what is waiting takes about {retry_after} s"
    return Overloaded(message, retry_after=retry_after, hint=hint)
