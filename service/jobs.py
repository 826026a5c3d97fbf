"""From the engine's thread into asyncio: the events of one request's jobs as an async iterator."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from model.errors import Overloaded
from service.engine.request import Completed, Deliver, Event, Failed, Finished, GenerateJob, Handle, Job, Token
from service.models import LoadedModel

AT_ONCE = 32
"""Jobs of one request that may be in the engine's hands together, so that a long list leaves room for others."""


class JobGroup:
    """The jobs of one request: submitted in order, and cancelled together if the request ends before they do.

    `start` submits the first jobs; `Overloaded` and `InvalidRequest` surface there, before a response has begun. The
    rest follow as earlier ones finish. As an async context manager it starts on entry and, however it is left, what
    is still running is cancelled within a step.
    """

    def __init__(self, model: LoadedModel, jobs: Sequence[Job]) -> None:
        self._model = model
        self._jobs = jobs
        self._handles: dict[int, Handle] = {}
        self._submitted = 0
        self._queue: asyncio.Queue[tuple[int, list[Event], float]] = asyncio.Queue()
        self._started = 0.0
        self.elapsed = 0.0
        """Seconds from `start` to when the engine handed out the event that came last."""
        self._last_token: dict[tuple[int, int], float] = {}

    async def __aenter__(self) -> JobGroup:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def start(self) -> None:
        """Submit the first jobs. Needs a running event loop."""
        self._started = time.monotonic()
        self._submit()

    def cancel(self) -> None:
        """Cancel the jobs that are not over."""
        self._submitted = len(self._jobs)
        for handle in self._handles.values():
            handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(number of the job, event) until every job is over. Raises the error of a job that failed."""
        while self._handles:
            number, events, at = await self._queue.get()
            self.elapsed = at - self._started
            for event in events:
                self._record(number, event)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Completed):
                    del self._handles[number]
                    self._submit()
                yield number, event

    def _submit(self) -> None:
        loop = asyncio.get_running_loop()
        while self._submitted < len(self._jobs) and len(self._handles) < AT_ONCE:
            number = self._submitted
            try:
                handle = self._model.engine.submit(self._jobs[number], self._receiver(number, loop))
            except Overloaded:
                if self._handles:
                    # The queue has no room now; one of this request's own jobs will make some.
                    return
                raise
            self._handles[number] = handle
            self._submitted += 1

    def _receiver(self, number: int, loop: asyncio.AbstractEventLoop) -> Deliver:
        def deliver(events: list[Event]) -> None:
            # Noted here, on the engine's thread: when the event loop gets to it says more about the event loop.
            at = time.monotonic()
            # A closed loop means that the server is going down and nobody is left to read.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._queue.put_nowait, (number, events, at))

        return deliver

    def _record(self, number: int, event: Event) -> None:
        metrics, now = self._model.metrics, self._started + self.elapsed
        if isinstance(event, Token):
            metrics.generated.inc()
            last = self._last_token.get((number, event.index))
            if last is not None:
                metrics.inter_token.observe(now - last)
            elif not self._last_token:
                metrics.first_token.observe(now - self._started)
            self._last_token[number, event.index] = now
        elif isinstance(event, Finished):
            metrics.finished(event.reason)
        elif isinstance(event, Completed):
            job = self._jobs[number]
            metrics.prompt.inc(len(job.prompt if isinstance(job, GenerateJob) else job.token_ids))
            metrics.cached.inc(event.cached_tokens)
            metrics.queue_time.observe(event.timings.queue_s)
            metrics.latency.observe(now - self._started)
        elif isinstance(event, Failed):
            metrics.finished("error")
