"""A job in the engine's hands, what has been reported of it and how it ends, and the sequences that are run for it: one
continuation of a prompt each, or one text to score."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from topkapi.engine.request import (
    Candidate,
    Completed,
    Deliver,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateJob,
    Job,
    PromptProgress,
    ScoreJob,
    ScoreProgress,
    Starting,
    StopCheck,
    Timings,
    Token,
)
from topkapi.model.cache import NetworkOutput
from topkapi.model.config import ModelConfig
from topkapi.model.decoding.choosing import Choice
from topkapi.model.decoding.contrast import exit_layers
from topkapi.model.decoding.grammar import Constraint
from topkapi.model.decoding.speculation import Draft, DraftLength, looked_up
from topkapi.model.decoding.stage import Row
from topkapi.model.decoding.stopping import ending_tokens, ends_sequence, token_limit
from topkapi.model.errors import TopkapiError
from topkapi.model.scoring import Scores, add_scores, windows


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


class Continuation(Sequence):
    """Sequence `index` of a generating job. With greedy decoding one stands for all `n` (`copies`)."""

    def __init__(self, owner: Submitted, job: GenerateJob, index: int, config: ModelConfig, copies: int = 1) -> None:
        super().__init__(owner, index, list(job.prompt))
        self.job, self.config, self.copies = job, config, copies
        self.limit = limit_of(job, config)
        parameters = job.parameters
        if ranked(job) and parameters.logprobs is None:
            parameters = replace(parameters, logprobs=0)
        asked = len(job.prompt) - job.answered
        self.row = Row(parameters, self.tokens, asked, index, config.end_token_ids)
        self.row.constraint = job.constraint(index) if job.constraint else None
        self.stop_check = job.stop_check(index) if job.stop_check else None
        lookup, draft = job.parameters.prompt_lookup, job.parameters.draft_tokens
        self.lookup = DraftLength(lookup) if lookup else None
        self.draft = DraftLength(draft) if draft else None
        self.guessed_by: DraftLength | None = None
        negative = job.negative or job.prompt[asked - 1 : asked]
        self.guide = Guide(self, [*negative, *job.prompt[asked:]]) if guided(job) else None
        # Events of a job that answers with its best continuations wait until these are known.
        self.guesses: list[int] = []

    @property
    def events(self) -> list[Event]:
        """Where the events of this sequence go."""
        return self.held if ranked(self.job) else self.owner.events

    @property
    def over_at_once(self) -> FinishReason | None:
        return "length" if self.limit == 0 else None

    @property
    def group(self) -> Collection[Sequence]:
        return (self,) if self.guide is None else (self, self.guide)

    @property
    def most(self) -> int:
        return self.limit

    def work_left(self) -> tuple[int, int]:
        # The others of a job start from the cache of its first.
        reading = super().work_left()[0] if self is self.owner.sequences[0] or self.computed else 0
        return reading, self.limit - (len(self.tokens) - len(self.job.prompt))

    def guess(self, room: int) -> list[int]:
        room = self._guessable(room)
        if self.lookup is None or not room:
            return []
        guesses = looked_up(self.row.history(), self.lookup.length(room))
        self.guessed_by = self.lookup if guesses else None
        return guesses

    def drafted(self, room: int) -> Draft | None:
        """What a draft network should guess, up to `room` tokens."""
        length = self.draft.length(self._guessable(room)) if self.draft is not None else 0
        if not length or self.slot is None or self.layers or self.guide is not None:
            return None
        self.guessed_by = self.draft
        return Draft(self.slot, self.row, length)

    @property
    def alone(self) -> bool:
        """Whether its next tokens follow from those it has, one after another, without anything else being asked."""
        guessing = self.lookup is not None or self.draft is not None
        plain = self.guide is None and self.row.constraint is None and not self.layers
        return self.pending == 1 and plain and not guessing

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end it."""
        return ending_tokens(self.job.parameters, self.config)

    def _guessable(self, room: int) -> int:
        """How many tokens may be guessed: some only where the next one is all that is pending."""
        generated = len(self.tokens) - len(self.job.prompt)
        return 0 if self.pending != 1 or not generated else min(room, self.limit - generated - 1)

    def learn(self, accepted: int) -> None:
        """Take in how many of the last guesses were right."""
        if self.guessed_by is not None:
            self.guessed_by.learn(len(self.guesses), accepted)
        self.owner.guessed_tokens += len(self.guesses)
        self.owner.accepted_tokens += accepted
        self.output = None

    @property
    def ready(self) -> bool:
        # The others of a job wait until the first has read the prompt, and then start from its cache.
        first = self.owner.sequences[0]
        return self is first or first.done or first.computed >= len(self.job.prompt)

    @property
    def layers(self) -> tuple[int, ...]:
        return layers_of(self.job, self.config)

    def receive(self, output: NetworkOutput, guesses: list[int]) -> Continuation | None:
        if not len(output.logits):
            if self.job.progress and self is self.owner.sequences[0]:
                self.owner.events.append(PromptProgress(self.computed, len(self.job.prompt)))
            return None
        self.output, self.guesses = output, guesses
        return self if self.guide is None or self.guide.output is not None else None

    def logits(self, depth: int) -> Tensor:
        """The logits `[V]` to choose from after `depth` right guesses; the row is told what else its stages need."""
        assert self.output is not None
        if self.guide is not None:
            assert self.guide.output is not None
            self.row.guide, self.guide.output = self.guide.output.logits[-1], None
        if len(self.output.early):
            self.row.early = self.output.early[:, depth]
        return self.output.logits[depth]

    def take(self, choice: Choice, guessed: bool = False, at: float | None = None) -> None:
        """Append the token that was chosen, `at` that time unless it is now, and see whether it ends the sequence."""
        token_id = choice.token_id
        if self.owner.prefilled_at is None:
            self.owner.prefilled_at = time.monotonic() if at is None else at
        self.tokens.append(token_id)
        if self.guide is not None:
            self.guide.tokens.append(token_id)
        event = token_event(self.index, choice, guessed, at)
        self.events.append(event)
        if self.copies > 1:
            self.events.extend(replace(event, index=self.index + copy) for copy in range(1, self.copies))
        generated = len(self.tokens) - len(self.job.prompt)
        end = end_of(token_id, generated == self.limit, self.job, self.config, self.row.constraint, self.stop_check)
        if end is not None:
            self.finish(*end)

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.done = True
        if self.guide is not None:
            self.guide.done = True
        self.events.extend(Finished(self.index + copy, reason, stop_reason) for copy in range(self.copies))


class Guide(Sequence):
    """The negative prompt of a continuation, followed by the same tokens as the prompt."""

    def __init__(self, main: Continuation, tokens: list[int]) -> None:
        super().__init__(main.owner, main.index, tokens)
        self.main = main

    @property
    def group(self) -> Collection[Sequence]:
        return self.main.group

    def receive(self, output: NetworkOutput, guesses: list[int]) -> Continuation | None:
        if not len(output.logits):
            return None
        self.output = output
        return None if self.main.output is None else self.main


class ScoredText(Sequence):
    """The text of a scoring job, read window by window."""

    def __init__(self, owner: Submitted, job: ScoreJob, config: ModelConfig) -> None:
        self.job, self.found = job, Scores()
        self.windows = windows(len(job.token_ids), config, job.window, job.stride, job.first)
        self.at = 0
        super().__init__(owner, 0, [])
        self.scores = self.found
        self._enter()

    @property
    def over_at_once(self) -> FinishReason | None:
        return None if self.windows else "stop"

    @property
    def reusable(self) -> int:
        # State i gives the probabilities of token i + 1; what is scored already (before a preemption) stays so.
        return self.job.first - 1 + len(self.found.logprobs) - self.windows[self.at].start

    def work_left(self) -> tuple[int, int]:
        return self.pending + sum(window.end - window.start for window in self.windows[self.at + 1 :]), 0

    def wanted(self, count: int) -> int:
        return max(0, min(count, self.computed + count - self.reusable))

    def receive(self, output: NetworkOutput, guesses: list[int]) -> None:
        """Score what the logits are about; go on to the next window at a window's end."""
        window, logits = self.windows[self.at], output.logits
        first = window.start + self.computed - len(logits)
        targets = list(self.job.token_ids[first + 1 : min(first + 1 + len(logits), window.end)])
        if targets:
            add_scores(self.found, logits[: len(targets)], targets, self.job.top)
            self.owner.events.append(ScoreProgress(len(self.found.logprobs), len(self.job.token_ids) - self.job.first))
        if self.pending == 0:
            self.at += 1
            if self.at < len(self.windows):
                self._enter()
            else:
                self.finish("stop")

    def _enter(self) -> None:
        if not self.windows:
            return
        window = self.windows[self.at]
        self.tokens = list(self.job.token_ids[window.start : window.end])
        self.computed = 0


def limit_of(job: GenerateJob, config: ModelConfig) -> int:
    """Most tokens that may be generated, beside the longer of the two prompts and what is answered already."""
    longest = max(len(job.prompt) - job.answered, len(job.negative) if guided(job) else 0)
    return token_limit(longest, job.parameters, config) - job.answered


def guided(job: GenerateJob) -> bool:
    """Whether the job moves away from a negative prompt."""
    return job.parameters.guidance_scale != 1


def layers_of(job: GenerateJob, config: ModelConfig) -> tuple[int, ...]:
    """The earlier layers that DoLa compares with."""
    wanted = job.parameters.dola_layers
    return () if wanted is None else exit_layers(wanted, config.num_layers, config.tie_embeddings)


def token_event(index: int, choice: Choice, guessed: bool = False, at: float | None = None) -> Token:
    """A chosen token as an event."""
    top = tuple(Candidate(*pair) for pair in choice.top)
    trace = replace(choice.trace, guessed=True) if choice.trace is not None and guessed else choice.trace
    return Token(index, choice.token_id, choice.logprob, choice.raw_logprob, choice.rank, top, trace, at)


def end_of(
    token_id: int,
    at_limit: bool,
    job: GenerateJob,
    config: ModelConfig,
    constraint: Constraint | None,
    stop_check: StopCheck | None,
) -> tuple[FinishReason, str | int | None] | None:
    """Tell constraint and stop check of a token; why the sequence ends with it, if it does."""
    if constraint is not None:
        constraint.advance(token_id)
    stopped = stop_check(token_id) if stop_check else None
    if stopped is not None:
        return "stop", stopped
    if ends_sequence(token_id, job.parameters, config):
        return "stop", token_id
    if constraint is not None and constraint.finished:
        return "stop", None
    return ("length", None) if at_limit else None
