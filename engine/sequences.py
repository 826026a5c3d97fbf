"""The sequences that the engine runs: one continuation of a prompt, or one text to score."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from topkapi.engine.request import (
    Candidate,
    Event,
    Finished,
    FinishReason,
    GenerateJob,
    PromptProgress,
    ScoreJob,
    ScoreProgress,
    StopCheck,
    Token,
)
from topkapi.engine.submitted import Sequence, Submitted, ranked
from topkapi.model.cache import NetworkOutput
from topkapi.model.config import ModelConfig
from topkapi.model.decoding.choosing import Choice
from topkapi.model.decoding.contrast import exit_layers
from topkapi.model.decoding.grammar import Constraint
from topkapi.model.decoding.speculation import Draft, DraftLength, looked_up
from topkapi.model.decoding.stages import Row
from topkapi.model.generation import ends_sequence, token_limit
from topkapi.model.scoring import Scores, add_scores, windows


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

    def take(self, choice: Choice, guessed: bool = False) -> None:
        """Append the chosen token and see whether it ends the sequence."""
        token_id = choice.token_id
        if self.owner.prefilled_at is None:
            self.owner.prefilled_at = time.monotonic()
        self.tokens.append(token_id)
        if self.guide is not None:
            self.guide.tokens.append(token_id)
        event = token_event(self.index, choice, guessed)
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


def token_event(index: int, choice: Choice, guessed: bool = False) -> Token:
    """A chosen token as an event."""
    top = tuple(Candidate(*pair) for pair in choice.top)
    trace = replace(choice.trace, guessed=True) if choice.trace is not None and guessed else choice.trace
    return Token(index, choice.token_id, choice.logprob, choice.raw_logprob, choice.rank, top, trace)


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
