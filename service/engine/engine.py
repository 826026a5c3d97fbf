"""One loop on one thread that owns a model: jobs in through a bounded queue, events out through callbacks.

Running jobs take turns, one bounded piece of work each (a chunk of prompt, a token, a chunk of scoring), so none
blocks another, and each is computed alone, so its tokens cannot depend on what else the engine does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from model.decoding.parameters import BY_NAME
from model.errors import EngineError, InvalidRequest, Overloaded, TopkapiError
from model.generation import check_prompt
from model.scoring import check_text, windows
from model.transformer import Decoder
from service.engine.request import Deliver, Event, Failed, GenerateJob, Job
from service.engine.runs import GenerateRun, Run, ScoreRun

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Submitted:
    """A job in the engine's hands; the caller's handle to it."""

    job: Job
    deliver: Deliver
    run: Run
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class Engine:
    """Serves one model. `submit` is safe from any thread; `deliver` is called on the engine's own.

    At most `max_running` jobs run at a time and `max_queue` wait; `max_queued_tokens` bounds what the waiting ones
    may hold (None: 64 contexts). What exceeds that is refused with `Overloaded`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        name: str,
        max_running: int = 32,
        max_queue: int = 256,
        max_queued_tokens: int | None = None,
    ) -> None:
        self.model, self.name = model, name
        self.max_running, self.max_queue = max_running, max_queue
        self.max_queued_tokens = max_queued_tokens or 64 * model.config.context_length
        self._waiting: deque[Submitted] = deque()
        self._running: list[Submitted] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name=f"engine-{name}", daemon=True)

    @property
    def running(self) -> int:
        """Jobs being worked on."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs queued."""
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job, deliver: Deliver) -> Submitted:
        """Queue `job`; its events go to `deliver`.

        Raises `InvalidRequest` for a job that could never run, `Overloaded` when the queue is full, `EngineError`
        when the engine is closed.
        """
        run = self._check(job)
        submitted = Submitted(job, deliver, run)
        with self._changed:
            if self._closing:
                raise EngineError(f"the model {self.name!r} is being unloaded", hint="try again with a loaded model")
            tokens = _length(job)
            queued = sum(_length(waiting.job) for waiting in self._waiting)
            if len(self._waiting) >= self.max_queue or (self._waiting and queued + tokens > self.max_queued_tokens):
                raise Overloaded(
                    f"{len(self._waiting)} requests are waiting, the queue is full", hint="try again in a moment"
                )
            self._waiting.append(submitted)
            self._changed.notify()
        return submitted

    def close(self, timeout: float = 5.0) -> None:
        """End every job as cancelled and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _check(self, job: Job) -> Run:
        config = self.model.config
        if isinstance(job, GenerateJob):
            if job.parameters.keys() != BY_NAME.keys():
                raise InvalidRequest("a job's parameters must be resolved first", field="parameters")
            check_prompt(job.prompt, config)
            return GenerateRun(job, self.model)
        check_text(list(job.token_ids), config)
        windows(len(job.token_ids), config, job.window, job.stride)
        return ScoreRun(job, self.model)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                closing = self._closing
                while self._waiting and (closing or len(self._running) < self.max_running):
                    submitted = self._waiting.popleft()
                    submitted.run.clock.started = time.monotonic()
                    self._running.append(submitted)
            if closing:
                for submitted in self._running:
                    self._send(submitted, submitted.run.end("cancelled"))
                self._running = []
                return
            self._running = [submitted for submitted in self._running if self._advance(submitted)]

    def _advance(self, submitted: Submitted) -> bool:
        """One piece of work on one job; returns whether it goes on."""
        deadline = submitted.job.deadline
        if submitted.cancelled:
            return self._send(submitted, submitted.run.end("cancelled"))
        if deadline is not None and time.monotonic() >= deadline:
            return self._send(submitted, submitted.run.end("deadline"))
        try:
            events = submitted.run.advance()
        except TopkapiError as error:
            return self._send(submitted, [Failed(error)])
        except Exception as error:
            logger.exception("a step of %s failed", self.name)
            failure = EngineError(f"the step failed: {type(error).__name__}: {error}", hint="the server's log has more")
            return self._send(submitted, [Failed(failure)])
        if events is None:
            return False
        if events:
            self._send(submitted, events)
        return True

    def _send(self, submitted: Submitted, events: list[Event]) -> bool:
        try:
            submitted.deliver(events)
        except Exception:
            # A receiver that fails (its event loop is gone, say) must not take the others down.
            logger.exception("a receiver of %s failed; its job is cancelled", self.name)
            submitted.cancelled = True
        return False


def _length(job: Job) -> int:
    return len(job.prompt) if isinstance(job, GenerateJob) else len(job.token_ids)
