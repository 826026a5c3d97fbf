"""From the engine's thread into asyncio: the events of one request's jobs as an async iterator."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

from topkapi.engine.request import Completed, Deliver, Event, Failed, Finished, GenerateJob, Handle, Job, Token
from topkapi.model.errors import Overloaded
from topkapi.service.calls import MOST_PARTS, Part, current_call
from topkapi.service.mailbox import Mailbox, Post
from topkapi.service.models import LoadedModel

AT_ONCE = 32
"""Jobs of one request that may be in the engine's hands together, so that a long list leaves room for others."""

Step = TypeVar("Step")

RETRY_SECONDS = 0.02
"""Between two looks at a queue that is full of other requests."""


class JobGroup:
    """The jobs of one request: submitted in order, and cancelled together if the request ends before they do.

    `start` submits the first jobs; `Overloaded` and `InvalidRequest` surface there, before a response has begun. The
    rest follow as earlier ones finish; a job that `after` maps to another one waits until that is over, so that it can
    start from what the other left in the cache.
    """

    def __init__(self, model: LoadedModel, jobs: Sequence[Job], after: Mapping[int, int] | None = None) -> None:
        self._model = model
        self._call = current_call()
        if self._call is not None and self._call.key is not None:
            caller = self._call.caller
            jobs = [replace(job, caller=caller) for job in jobs]
        if model.use is not None:
            # Which may take reading it: a group is made on a thread that may wait.
            adapter = model.use.live()
            jobs = [replace(job, adapter=adapter) for job in jobs]
        self._jobs = jobs
        self._handles: dict[int, Handle] = {}
        after = after or {}
        self._ready = deque(number for number in range(len(jobs)) if number not in after)
        self._begun = False
        self._followers: dict[int, list[int]] = {}
        for number, leader in after.items():
            self._followers.setdefault(leader, []).append(number)
        self._queue: asyncio.Queue[Post] = asyncio.Queue()
        self._first: Post | None = None
        self._started = 0.0
        self.elapsed = 0.0
        """Seconds from `start` to when the event that came last was, or was handed out by the engine."""
        self._last_token: dict[tuple[int, int], float] = {}
        self._generated: Counter[int] = Counter()

    def start(self, deadline: float | None = None) -> None:
        """Submit the first jobs; a `deadline`, in `time.monotonic()` seconds, is that of all. Needs an event loop.

        The request's own deadline holds as well. Raises `RateLimited` where its key has used what it may.
        """
        self._started = time.monotonic()
        call = self._call
        if call is not None and call.deadline is not None:
            deadline = call.deadline if deadline is None else min(deadline, call.deadline)
        if deadline is not None:
            self._jobs = [replace(job, deadline=deadline) for job in self._jobs]
        if call is not None and call.quota is not None:
            call.quota.begin(sum(map(_read, self._jobs)), self)
        try:
            self._submit()
        except Exception:
            # Where nothing was taken it may be tried again.
            if self._handles:
                self.cancel()
            self._give_back()
            raise
        if call is not None:
            call.model = self._model.name
            call.prompt_tokens += sum(map(_read, self._jobs))

    async def begun(self) -> bool:
        """Wait until the first job has left the queue (true), or before that all are over or one has failed (false).

        What is told of it by then is kept for `events`.
        """
        if not self._handles:
            return False
        if self._first is None:
            self._first = await self._queue.get()
        _, events, _ = self._first
        return not events or not (self.over or any(isinstance(event, Failed) for event in events))

    @property
    def over(self) -> bool:
        """Whether nothing is computed for it any more."""
        return not self._ready and not self._followers and all(handle.over for handle in self._handles.values())

    def cancel(self) -> None:
        """Cancel the jobs that are not over."""
        self._ready.clear()
        self._followers.clear()
        for handle in self._handles.values():
            handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(number of the job, event) until every job is over. Raises the error of a job that failed."""
        while self._handles or self._ready:
            if not self._handles:
                # Others took the room in the queue between two jobs; what has begun is not refused any more.
                await asyncio.sleep(RETRY_SECONDS)
                self._submit()
                continue
            first, self._first = self._first, None
            number, events, at = first or await self._queue.get()
            for event in events:
                chosen = event.at if isinstance(event, Token) else None
                self.elapsed = (at if chosen is None else chosen) - self._started
                self._record(number, event)
                if isinstance(event, Failed):
                    if isinstance(event.error, Overloaded):
                        self._refused()
                    raise event.error
                if isinstance(event, Completed):
                    del self._handles[number]
                    self._ready.extendleft(reversed(self._followers.pop(number, [])))
                    self._submit()
                yield number, event

    def _submit(self) -> None:
        loop = asyncio.get_running_loop()
        while self._ready and len(self._handles) < AT_ONCE:
            number = self._ready[0]
            try:
                # What has begun is not refused for what the rest of it takes.
                deliver = self._receiver(number, loop)
                starting = None if self._begun else partial(deliver, [])
                handle = self._model.engine.submit(self._jobs[number], deliver, begun=self._begun, starting=starting)
            except Overloaded:
                if self._begun:
                    # The queue has no room now; one of this request's own jobs will make some.
                    return
                raise
            self._ready.popleft()
            self._handles[number] = handle
            self._begun = True

    def _receiver(self, number: int, loop: asyncio.AbstractEventLoop) -> Deliver:
        mailbox = Mailbox.of(loop)

        def deliver(events: list[Event]) -> None:
            # Noted here, on the engine's thread: when the event loop gets to it says more about the event loop.
            mailbox.post(self._queue, (number, events, time.monotonic()))

        return deliver

    def _refused(self) -> None:
        """What waited in vain has read nothing."""
        if self._call is not None:
            self._call.prompt_tokens -= sum(map(_read, self._jobs))
        self._give_back()

    def _give_back(self) -> None:
        if self._call is not None and self._call.quota is not None:
            self._call.quota.use("tokens", -sum(map(_read, self._jobs)))

    def _record(self, number: int, event: Event) -> None:
        metrics, now = self._model.metrics, self._started + self.elapsed
        call = self._call
        if isinstance(event, Token):
            metrics.generated.inc()
            self._generated[number] += 1
            if call is not None:
                call.generated_tokens += 1
                if call.quota is not None:
                    call.quota.use("tokens", 1)
                if call.first_token_s is None:
                    call.first_token_s = self.elapsed
            last = self._last_token.get((number, event.index))
            if last is not None:
                metrics.inter_token.observe(now - last)
            elif not self._last_token:
                metrics.first_token.observe(now - self._started)
            self._last_token[number, event.index] = now
        elif isinstance(event, Finished):
            metrics.finished(event.reason).inc()
        elif isinstance(event, Completed):
            job = self._jobs[number]
            if event.timings.prefill_s > 0:  # nothing was read of what was over before it began
                metrics.prompt.inc(_read(job))
            metrics.cached.inc(event.cached_tokens)
            metrics.queue_time.observe(event.timings.queue_s)
            metrics.latency.observe(now - self._started)
            self._measure(number, event, now)
        elif isinstance(event, Failed):
            metrics.finished("error").inc()

    def _measure(self, number: int, event: Completed, now: float) -> None:
        """Take in how long a job took and how much it was, and for whom."""
        metrics, timings, call = self._model.metrics, event.timings, self._call
        read = _read(self._jobs[number])
        generated, self._generated[number] = self._generated[number], 0
        metrics.prefill_time.observe(timings.prefill_s)
        metrics.decode_time.observe(timings.decode_s)
        metrics.prompt_length.observe(read)
        metrics.generation_length.observe(generated)
        if call is not None:
            call.queue_s = max(call.queue_s or 0.0, timings.queue_s)
            if call.trace is not None and len(call.parts) < MOST_PARTS:
                taken = (timings.queue_s, timings.prefill_s, timings.decode_s)
                call.parts.append(Part(now, *taken, read, event.cached_tokens, generated))
            if call.key is not None:
                metrics.used(call.key.name, "prompt", read)
                metrics.used(call.key.name, "generation", generated)


def _read(job: Job) -> int:
    return len(job.prompt) if isinstance(job, GenerateJob) else len(job.token_ids)


class EngineWork(ABC, Generic[Step]):
    """What a request has the engine do, as a group of jobs.

    An async context manager: it starts on entry and, however it is left, what is still running is cancelled.
    """

    _group: JobGroup

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    @abstractmethod
    def steps(self) -> AsyncIterator[Step]:
        """What each step brings, until all is done. Raises the error of a failed one."""

    async def finish(self) -> None:
        """Run to the end."""
        async for _ in self.steps():
            pass

    def start(self) -> None:
        """Submit the first jobs. Raises `Overloaded` when the queue is full. Needs a running event loop."""
        self._group.start()

    async def begun(self) -> bool:
        """Wait until the engine is at work on it (true), or until it has ended before that (false): then `steps` give
        what there is, or raise the error, at once."""
        return await self._group.begun()

    def cancel(self) -> None:
        """End what is running within a step; what is generated by then stays, finished as cancelled."""
        self._group.cancel()
