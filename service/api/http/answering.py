"""The one way from a request to its answer, whole or by server-sent events, for every dialect and every kind of work.

A dialect says in an `Answer` what it reads and what it tells. When the work starts, what ends it, what becomes of
errors and of clients that leave, how events are written, and that none of it keeps the event loop, is said here alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.model.interruption import given_up_when
from topkapi.service.api.http.dialect import Dialect
from topkapi.service.api.http.errors import INTERNAL, ClientGone
from topkapi.service.api.http.middleware import SILENCE
from topkapi.service.calls import current_call
from topkapi.service.jobs import EngineWork, Step

PIECE = 4096
"""Values that are written at once, in about a millisecond."""

CHUNK = 64 * 1024
"""Characters of events that are made on a thread at once."""

MOMENT = 0.0005
"""Seconds that a step's events may take: more, and the next step's are made on a thread. Going there
and back costs the event loop about half of that."""

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""A proxy that buffers would turn a stream into one late answer."""

Event = tuple[str | None, Any]
"""A server-sent event: its name, if it has one, and its data, JSON or a text that is sent as it is."""

Events = AsyncIterator[Event]
"""In order."""

Chunk = tuple[list[Event], Iterator[Event] | None]
"""Events that have been made, and those after them, if there may be more."""

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
"""`json.dumps` would make an encoder for each event."""

json_string = json.encoder.encode_basestring
"""A text as JSON."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

LARGE = 256 * 1024
"""Bytes of a body above which it takes so long to read that it must not take the threads of small ones."""

_small = ThreadPoolExecutor(max_workers=32, thread_name_prefix="request")
_large = ThreadPoolExecutor(max_workers=2, thread_name_prefix="large-request")


class Answer(ABC, Generic[Step]):
    """One request as its dialect reads it, and what it is answered.

    It is made on a thread, which is where requests are checked, and tells everything on threads as well: either the
    `whole` once the work is done, or `opening`, what is `told` of each step, and `ending`. These raise `TopkapiError`
    for what is no answer.
    """

    dialect: ClassVar[Dialect]

    at_once = False
    """Whether a stream tells of the queue, too; others begin once the engine is at work on them."""

    def __init__(self, work: EngineWork[Step], *, stream: bool | None, before: EngineWork[Any] | None = None) -> None:
        self.work, self.stream, self.before = work, bool(stream), before
        """What the engine does for it; whether it is told by events; what has to be done before anything is told."""

    @abstractmethod
    def whole(self) -> Any:
        """The whole answer. Lists in it may also be iterators."""

    def opening(self) -> Iterable[Event]:
        """The events before there is anything to tell."""
        return ()

    @abstractmethod
    def told(self, step: Step) -> Iterable[Event]:
        """The events of one step."""

    def ending(self) -> Iterable[Event]:
        """The events after the last step."""
        return ()

    def failed(self, error: TopkapiError) -> Event:
        """The last event of a stream that breaks off."""
        return self.dialect.failure(error)

    async def connected(self, request: Request) -> Response:
        """What tells of the work by events, once that is `begun`. Raises what beginning it does."""
        return EventStream(self._written(await self.begun(request)), self.work.cancel)

    async def begun(self, request: Request) -> Events:
        """Start the work: every event of the stream, once it is under way, or a stream may be silent no longer.

        Nothing has been sent by then, so what ends it before, as that it waited too long, has a status: it is raised,
        as are what starting it does and `ClientGone`.
        """
        self.work.start()
        opening = iter(self.opening())
        try:
            # Made meanwhile: what waits for a first token should not wait for this as well.
            opened, under_way = await asyncio.gather(on_thread(partial(_next, opening)), self._under_way(request))
            events = self.events(opened)
            return events if under_way else _one_by_one([event async for event in events])
        except BaseException:
            self.work.cancel()
            raise

    async def _under_way(self, request: Request) -> bool:
        """Whether there may be more to come, once there is something to tell."""
        with suppress(TimeoutError):
            async with asyncio.timeout(request.scope.get(SILENCE)):
                return self.at_once or await unless_disconnected(request, self.work.begun())
        return True

    async def events(self, opened: Chunk | None = None) -> Events:
        """Every event of a stream, its data as text; `opened` is the first chunk of its opening, if that has been made.

        Opening and end may be long; what a step adds hardly ever is.
        """
        made, rest = ([], iter(self.opening())) if opened is None else opened
        for event in made:
            yield event
        async for event in _on_threads(rest):
            yield event
        slow = False
        async for step in self.work.steps():
            if slow:
                events, took = await on_thread(partial(_made, self.told, step, time.thread_time))
            else:
                events, took = _made(self.told, step, time.perf_counter)
            slow = took > MOMENT
            for event in events:
                yield event
        async for event in _on_threads(iter(self.ending())):
            yield event

    async def _written(self, events: Events) -> AsyncIterator[bytes]:
        async for event in to_the_end(events, self.failed, self.work.cancel):
            yield written(event, mark=self.dialect.data_mark)


async def _on_threads(rest: Iterator[Event] | None) -> Events:
    """The events, made on threads, a chunk at a time."""
    while rest is not None:
        made, rest = await on_thread(partial(_next, rest))
        for event in made:
            yield event


async def _one_by_one(events: Iterable[Event]) -> Events:
    for event in events:
        yield event


def _next(events: Iterator[Event]) -> Chunk:
    made: list[Event] = []
    size = 0
    for name, data in events:
        made.append((name, text_of(data)))
        size += len(made[-1][1])
        if size >= CHUNK:
            return made, events
    return made, None


def _made(told: Callable[[Step], Iterable[Event]], step: Step, clock: Callable[[], float]) -> tuple[list[Event], float]:
    """The events of a step, and the seconds that they took.

    A thread beside the event loop may wait for others meanwhile, so that only its processor time tells. Asking for that
    takes 10 µs on a machine whose cores are all at work: too much for each token.
    """
    began = clock()
    events = [(name, text_of(data)) for name, data in told(step)]
    return events, clock() - began


async def respond(
    request: Request, make: Callable[Arguments, Answer[Any]], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Response:
    """The response to a request whose answer `make(*arguments)` is.

    Raises what making it and the work do, unless the response has begun, and `ClientGone` where nobody waits for it.
    """
    answer = await apart(request, make, *arguments, **named)
    if answer.before is not None:
        await _done(request, answer.before)
    if answer.stream:
        return await answer.connected(request)
    await _done(request, answer.work)
    return await answered(answer.whole)


async def _done(request: Request, work: EngineWork[Any]) -> None:
    async with work:
        await unless_disconnected(request, work.finish())


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, `ended` is called: what nobody waits for is over within a step."""

    def __init__(self, chunks: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers=HEADERS)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def to_the_end(events: Events, failed: Callable[[TopkapiError], Event], cancel: Callable[[], None]) -> Events:
    """The events, and where they break off the one that says why: then the response has begun, so no handler can.

    Of several jobs one has failed; `cancel` ends the others.
    """
    try:
        async for event in events:
            yield event
    except TopkapiError as error:
        cancel()
        _note(error)
        yield failed(error)
    except Exception:
        cancel()
        _note(INTERNAL)
        yield failed(INTERNAL)
        raise


def _note(error: TopkapiError) -> None:
    call = current_call()
    if call is not None:
        call.refusal = error.kind


def written(event: Event, identifier: str | None = None, mark: str = "data: ") -> bytes:
    """An event as it is sent. JSON escapes line breaks, so the data is always a single line."""
    name, data = event
    head = (f"id: {identifier}\n" if identifier else "") + (f"event: {name}\n" if name else "")
    return f"{head}{mark}{text_of(data)}\n\n".encode()


def text_of(data: Any) -> str:
    """The data of an event as it is sent."""
    if isinstance(data, str):
        return data
    if weight(data) < PIECE:
        return _encode(data)
    return "".join(pieces(data))


async def answered(made: Callable[[], Any]) -> Response:
    """The answer whose content `made()` gives, both made and written on a thread."""
    return await on_thread(lambda: as_json(made()))


def as_json(content: Any) -> Response:
    """The answer with this content; lists in it may also be iterators.

    It is written in pieces: Python's writer holds the interpreter until it is done, on whatever thread, a second for
    the log-probabilities of some long answers.
    """
    return Response(b"".join(part.encode() for part in pieces(content)), media_type="application/json")


def pieces(value: Any) -> Iterator[str]:
    """The JSON of a value, in pieces of no more than PIECE values."""
    if isinstance(value, Mapping) and weight(value) >= PIECE:
        for number, (name, each) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_dumps(str(name))}:"
            yield from pieces(each)
        yield "}"
    elif isinstance(value, Iterator) or (isinstance(value, list | tuple) and weight(value) >= PIECE):
        yield "["
        begun = False
        for several, entries in _grouped(value):
            if begun:
                yield ","
            begun = True
            if several:
                yield _dumps(entries)[1:-1]
            else:
                yield from pieces(entries)
        yield "]"
    else:
        yield _dumps(value)


def _grouped(entries: Any) -> Iterator[tuple[bool, Any]]:
    """(True, small entries in a row), and (False, each large one by itself)."""
    group: list[Any] = []
    held = 0
    for entry in entries:
        size = weight(entry)
        if group and held + size > PIECE:
            yield True, group
            group, held = [], 0
        if size >= PIECE:
            yield False, entry
        else:
            group.append(entry)
            held += size
    if group:
        yield True, group


_PLAIN = {str, int, float, bool, type(None)}
"""What most values are: looked at first, as asking for a kind of container takes a while."""


def weight(value: Any, most: int = PIECE) -> int:
    """How many values there are in one, counted up to `most`; what an iterator will give is not known."""
    if isinstance(value, Mapping):
        value = value.values()
    elif isinstance(value, Iterator):
        return most
    elif not isinstance(value, list | tuple):
        return 1
    count = len(value)
    if count < most:
        for each in value:
            if type(each) not in _PLAIN and isinstance(each, Mapping | list | tuple | Iterator):
                count += weight(each, most - count)
                if count >= most:
                    break
    return count + 1


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def apart(
    request: Request, work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """`work(*arguments)` on a thread; where the client leaves meanwhile, it ends at its next `between_pieces`.

    Large bodies take turns, two at a time, so that they keep each other waiting and not the small ones. Raises what
    the work raises, and `ClientGone`.
    """
    given_up = threading.Event()

    def run() -> Result:
        with given_up_when(given_up.is_set):
            return work(*arguments, **named)

    threads = _large if len(await request.body()) > LARGE else _small
    working = asyncio.get_running_loop().run_in_executor(threads, contextvars.copy_context().run, run)
    try:
        return await unless_disconnected(request, working)
    finally:
        given_up.set()


async def on_thread(work: Callable[[], Result]) -> Result:
    """`work()` on a thread."""
    return await asyncio.get_running_loop().run_in_executor(_small, contextvars.copy_context().run, work)


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Await `work`, and cancel it as soon as the client has gone. Raises `ClientGone`."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client went away before the answer was ready")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
