"""A job in the engine's hands: its sequences, what has been reported of them, and how it ends."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from topkapi.engine.request import (
    Completed,
    Deliver,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateJob,
    Job,
    Starting,
    Timings,
    Token,
)
from topkapi.model.cache import NetworkOutput
from topkapi.model.errors import TopkapiError
from topkapi.model.scoring import Scores


@dataclass(eq=False)
class Submitted:
    """A job in the engine's hands, and the caller's handle to it. Events collect until the step is over."""

    job: Job
    deliver: Deliver
    deterministic: bool
    starting: Starting | None = None
    """Called when it leaves the queue."""
    cancelled: bool = False
    cached_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    prefilled_at: float | None = None
    over: bool = False
    patience: float | None = None
    """Seconds within which it must have begun, if it must."""
    foretold: float | None = None
    """Seconds after which it seemed that it would begin, if anybody asked."""
    told: bool = False
    """Whether its last event has been delivered."""

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def unwanted(self) -> bool:
        """Whether it will be ended before anything else is done for it."""
        return self.cancelled or self.late or self.impatient

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return self.job.deadline is not None and time.monotonic() >= self.job.deadline

    @property
    def impatient(self) -> bool:
        """Whether it has waited as long as it may without having begun."""
        if self.patience is None or self.started_at is not None or self.over:
            return False
        return time.monotonic() - self.queued_at >= self.patience

    def tell(self) -> None:
        """Deliver the events that have collected."""
        events, self.events = self.events, []
        if events:
            self.deliver(events)
            self.told = self.over

    def close(self, reason: FinishReason) -> None:
        """End every open sequence with `reason`."""
        for sequence in self.sequences:
            if not sequence.done:
                sequence.finish(reason)
        self.complete_if_done()

    def fail(self, error: TopkapiError) -> None:
        """End the job with an error. What it left in the cache is not trusted with another job."""
        for sequence in self.sequences:
            sequence.done, sequence.computed = True, 0
        self.events.append(Failed(error))
        self.over = True

    def complete_if_done(self) -> None:
        """Add the last event once every sequence is done."""
        if self.over or not all(sequence.done for sequence in self.sequences):
            return
        scores = next((sequence.scores for sequence in self.sequences if sequence.scores is not None), None)
        if isinstance(self.job, GenerateJob) and ranked(self.job):
            self.events += best(self.job, [sequence.held for sequence in self.sequences if sequence.held])
        self.events.append(
            Completed(
                self._timings(),
                scores,
                self.cached_tokens,
                self.deterministic,
                guessed_tokens=self.guessed_tokens,
                accepted_tokens=self.accepted_tokens,
            )
        )
        self.over = True

    def _timings(self) -> Timings:
        now = time.monotonic()
        started = self.started_at or now
        prefilled = self.prefilled_at or now
        return Timings(started - self.queued_at, prefilled - started, now - prefilled)


class Sequence(ABC):
    """A list of tokens of which the first `computed` are in cache slot `slot`; the engine's unit of work."""

    def __init__(self, owner: Submitted, index: int, tokens: list[int]) -> None:
        self.owner, self.index, self.tokens = owner, index, tokens
        self.computed = 0
        self.slot: int | None = None
        self.done = False
        self.scores: Scores | None = None
        # What the network said after the last token, kept until it can be gone on with; gone with the slot.
        self.output: NetworkOutput | None = None
        # Events that wait until it is known whether they are reported at all.
        self.held: list[Event] = []

    @property
    def weights(self) -> int:
        """Which weights its keys and values are computed with: the number of its adapter, 0 for the network's own."""
        adapter = self.owner.job.adapter
        return 0 if adapter is None else adapter.number

    @property
    def pending(self) -> int:
        """Tokens still to be read."""
        return len(self.tokens) - self.computed

    @property
    def over_at_once(self) -> FinishReason | None:
        """Why there is nothing to do, if there is not."""
        return None

    @property
    def group(self) -> Collection[Sequence]:
        """The sequences that can only go on together, this one among them: all of them have a slot, or none."""
        return (self,)

    @property
    def ready(self) -> bool:
        """Whether the sequence may be admitted."""
        return True

    @property
    def reusable(self) -> int:
        """How many of its first tokens may come from the cache without being read."""
        return len(self.tokens) - 1

    @property
    def layers(self) -> tuple[int, ...]:
        """The earlier layers whose logits are needed where logits are."""
        return ()

    @property
    def most(self) -> int:
        """The most tokens that it may generate."""
        return 0

    def work_left(self) -> tuple[int, int]:
        """Tokens of a prompt or a text that are still to be read, and the most that may still be generated."""
        return self.pending if self.pending > 1 else 0, 0

    def wanted(self, count: int) -> int:
        """Of how many of the next `count` tokens, counted from the last, logits are needed."""
        return 1 if count == self.pending else 0

    def states(self, count: int) -> int:
        """Of how many of the next `count` tokens, counted from the last, final states are needed."""
        return 0

    def guess(self, room: int) -> list[int]:
        """Up to `room` tokens that may come after the next one, to be read with it."""
        return []

    @abstractmethod
    def receive(self, output: NetworkOutput, guesses: list[int]) -> Sequence | Choosing | None:
        """Take in what the network said of the tokens it just read (`computed` counts them already, but no guesses).

        Returns what can now be gone on with, if something can.
        """

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End with `reason`."""
        self.done = True
        self.owner.events.append(Finished(self.index, reason, stop_reason))


class Choosing(ABC):
    """Sequences whose next tokens are chosen together once all of them have been read."""

    owner: Submitted

    @abstractmethod
    def advance(self, copy: Callable[[int, int, int, int], None]) -> None:
        """Choose; `copy(source slot, target slot, start, end)` moves what is in the cache."""


def ranked(job: GenerateJob) -> bool:
    """Whether the job answers with the best of more continuations."""
    return (job.parameters.best_of or 0) > job.parameters.n


def best(job: GenerateJob, continuations: list[list[Event]]) -> list[Event]:
    """The events of the `n` continuations that the network finds likeliest per token, the best as number 0."""
    events: list[Event] = []
    for index, held in enumerate(sorted(continuations, key=_mean_logprob, reverse=True)[: job.parameters.n]):
        for event in held:
            assert isinstance(event, Token | Finished)
            event = replace(event, index=index)
            if isinstance(event, Token) and job.parameters.logprobs is None:
                event = replace(event, logprob=None, raw_logprob=None, rank=None, top=())
            events.append(event)
    return events


def _mean_logprob(events: list[Event]) -> float:
    logprobs = [event.raw_logprob for event in events if isinstance(event, Token) and event.raw_logprob is not None]
    # A continuation that was cancelled before its first token comes after all that have one.
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf
