"""One loop on one thread that owns a network: jobs in through a bounded queue, events out through callbacks.

A step reads, in one pass of the network, the next tokens of every sequence the scheduler gives a share, chooses all
next tokens at once, and hands each job the events of the step in one call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from topkapi.engine.request import Deliver, Failed, GenerateJob, Job, ScoreJob, Starting
from topkapi.engine.scheduler import LONGEST_WAIT, Room, check_room, too_late
from topkapi.engine.search import BeamSearch, ContrastiveSearch
from topkapi.engine.sequences import Continuation, ScoredText, Sequence, Submitted, layers_of
from topkapi.engine.steps import Counters, DecoderNetwork, Network, Steps
from topkapi.model.config import ModelConfig
from topkapi.model.decoding.parameters import grammar_parameter
from topkapi.model.decoding.speculation import DRAFT_TOKENS, Drafter
from topkapi.model.decoding.stopping import check_prompt
from topkapi.model.errors import Cancelled, EngineError, EngineStopped, InvalidRequest
from topkapi.model.scoring import check_text
from topkapi.model.transformer import Decoder

logger = logging.getLogger(__name__)

# Fewer rows at once leave the matrix units idle, more delay the sequences that generate beside a long prompt.
STEP_TOKENS = 256

MOST_CRASHES, CRASHES_SECONDS = 3, 60.0
"""How often the loop may break down within so many seconds and begin anew; once more, and only a new process helps."""

PAUSE_SECONDS = 1.0
"""Before it begins anew, for each time but one that it did so of late."""

__all__ = ["LONGEST_WAIT", "Engine"]


class Engine:
    """Serves one model. `submit` is safe from any thread; `deliver` is called on the engine's own.

    Up to `max_running` sequences are computed together; `max_queue` more jobs, of `max_queued_tokens` prompt tokens
    together (None: 64 contexts), may wait, for at most `max_queue_seconds` (None: as long as it takes). What exceeds
    that is refused with `Overloaded`. `step_tokens` is the budget of one step. `draft` is a smaller network with the
    same vocabulary that guesses ahead. The events of a step are delivered within `handing_out()`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        name: str,
        max_running: int = 32,
        max_queue: int = 256,
        max_queued_tokens: int | None = None,
        max_queue_seconds: float | None = None,
        step_tokens: int = STEP_TOKENS,
        network: Network | None = None,
        draft: Decoder | Network | None = None,
        handing_out: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.name = model, name
        self._handing_out = handing_out
        self.max_running, self.max_queue = max_running, max_queue
        network = network or DecoderNetwork(model, max_running)
        if isinstance(draft, Decoder):
            draft = DecoderNetwork(draft, network.slots)
        drafter = None if draft is None else Drafter(draft, step_tokens)
        self._steps = Steps(name, network, drafter, step_tokens, handing_out)
        self.heartbeat = self._steps.heartbeat
        self.config: ModelConfig = replace(model.config, context_length=network.capacity)
        self.max_queued_tokens = max_queued_tokens or 64 * self.config.context_length
        self.max_queue_seconds = max_queue_seconds
        self.trouble: EngineStopped | None = None
        self._given_up = False
        self._arriving: list[Submitted] = []
        self._jobs: list[Submitted] = []
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._abandoned = False
        self._closing: Cancelled | None = None
        self._crashes: list[float] = []
        self._thread = threading.Thread(target=self._live, name=f"engine-{name}", daemon=True)

    def __repr__(self) -> str:
        return f"the engine of {self.name}"

    @property
    def dead(self) -> bool:
        """Whether its loop has ended without having been asked to."""
        started = self._thread.ident is not None
        return self._given_up or (started and self._closing is None and not self._thread.is_alive())

    @property
    def healthy(self) -> bool:
        """Whether it computes what it is given."""
        return self.trouble is None and not self.dead

    @property
    def restarts(self) -> int:
        """How often it has begun anew."""
        return self.counters.restarts

    @property
    def usage(self) -> float:
        """The part of its slots that hold a running sequence, from 0 to 1."""
        return len(self._steps.scheduler.running) / self.network.slots

    @property
    def network(self) -> Network:
        """What computes."""
        return self._steps.network

    @property
    def drafter(self) -> Drafter | None:
        """What guesses ahead, if something does."""
        return self._steps.drafter

    @property
    def counters(self) -> Counters:
        """What it has done so far."""
        return self._steps.counters

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
        return list(self._steps.scheduler.running)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job, deliver: Deliver, *, begun: bool = False, starting: Starting | None = None) -> Submitted:
        """Queue `job`; its events go to `deliver`. With `begun` it goes on with what has begun, and may wait for ever.

        `starting` is called on the engine's own thread when the job leaves the queue, before it is first worked on.

        Raises `InvalidRequest` for a job that could never run, `Overloaded` when the queue is full or the job could not
        begin in time, `EngineError` when the engine is closed.
        """
        self._check(job)
        if isinstance(job, GenerateJob) and job.parameters.draft_tokens is None and self.drafter is not None:
            job = replace(job, parameters=replace(job.parameters, draft_tokens=DRAFT_TOKENS))
        submitted = Submitted(job, deliver, self.network.deterministic, starting)
        submitted.patience = None if begun else self.max_queue_seconds
        submitted.sequences = _sequences_of(submitted, self.config)
        together = max(len(sequence.group) for sequence in submitted.sequences)
        if together > self.network.slots:
            assert isinstance(job, GenerateJob)
            beams, contrastive = job.parameters.num_beams > 1, job.parameters.penalty_alpha > 0
            field = "num_beams" if beams else "top_k" if contrastive else "guidance_scale"
            raise InvalidRequest(
                f"{field} needs {together} sequences side by side, and there is room for {self.network.slots}",
                field=field,
                hint="ask for fewer" if self.network.slots > 1 else "the server's memory holds one sequence at a time",
            )
        with self._changed:
            if self._closing is not None:
                raise self.cancellation()
            if self.trouble is not None:
                raise EngineStopped(self.trouble.message, retry_after=self.trouble.retry_after)
            room = Room(self.max_queue, self.max_queued_tokens, self.max_queue_seconds)
            jobs = (*self._jobs, *self._arriving)
            submitted.foretold = check_room(job, jobs, room, self._steps.speed, self.network.slots, begun=begun)
            self._arriving.append(submitted)
            self._steps.interrupted[0] = True
            self._changed.notify()
        return submitted

    def cancellation(self) -> Cancelled:
        """Why work that was cancelled was: because the engine is being closed, or somebody ended it."""
        if self._closing is None:
            return Cancelled("the answer was cancelled before its end", hint="send the request again")
        return Cancelled(self._closing.message, hint=self._closing.hint)

    def stop(self, why: Cancelled | None = None) -> None:
        """Have every job end as cancelled, and the thread after that; `why` is what is told of it. Does not wait."""
        with self._changed:
            if self._closing is None:
                unloaded = Cancelled(f"{self.name} is being unloaded", hint="send the request again to a loaded model")
                self._closing = why or unloaded
            self._steps.interrupted[0] = True
            self._changed.notify()

    @property
    def stopped(self) -> bool:
        """Whether its thread has ended, or never began."""
        return not self._thread.is_alive()

    def close(self, timeout: float = 5.0, why: Cancelled | None = None) -> None:
        """As `stop`, and wait; a thread that does not end in `timeout` seconds is left to itself, its jobs ended."""
        self.stop(why)
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._thread.is_alive() or not self._thread.ident:
            self._end_all(lambda submitted: submitted.close("cancelled"))

    def abandon(self, error: EngineStopped) -> None:
        """End every job with `error`, from another thread than the engine's, which does not get on.

        If it gets on after all, it begins anew; until then nothing is accepted.
        """
        self.trouble = error
        self._end_all(lambda submitted: submitted.fail(error))

    def step(self) -> bool:
        """One step: take in what arrived, end what must end, run the network once; whether work is left.

        The engine's own thread calls this; tests call it on an engine that was not started.
        """
        began = time.perf_counter()
        self.heartbeat.beat()
        with self._changed:
            arrived, self._arriving = self._arriving, []
            self._jobs += arrived
            self._steps.interrupted[0] = self._closing is not None
        for submitted in arrived:
            self._steps.scheduler.add(submitted.sequences)
        self._end_what_must()
        self._steps.step(began)
        self._settle()
        if not self._jobs and not self._arriving:
            self._steps.check_idle()
        return bool(self._jobs or self._arriving)

    def _check(self, job: Job) -> None:
        if isinstance(job, GenerateJob):
            field = grammar_parameter(job.parameters)
            if field is not None and job.constraint is None:
                raise InvalidRequest(f"{field} must be compiled into the job's constraint first", field=field)
            check_prompt(job.prompt, self.config)
            if job.negative:
                check_prompt(job.negative, self.config, "negative_prompt")
            layers_of(job, self.config)
            if job.parameters.draft_tokens and self.drafter is None:
                raise InvalidRequest(
                    f"draft_tokens needs a draft checkpoint, and {self.name} was loaded without one",
                    field="draft_tokens",
                    hint="start the server with --draft PATH, or leave draft_tokens out",
                )
        else:
            check_text(list(job.token_ids), self.config)
            if not 1 <= job.first <= len(job.token_ids):
                raise InvalidRequest(f"nothing can be scored from position {job.first} on", field="first")

    def _live(self) -> None:
        """The thread: whatever breaks the loop off, its jobs end with an error and it begins anew, within bounds."""
        while True:
            try:
                self._loop()
                return
            except BaseException as error:
                self._break_down(error)
                if self._given_up or not self._recover():
                    return
            finally:
                self.heartbeat.rest()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._arriving or self._jobs or self._closing):
                    self.heartbeat.rest()
                    self._changed.wait()
                if self._closing is not None:
                    self._jobs += self._arriving
                    self._arriving = []
                    break
            self.step()
        for submitted in self._jobs:
            submitted.close("cancelled")
        self._settle()

    def _break_down(self, error: BaseException) -> None:
        now = time.monotonic()
        self._crashes = [at for at in self._crashes if now - at < CRASHES_SECONDS] + [now]
        self.counters.restarts += 1
        dead = len(self._crashes) > MOST_CRASHES
        if isinstance(error, _Abandoned):
            logger.critical("%r is back after it was given up, and begins anew", self)
        else:
            logger.critical("%r broke down%s", self, "" if dead else ", and begins anew", exc_info=error)
            message = f"the engine broke down: {type(error).__name__}: {error}"
            self.trouble = EngineStopped(message)
            failure = EngineStopped(message, hint="send the request again; the server's log has more")
            self._end_all(lambda submitted: submitted.fail(failure))
        self._given_up = dead

    def _recover(self) -> bool:
        """Begin anew, the later the more often it was needed of late; whether it can go on."""
        self.heartbeat.rest()
        with self._changed:
            self._changed.wait_for(lambda: self._closing is not None, timeout=PAUSE_SECONDS * (len(self._crashes) - 1))
        try:
            self._steps.begin_anew()
        except BaseException as error:
            self._break_down(error)
            return not self._given_up and self._recover()
        with self._telling:
            self._abandoned = False
            self.trouble = None
        return True

    def _end_all(self, end: Callable[[Submitted], None]) -> None:
        """End every job by `end`, and see that each is told of it. Safe from any thread, whatever state they are in."""
        # The engine's own thread holds it while it hands out events; a receiver that hangs must not hang this too.
        held = self._telling.acquire(timeout=1.0)
        try:
            with self._changed:
                jobs, self._jobs, self._arriving = [*self._jobs, *self._arriving], [], []
            self._abandoned = threading.current_thread() is not self._thread
            for submitted in jobs:
                try:
                    if not submitted.over:
                        end(submitted)
                    submitted.tell()
                except BaseException:
                    logger.exception("a job of %s could not be ended properly", self.name)
                finally:
                    if not submitted.told:
                        _tell_at_least(submitted, self.trouble or self.cancellation())
        finally:
            if held:
                self._telling.release()

    def _end_what_must(self) -> None:
        for submitted in self._jobs:
            if submitted.cancelled:
                submitted.close("cancelled")
            elif submitted.late:
                submitted.close("deadline")
            elif submitted.impatient:
                waited = time.monotonic() - submitted.queued_at
                speed, slots = self._steps.speed, self.network.slots
                speed.began(submitted.foretold, waited)
                others = [each for each in (*self._jobs, *self._arriving) if each is not submitted]
                submitted.fail(too_late(submitted.job, waited, others, speed, slots))
            else:
                for sequence in submitted.sequences:
                    if not sequence.done and sequence.over_at_once is not None:
                        sequence.finish(sequence.over_at_once)
                submitted.complete_if_done()
        self._steps.scheduler.drop_done()

    def _settle(self) -> None:
        """Hand out the step's events and let go of what is over."""
        with self._telling, self._handing_out():
            if self._abandoned:
                raise _Abandoned
            for submitted in self._jobs:
                submitted.complete_if_done()
                try:
                    submitted.tell()
                except BaseException:
                    # A receiver that fails (its event loop is gone, say) must not take the others down.
                    logger.exception("a receiver of %s failed; its job is cancelled", self.name)
                    submitted.cancelled = True
                if submitted.over and not submitted.unwanted and submitted.started_at is not None:
                    self._steps.speed.ended(submitted)
        self._steps.scheduler.drop_done()
        with self._changed:
            self._jobs = [submitted for submitted in self._jobs if not submitted.over]


def _sequences_of(owner: Submitted, config: ModelConfig) -> list[Sequence]:
    """The sequences a job is made of."""
    job = owner.job
    if isinstance(job, ScoreJob):
        return [ScoredText(owner, job, config)]
    if job.parameters.num_beams > 1:
        return list(BeamSearch(owner, job, config).branches)
    if job.parameters.penalty_alpha > 0:
        return list(ContrastiveSearch(owner, job, config).branches)
    count = job.parameters.best_of or job.parameters.n
    alike = job.parameters.temperature == 0
    continuations = [Continuation(owner, job, 0, config, copies=count)] if alike else [
        Continuation(owner, job, index, config) for index in range(count)
    ]  # fmt: skip
    return [sequence for continuation in continuations for sequence in continuation.group]


class _Abandoned(Exception):
    """The thread is back, but its jobs were ended meanwhile."""


def _tell_at_least(submitted: Submitted, error: EngineError) -> None:
    """The last resort for a job whose own events can't be handed out."""
    submitted.over = submitted.told = True
    try:
        submitted.deliver([Failed(error)])
    except BaseException:
        logger.exception("a receiver can't be told that its job is over")
