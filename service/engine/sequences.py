"""What the engine runs: one continuation of a prompt, or one text to score. Tokens, progress and how each ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from torch import Tensor

from model.config import ModelConfig
from model.decoding.choosing import Choice
from model.decoding.stages import Row
from model.errors import TopkapiError
from model.generation import ends_sequence, token_limit
from model.scoring import Scores, add_scores, windows
from service.engine.request import (
    Candidate,
    Completed,
    Deliver,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateJob,
    Job,
    ScoreJob,
    ScoreProgress,
    Timings,
    Token,
)
from service.engine.speculation import PromptLookup


@dataclass(eq=False)
class Submitted:
    """A job in the engine's hands, and the caller's handle to it. Events collect until the step is over."""

    job: Job
    deliver: Deliver
    deterministic: bool
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

    def cancel(self) -> None:
        self.cancelled = True

    def close(self, reason: FinishReason) -> None:
        """End every open sequence with `reason`."""
        for sequence in self.sequences:
            if not sequence.done:
                sequence.finish(reason)
        self.complete_if_done()

    def fail(self, error: TopkapiError) -> None:
        """End the job with an error."""
        for sequence in self.sequences:
            sequence.done = True
        self.events.append(Failed(error))
        self.over = True

    def complete_if_done(self) -> None:
        """Add the last event once every sequence is done."""
        if self.over or not all(sequence.done for sequence in self.sequences):
            return
        scores = next((s.scores for s in self.sequences if isinstance(s, ScoredText)), None)
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


class Sequence:
    """A list of tokens of which the first `computed` are in cache slot `slot`; the engine's unit of work."""

    def __init__(self, owner: Submitted, index: int, tokens: list[int]) -> None:
        self.owner, self.index, self.tokens = owner, index, tokens
        self.computed = 0
        self.slot: int | None = None
        self.done = False

    @property
    def pending(self) -> int:
        """Tokens still to be read."""
        return len(self.tokens) - self.computed

    @property
    def ready(self) -> bool:
        """Whether the sequence may be admitted."""
        return True

    @property
    def reusable(self) -> int:
        """How many of its first tokens may come from the cache without being read."""
        raise NotImplementedError

    def wanted(self, count: int) -> int:
        """Of how many of the next `count` tokens, counted from the last, logits are needed."""
        raise NotImplementedError

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End with `reason`."""
        self.done = True
        self.owner.events.append(Finished(self.index, reason, stop_reason))


class Continuation(Sequence):
    """Sequence `index` of a generating job. With greedy decoding one stands for all `n` (`copies`)."""

    def __init__(self, owner: Submitted, job: GenerateJob, index: int, config: ModelConfig, copies: int = 1) -> None:
        super().__init__(owner, index, list(job.prompt))
        self.job, self.config, self.copies = job, config, copies
        self.limit = token_limit(len(job.prompt), job.parameters, config)
        self.row = Row(job.parameters, self.tokens, len(job.prompt), index, config.end_token_ids)
        self.row.constraint = job.constraint(index) if job.constraint else None
        self.stop_check = job.stop_check(index) if job.stop_check else None
        most = int(job.parameters["prompt_lookup"])
        self.lookup = PromptLookup(most) if most else None

    def guess(self, room: int) -> list[int]:
        """Up to `room` tokens that may be chosen after the next one; only where the next one is all that is pending."""
        if self.lookup is None or self.pending != 1 or len(self.tokens) == len(self.job.prompt):
            return []
        left = self.limit - (len(self.tokens) - len(self.job.prompt)) - 1
        return self.lookup.guess(self.row.history(), min(room, left))

    def learn(self, guessed: int, accepted: int) -> None:
        """Take in how many of the last guesses were right."""
        if self.lookup is not None:
            self.lookup.learn(guessed, accepted)
        self.owner.guessed_tokens += guessed
        self.owner.accepted_tokens += accepted

    @property
    def ready(self) -> bool:
        # The others of a job wait until the first has read the prompt, and then start from its cache.
        first = self.owner.sequences[0]
        return self is first or first.done or first.computed >= len(self.job.prompt)

    @property
    def reusable(self) -> int:
        return len(self.tokens) - 1

    def wanted(self, count: int) -> int:
        return 1 if count == self.pending else 0

    def take(self, choice: Choice) -> None:
        """Append the chosen token and see whether it ends the sequence."""
        token_id = choice.token_id
        if self.owner.prefilled_at is None:
            self.owner.prefilled_at = time.monotonic()
        self.tokens.append(token_id)
        top = tuple(Candidate(*pair) for pair in choice.top)
        event = Token(self.index, token_id, choice.logprob, choice.raw_logprob, choice.rank, top, choice.trace)
        self.owner.events += [replace(event, index=self.index + copy) for copy in range(self.copies)]
        constraint = self.row.constraint
        if constraint is not None:
            constraint.advance(token_id)
        stopped = self.stop_check(token_id) if self.stop_check else None
        if stopped is not None:
            self.finish("stop", stopped)
        elif ends_sequence(token_id, self.job.parameters, self.config):
            self.finish("stop", token_id)
        elif constraint is not None and constraint.finished:
            self.finish("stop")
        elif len(self.tokens) - len(self.job.prompt) == self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.done = True
        self.owner.events += [Finished(self.index + copy, reason, stop_reason) for copy in range(self.copies)]


class ScoredText(Sequence):
    """The text of a scoring job, read window by window."""

    def __init__(self, owner: Submitted, job: ScoreJob, config: ModelConfig) -> None:
        self.job, self.scores = job, Scores()
        self.windows = windows(len(job.token_ids), config, job.window, job.stride, job.first)
        self.at = 0
        super().__init__(owner, 0, [])
        self._enter()

    @property
    def reusable(self) -> int:
        # State i gives the probabilities of token i + 1; what is scored already (before a preemption) stays so.
        return self.job.first - 1 + len(self.scores.logprobs) - self.windows[self.at].start

    def wanted(self, count: int) -> int:
        return max(0, min(count, self.computed + count - self.reusable))

    def take(self, logits: Tensor) -> None:
        """Score what the logits of the tokens read last are about; go on to the next window at a window's end."""
        window = self.windows[self.at]
        first = window.start + self.computed - len(logits)
        targets = list(self.job.token_ids[first + 1 : min(first + 1 + len(logits), window.end)])
        if targets:
            add_scores(self.scores, logits[: len(targets)], targets, self.job.top)
            self.owner.events.append(ScoreProgress(len(self.scores.logprobs), len(self.job.token_ids) - self.job.first))
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


def sequences_of(owner: Submitted, config: ModelConfig) -> list[Sequence]:
    """The sequences a job is made of."""
    job = owner.job
    if isinstance(job, ScoreJob):
        return [ScoredText(owner, job, config)]
    count = int(job.parameters["n"])
    if job.parameters["temperature"] == 0:
        return [Continuation(owner, job, 0, config, copies=count)]
    return [Continuation(owner, job, index, config) for index in range(count)]
