"""Streams of server-sent events that outlive their connection for a while, so that a client can go on where it was.

A stream's events are made by a task of its own and kept as the bytes that are sent. Connections read from it: one that
is lost leaves the stream as it is, and another one may ask for everything after the last event it has. When nobody has
read for the grace period, what is still being computed is cancelled and the events are forgotten.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from topkapi.model.errors import InvalidRequest
from topkapi.service.api.http.answering import Answer, Event, Events, EventStream, on_thread, to_the_end, written
from topkapi.service.api.http.describing import STREAM, errors_of
from topkapi.service.api.http.errors import NATIVE
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.native import schemas
from topkapi.service.jobs import EngineWork, Step

logger = logging.getLogger(__name__)

OVERHEAD = 1024
"""Bytes that a stream counts for besides its events."""


class UnknownStream(InvalidRequest):
    """The stream never was, or is not kept any more."""

    status = 404
    kind = "unknown_stream"


class Stream:
    """The events of one answer. Their ids are `{identifier}:{number}`, numbered from 1."""

    def __init__(
        self, streams: Streams, identifier: str, request: bytes, cancel: Callable[[], None], kept: bool
    ) -> None:
        self.identifier, self.request, self.cancel = identifier, request, cancel
        self.over, self.kept = False, kept and streams.grace_s > 0
        """Whether it is at its end, and whether what was sent may be asked for again."""
        self.size = OVERHEAD
        self._streams = streams
        self._events: list[bytes] = []
        self._dropped = 0
        self._readers: list[Reader] = []
        self.grown = asyncio.Event()
        """Another event has come, or the end."""
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        """Events so far."""
        return self._dropped + len(self._events)

    @property
    def read(self) -> bool:
        """Whether a connection reads it."""
        return bool(self._readers)

    def run(self, events: Events) -> None:
        """Collect `events` from now on, in a task. Needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._collect(events))

    def after(self, number: int) -> Reader:
        """A reader of everything after event `number`.

        Raises `InvalidRequest` for a number that no event has had, `UnknownStream` where the next events are gone.
        """
        if number > self.count:
            message = f"the stream {self.identifier} has had {self.count} events, so {number} can't be the last one"
            raise InvalidRequest(message, field="Last-Event-ID", hint="send the id of the last event you received")
        if number < self._dropped:
            message = f"the events up to number {self._dropped} of the stream {self.identifier} are not kept any more"
            raise UnknownStream(message, field="Last-Event-ID", hint="send the request again without Last-Event-ID")
        return Reader(self, number)

    def enter(self, reader: Reader) -> None:
        """A connection begins to read."""
        self._readers.append(reader)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self, reader: Reader) -> None:
        """A connection reads no more. Without any, the grace period begins.

        A stream that has had no event ends at once: nobody knows its name to ask for the rest.
        """
        self._readers.remove(reader)
        if self._readers:
            return
        if not self.kept or not self.count:
            self.expire()
        else:
            self._timer = asyncio.get_running_loop().call_later(self._streams.grace_s, self.expire)

    def expire(self) -> None:
        """End what is still computed and forget the events."""
        if not self.over:
            self.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._streams.forget(self)

    def join(self, first: int) -> bytes:
        """The events after number `first`, as they are sent."""
        return b"".join(self._events[first - self._dropped :])

    def drop_sent(self) -> None:
        """Forget the events that every connection has been sent."""
        number = min((reader.sent for reader in self._readers), default=self.count) - self._dropped
        self._grew(-sum(map(len, self._events[:number])))
        del self._events[:number]
        self._dropped += number

    async def _collect(self, events: Events) -> None:
        try:
            async for event in to_the_end(events, NATIVE.failure, self.cancel):
                self._append(event)
        except Exception as error:
            logger.error("the stream %s failed", self.identifier, exc_info=error)
        finally:
            # What was computed need not be held as long as its events are.
            self.cancel = lambda: None
            self.over = True
            self._wake()

    def _append(self, event: Event) -> None:
        sent = written(event, f"{self.identifier}:{self.count + 1}")
        self._events.append(sent)
        self._wake()
        self._grew(len(sent))

    def _grew(self, size: int) -> None:
        self.size += size
        self._streams.grew(self, size)

    def _wake(self) -> None:
        self.grown.set()
        if not self.over:
            self.grown.clear()


class Reader:
    """One connection's place in a stream: the number of the last event that was sent."""

    def __init__(self, stream: Stream, sent: int) -> None:
        self.stream, self.sent = stream, sent

    async def chunks(self) -> AsyncIterator[bytes]:
        """Everything from its place on, as it comes, until the stream is over."""
        stream = self.stream
        while True:
            if self.sent < stream.count:
                chunk, self.sent = stream.join(self.sent), stream.count
                if not stream.kept:
                    stream.drop_sent()
                yield chunk
            elif stream.over:
                return
            else:
                await stream.grown.wait()


class StreamResponse(EventStream):
    """A connection to a stream. That it ends, in whatever way, is noticed by the stream."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader.chunks(), partial(reader.stream.leave, reader))
        self._reader = reader
        reader.stream.enter(reader)


class Streams:
    """The streams of one application. What they keep takes at most `limit` bytes, besides what is still to be sent."""

    def __init__(self, grace_s: float, limit: int, replica: str = "") -> None:
        self.grace_s, self._limit = grace_s, limit
        self._replica = replica
        self.size = 0
        self._streams: dict[str, Stream] = {}

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams.values())

    def named(self, identifier: str) -> str:
        """The name of the stream of the answer `identifier`: among several processes, it says which one keeps it."""
        return f"{identifier}-{self._replica}" if self._replica else identifier

    def begin(
        self, identifier: str, request: bytes, events: Events, cancel: Callable[[], None], *, kept: bool = True
    ) -> StreamResponse:
        """Answer with `events`, whose work `cancel` ends early. `request` is the body's fingerprint.

        What is not `kept` ends with its connection.
        """
        stream = self._streams[identifier] = Stream(self, identifier, request, cancel, kept)
        self.grew(stream, stream.size)
        stream.run(events)
        return StreamResponse(stream.after(0))

    def get(self, identifier: str) -> Stream:
        """The stream called `identifier`. Raises `UnknownStream`."""
        if identifier in self._streams:
            return self._streams[identifier]
        if self._replica and not identifier.endswith(f"-{self._replica}"):
            gone = "the process that kept it is gone, or it never was: send the request again without Last-Event-ID"
            raise UnknownStream(f"there is no stream {identifier[:80]!r} (any more)", hint=gone)
        kept = f"streams are kept for {self.grace_s:g} s after their connection is lost"
        hint = kept if self.grace_s else "this server keeps no streams: TOPKAPI_STREAM_GRACE is 0"
        raise UnknownStream(f"there is no stream {identifier[:80]!r} (any more)", hint=hint)

    def resume(
        self, last_event_id: str | None, *, identifier: str | None = None, request: bytes | None = None
    ) -> StreamResponse:
        """Go on after the event with that id; without one, from the beginning of the stream `identifier`.

        Raises `InvalidRequest` for what is no event's id, or one of another stream than `identifier` or of another
        `request`, and `UnknownStream` for what is not kept.
        """
        if last_event_id is None:
            assert identifier is not None, "a stream is named, or one of its events is"
            return StreamResponse(self.get(identifier).after(0))
        name, colon, number = last_event_id.rpartition(":")
        if not colon or not number.isascii() or not number.isdecimal() or len(number) > 9:
            message = f"{last_event_id[:80]!r} is no event's id"
            raise InvalidRequest(message, field="Last-Event-ID", hint="send the id of the last event you received")
        if identifier is not None and name != identifier:
            message = f"the event {last_event_id[:80]!r} is not one of the stream {identifier[:80]!r}"
            raise InvalidRequest(message, field="Last-Event-ID", hint=f"get /streams/{name[:80]}")
        stream = self.get(name)
        if request is not None and request != stream.request:
            message = "the body is not the one whose answer this event is part of"
            hint = f"send the same body again, or GET /streams/{name}, which needs none"
            raise InvalidRequest(message, field="Last-Event-ID", hint=hint)
        return StreamResponse(stream.after(int(number)))

    def forget(self, stream: Stream) -> None:
        """Keep a stream no longer."""
        if self._streams.pop(stream.identifier, None) is not None:
            self.size -= stream.size

    def grew(self, stream: Stream, size: int) -> None:
        """A stream takes so many bytes more (or less) than before: keep to the limit.

        What is over goes first, then what nobody reads, then events that have been sent.
        """
        if stream.identifier not in self._streams:
            return
        self.size += size
        if size <= 0 or self.size <= self._limit:
            return
        for other in sorted(self._streams.values(), key=lambda other: (other.read, not other.over)):
            if other.read:
                other.drop_sent()
            elif other is not stream or other.count:
                other.expire()
            if self.size <= self._limit:
                return


class KeptAnswer(Answer[Step]):
    """An answer whose stream outlives its connection, where that is wanted (`resumable`)."""

    dialect = NATIVE

    def __init__(
        self, work: EngineWork[Step], *, stream: bool, streams: Streams, identifier: str, resumable: bool = True
    ) -> None:
        super().__init__(work, stream=stream)
        self.streams, self.identifier, self.resumable = streams, streams.named(identifier), resumable

    async def connected(self, request: Request) -> Response:
        """A stream under the answer's identifier, once the work is `begun`. Raises what beginning it does."""
        same, events = await fingerprint(request), await self.begun(request)
        return self.streams.begin(self.identifier, same, events, self.work.cancel, kept=self.resumable)


async def resumed(streams: Streams, request: Request, stream: bool, last_event_id: str) -> StreamResponse:
    """The answer to the same POST again, with the last event's id. Raises as `Streams.resume` does."""
    if not stream:
        message = "Last-Event-ID goes on with a stream, but the body does not ask for one"
        raise InvalidRequest(message, field="Last-Event-ID", hint="set stream to true, or leave the header out")
    return streams.resume(last_event_id, request=await fingerprint(request))


def add_streams(routes: Routes, streams: Streams) -> None:
    """The routes to go on with a stream and to end it."""
    refused = errors_of(schemas.ErrorBody, more={
        404: "There is no such stream, or not any more",
        422: "The header is not the id of one of its events",
    })  # fmt: skip

    @routes.get(
        "/streams/{id}",
        tags=["text"],
        summary="Go on with a stream after its connection was lost",
        description="The events after the one that the header names; without it, the stream from its beginning.",
        responses={
            **refused,
            200: {"content": STREAM, "description": "The events of the answer, as it would send them"},
        },
        response_class=Response,
    )
    async def read(id: str, last_event_id: schemas.LastEventId = None) -> Response:
        return streams.resume(last_event_id, identifier=id)

    @routes.delete(
        "/streams/{id}",
        tags=["text"],
        summary="End a stream's work now",
        description="What is being computed ends as cancelled within a step; the stream tells its readers so.",
        responses={**refused, 204: {"description": "It ends"}},
        status_code=204,
    )
    async def cancel(id: str) -> Response:
        streams.get(id).cancel()
        return Response(status_code=204)


async def fingerprint(request: Request) -> bytes:
    """What two bodies have in common exactly if they say the same."""
    document = await request.json()

    def made() -> bytes:
        found = hashlib.sha256()
        # Piece by piece: written at once, a large body would hold the interpreter.
        for piece in json.JSONEncoder(sort_keys=True).iterencode(document):
            found.update(piece.encode())
        return found.digest()

    return await on_thread(made)
