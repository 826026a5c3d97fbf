"""One loop on one thread that owns a network: jobs in through a bounded queue, events out through callbacks.

A step reads, in one pass of the network, the next tokens of every sequence the scheduler gives a share, chooses all
next tokens at once, and hands each job the events of the step in one call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from model.cache import Work
from model.config import ModelConfig
from model.decoding.choosing import choose
from model.decoding.parameters import BY_NAME, grammar_parameter
from model.decoding.speculation import DRAFT_TOKENS, Drafter
from model.errors import Cancelled, EngineError, InvalidRequest, Overloaded, TopkapiError
from model.generation import check_prompt
from model.scoring import check_text
from model.transformer import Decoder
from service.engine.network import DecoderNetwork, Network
from service.engine.request import Deliver, GenerateJob, Job
from service.engine.scheduler import Scheduler, Share
from service.engine.search import sequences_of
from service.engine.sequences import Continuation, Sequence, layers_of
from service.engine.slots import Grant
from service.engine.submitted import Submitted

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Fewer rows at once leave the matrix units idle, more delay the sequences that generate beside a long prompt.
STEP_TOKENS = 256


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
    network_seconds: float = 0.0
    step_seconds: float = 0.0


class Engine:
    """Serves one model. `submit` is safe from any thread; `deliver` is called on the engine's own.

    Up to `max_running` sequences are computed together; `max_queue` more jobs, of `max_queued_tokens` prompt tokens
    together (None: 64 contexts), may wait. What exceeds that is refused with `Overloaded`. `step_tokens` is the budget
    of one step. `draft` is a smaller network with the same vocabulary that guesses ahead.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        name: str,
        max_running: int = 32,
        max_queue: int = 256,
        max_queued_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
        network: Network | None = None,
        draft: Decoder | Network | None = None,
    ) -> None:
        self.model, self.name = model, name
        self.max_running, self.max_queue = max_running, max_queue
        self.network: Network = network or DecoderNetwork(model, max_running)
        if isinstance(draft, Decoder):
            draft = DecoderNetwork(draft, self.network.slots)
        self.drafter = None if draft is None else Drafter(draft, step_tokens)
        self.config: ModelConfig = replace(model.config, context_length=self.network.capacity)
        self.max_queued_tokens = max_queued_tokens or 64 * self.config.context_length
        self.counters = Counters()
        self._scheduler = Scheduler(self.network.slots, step_tokens, self._admitted)
        self._arriving: list[Submitted] = []
        self._jobs: list[Submitted] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name=f"engine-{name}", daemon=True)

    @property
    def deterministic(self) -> bool:
        """Whether a request's tokens are independent of everything else the engine does, found by trial."""
        return self.network.deterministic

    @property
    def running(self) -> int:
        """Jobs being worked on."""
        return sum(job.started_at is not None for job in list(self._jobs))

    @property
    def waiting(self) -> int:
        """Jobs queued."""
        return len(self._arriving) + sum(job.started_at is None for job in list(self._jobs))

    def sequences(self) -> list[Sequence]:
        """The sequences that have a slot at this moment. Safe from any thread; the engine goes on changing them."""
        return list(self._scheduler.running)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job, deliver: Deliver) -> Submitted:
        """Queue `job`; its events go to `deliver`.

        Raises `InvalidRequest` for a job that could never run, `Overloaded` when the queue is full, `EngineError`
        when the engine is closed.
        """
        self._check(job)
        if isinstance(job, GenerateJob) and job.parameters["draft_tokens"] is None and self.drafter is not None:
            job = replace(job, parameters={**job.parameters, "draft_tokens": DRAFT_TOKENS})
        submitted = Submitted(job, deliver, self.network.deterministic)
        submitted.sequences = sequences_of(submitted, self.config)
        together = max(len(sequence.gang) for sequence in submitted.sequences)
        if together > self.network.slots:
            assert isinstance(job, GenerateJob)
            field = {True: "num_beams", False: "guidance_scale"}[job.parameters["num_beams"] > 1]
            field = "top_k" if job.parameters["penalty_alpha"] > 0 else field
            raise InvalidRequest(
                f"{field} needs {together} sequences side by side, and there is room for {self.network.slots}",
                field=field,
                hint="ask for fewer" if self.network.slots > 1 else "the server's memory holds one sequence at a time",
            )
        with self._changed:
            if self._closing:
                raise Cancelled(f"the model {self.name!r} is being unloaded", hint="try again with a loaded model")
            waiting = [*self._arriving, *(other for other in self._jobs if other.started_at is None)]
            queued = sum(_length(other.job) for other in waiting)
            if len(waiting) >= self.max_queue or (waiting and queued + _length(job) > self.max_queued_tokens):
                message = f"{len(waiting)} requests are waiting, the queue is full"
                raise Overloaded(message, hint="try again in a moment")
            self._arriving.append(submitted)
            self._changed.notify()
        return submitted

    def close(self, timeout: float = 5.0) -> None:
        """End every job as cancelled and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def step(self) -> bool:
        """One step: take in what arrived, end what must end, run the network once; whether work is left.

        The engine's own thread calls this; tests call it on an engine that was not started.
        """
        began = time.perf_counter()
        with self._changed:
            arrived, self._arriving = self._arriving, []
            self._jobs += arrived
        for submitted in arrived:
            self._scheduler.add(submitted.sequences)
        self._end_what_must()
        shares = self._scheduler.plan()
        if self.drafter is not None and shares:
            self._draft(self.drafter, shares)
        if shares:
            self._run(shares)
            self.counters.steps += 1
            self.counters.step_seconds += time.perf_counter() - began
        self._settle()
        if not self._jobs and not self._arriving:
            self._check_invariants()
        return bool(self._jobs or self._arriving)

    def _check(self, job: Job) -> None:
        if isinstance(job, GenerateJob):
            if job.parameters.keys() != BY_NAME.keys():
                raise InvalidRequest("a job's parameters must be resolved first", field="parameters")
            field = grammar_parameter(job.parameters)
            if field is not None and job.constraint is None:
                raise InvalidRequest(f"{field} must be compiled into the job's constraint first", field=field)
            check_prompt(job.prompt, self.config)
            if job.negative:
                check_prompt(job.negative, self.config, "negative_prompt")
            layers_of(job, self.config)
            if job.parameters["draft_tokens"] and self.drafter is None:
                raise InvalidRequest(
                    f"draft_tokens needs a draft checkpoint, and {self.name} was loaded without one",
                    field="draft_tokens",
                    hint="start the server with --draft PATH, or leave draft_tokens out",
                )
        else:
            check_text(list(job.token_ids), self.config)
            if not 1 <= job.first <= len(job.token_ids):
                raise InvalidRequest(f"nothing can be scored from position {job.first} on", field="first")

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._arriving or self._jobs or self._closing):
                    self._changed.wait()
                if self._closing:
                    self._jobs += self._arriving
                    self._arriving = []
                    break
            self.step()
        for submitted in self._jobs:
            submitted.close("cancelled")
        self._settle()

    def _admitted(self, sequence: Sequence, grant: Grant) -> None:
        if sequence.owner.started_at is None:
            sequence.owner.started_at = time.monotonic()
        if grant.copy_from is not None:
            self.network.copy(grant.copy_from, grant.slot, 0, grant.cached)
        if sequence is sequence.owner.sequences[0]:
            sequence.owner.cached_tokens = grant.cached
        self.counters.cached_tokens += grant.cached

    def _end_what_must(self) -> None:
        now = time.monotonic()
        for submitted in self._jobs:
            if submitted.cancelled:
                submitted.close("cancelled")
            elif submitted.job.deadline is not None and now >= submitted.job.deadline:
                submitted.close("deadline")
            else:
                for sequence in submitted.sequences:
                    if not sequence.done and sequence.over_at_once is not None:
                        sequence.finish(sequence.over_at_once)
                submitted.complete_if_done()
        self._scheduler.drop_done()

    def _draft(self, drafter: Drafter, shares: list[Share]) -> None:
        """Let the draft network guess for sequences that have found nothing to guess themselves."""
        began = time.perf_counter()
        left = self._scheduler.budget - sum(share.count + len(share.guesses) for share in shares)
        drafts = []
        for share in shares:
            if isinstance(share.sequence, Continuation) and not share.guesses:
                draft = share.sequence.drafted(left)
                if draft is not None:
                    left -= draft.length
                    drafts.append((share, draft))
        drafter.guess(draft for _, draft in drafts)
        for share, draft in drafts:
            share.guesses.extend(draft.guesses)
        self.counters.network_seconds += time.perf_counter() - began

    def _run(self, shares: list[Share]) -> None:
        """Read every share, then choose; a failure is traced to the jobs that cause it by running them alone."""
        began = time.perf_counter()
        works = [_work(share) for share in shares]
        try:
            outputs = self.network.run(works)
        except Exception as error:
            self.counters.failed_steps += 1
            self._scheduler.pool.forget()
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
            elif ready is not None:
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
            choices = choose(logits, [sequence.row for sequence in sequences])
        except Exception as error:
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
        except Exception as error:
            self._fail(owner, error)
            return None

    def _fail(self, owner: Submitted, error: Exception) -> None:
        if owner.over:
            return
        if not isinstance(error, TopkapiError):
            logger.error("a step of %s failed", self.name, exc_info=error)
            message = f"the step failed: {type(error).__name__}: {error}"
            error = EngineError(message, hint="the server's log has more")
        owner.fail(error)

    def _settle(self) -> None:
        """Hand out the step's events and let go of what is over."""
        for submitted in self._jobs:
            submitted.complete_if_done()
            events, submitted.events = submitted.events, []
            if not events:
                continue
            try:
                submitted.deliver(events)
            except Exception:
                # A receiver that fails (its event loop is gone, say) must not take the others down.
                logger.exception("a receiver of %s failed; its job is cancelled", self.name)
                submitted.cancelled = True
        self._scheduler.drop_done()
        with self._changed:
            self._jobs = [submitted for submitted in self._jobs if not submitted.over]

    def _check_invariants(self) -> None:
        scheduler = self._scheduler
        if scheduler.running or scheduler.waiting or scheduler.pool.free != self.network.slots:
            logger.error("%s is idle but holds slots or sequences; starting afresh", self.name)
            self._scheduler = Scheduler(self.network.slots, scheduler.budget, self._admitted)


def _work(share: Share) -> Work:
    sequence = share.sequence
    assert sequence.slot is not None, "a running sequence has a slot"
    end = sequence.computed + share.count
    tokens = [*sequence.tokens[sequence.computed : end], *share.guesses]
    wanted = sequence.wanted(share.count) + len(share.guesses)
    layers = sequence.layers if wanted else ()
    return Work(sequence.slot, sequence.computed, tokens, wanted, sequence.states(share.count), layers)


def _length(job: Job) -> int:
    return len(job.prompt) + len(job.negative) if isinstance(job, GenerateJob) else len(job.token_ids)
