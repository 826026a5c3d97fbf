"""The state of one job while the engine works on it. Each `advance` is one bounded piece of work on the model."""

from __future__ import annotations

import time
from collections.abc import Iterator

from model.cache import PREFILL_CHUNK, SlotCache, Work, read, wanted_logits
from model.decoding.choosing import Choice, choose
from model.decoding.stages import Row
from model.generation import ends_sequence, token_limit
from model.scoring import Scores, score_steps
from model.transformer import Decoder
from service.engine.request import (
    Candidate,
    Completed,
    Event,
    Finished,
    FinishReason,
    GenerateJob,
    ScoreJob,
    ScoreProgress,
    StopCheck,
    Timings,
    Token,
)


class Clock:
    """When a job was queued, started, and began to generate."""

    def __init__(self) -> None:
        self.queued = time.monotonic()
        self.started = self.queued
        self.prefilled: float | None = None

    def timings(self) -> Timings:
        now = time.monotonic()
        prefilled = self.prefilled or now
        return Timings(self.started - self.queued, prefilled - self.started, now - prefilled)


class Sequence:
    """One continuation of a prompt: its own cache, tokens and stop check."""

    def __init__(self, job: GenerateJob, index: int, cache: SlotCache, end_token_ids: tuple[int, ...]) -> None:
        self.index, self.cache = index, cache
        self.row = Row(job.parameters, list(job.prompt), len(job.prompt), index, end_token_ids)
        self.stop_check: StopCheck | None = job.stop_check(index) if job.stop_check else None
        self.finished: Finished | None = None

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> Finished:
        self.finished = Finished(self.index, reason, stop_reason)
        return self.finished


class GenerateRun:
    """Reads the prompt once, then extends each of the job's `n` sequences by one token per piece of work."""

    def __init__(self, job: GenerateJob, model: Decoder) -> None:
        self.job, self.model, self.clock = job, model, Clock()
        self.count: int = job.parameters["n"]
        self.limit = token_limit(len(job.prompt), job.parameters, model.config)
        self.sequences: list[Sequence] = []
        self._steps = self._work()

    def advance(self) -> list[Event] | None:
        """Events of the next piece of work, or None when the job is complete."""
        return next(self._steps, None)

    def end(self, reason: FinishReason) -> list[Event]:
        """Close what is still open with `reason`."""
        started = {sequence.index: sequence for sequence in self.sequences}
        open_indexes = [
            index for index in range(self.count)
            if index not in started or started[index].finished is None
        ]  # fmt: skip
        return [*(Finished(index, reason) for index in open_indexes), Completed(self.clock.timings())]

    def _work(self) -> Iterator[list[Event]]:
        job, config = self.job, self.model.config
        count = self.count
        prompt, cache = list(job.prompt), SlotCache(self.model, slots=self.count)
        if self.limit == 0:
            yield [*(Finished(index, "length") for index in range(count)), Completed(self.clock.timings())]
            return
        for start in range(0, len(prompt), PREFILL_CHUNK):
            state = read(self.model, cache, [Work(0, start, prompt[start : start + PREFILL_CHUNK])])
            yield []
        self.clock.prefilled = time.monotonic()
        first_logits = wanted_logits(self.model, state)
        self.sequences = [
            Sequence(job, index, cache, config.end_token_ids) for index in range(count)
        ]
        for index in range(1, count):
            cache.copy(0, index, len(prompt))
        for sequence in self.sequences:
            yield [*self._take(sequence, choose(first_logits, [sequence.row])[0])]
        while open_sequences := [sequence for sequence in self.sequences if sequence.finished is None]:
            for sequence in open_sequences:
                tokens = sequence.row.tokens
                state = read(self.model, cache, [Work(sequence.index, len(tokens) - 1, tokens[-1:])])
                yield self._take(sequence, choose(wanted_logits(self.model, state), [sequence.row])[0])
        yield [Completed(self.clock.timings())]

    def _take(self, sequence: Sequence, choice: Choice) -> list[Event]:
        """Append the chosen token and see whether it ends the sequence."""
        parameters, token_id = self.job.parameters, choice.token_id
        sequence.row.tokens.append(token_id)
        top = tuple(Candidate(*pair) for pair in choice.top)
        events: list[Event] = [
            Token(sequence.index, token_id, choice.logprob, choice.raw_logprob, choice.rank, top)
        ]
        stopped = sequence.stop_check(token_id) if sequence.stop_check else None
        if stopped is not None:
            events.append(sequence.finish("stop", stopped))
        elif ends_sequence(token_id, parameters, self.model.config):
            events.append(sequence.finish("stop", token_id))
        elif len(sequence.row.generated) == self.limit:
            events.append(sequence.finish("length"))
        return events


class ScoreRun:
    """Scores one chunk of tokens per piece of work."""

    def __init__(self, job: ScoreJob, model: Decoder) -> None:
        self.job, self.clock = job, Clock()
        self._scores = Scores()
        self._steps = score_steps(model, list(job.token_ids), window=job.window, stride=job.stride, top=job.top)
        self._complete = False

    def advance(self) -> list[Event] | None:
        """Events of the next piece of work, or None when the job is complete."""
        if self._complete:
            return None
        scores = next(self._steps, None)
        if scores is not None:
            self._scores = scores
            return [ScoreProgress(len(scores.logprobs), len(self.job.token_ids) - 1)]
        self._complete = True
        return [Completed(self.clock.timings(), scores=self._scores)]

    def end(self, reason: FinishReason) -> list[Event]:
        """A scoring job has one sequence, 0."""
        return [Finished(0, reason), Completed(self.clock.timings())]


Run = GenerateRun | ScoreRun
