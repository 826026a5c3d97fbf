"""A stream survives its connection: cut anywhere and resumed, it is the same bytes; left alone, it ends in time."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topkapi.model.errors import InvalidRequest
from topkapi.service.api.native.streams import OVERHEAD, Events, Streams, UnknownStream

BODY = {"prompt": "Names are", "n": 2, "max_tokens": 12, "seed": 5, "logprobs": 1, "top_k": 40, "stream": True}
SLOW = {"prompt": "a", "ignore_end_token": True, "temperature": 0, "stream": True}
"""As many tokens as the context has room for: longer than any test waits."""


@pytest.fixture(scope="module")
def kept(serve, tiny_checkpoint) -> Iterator:
    """A server that keeps streams for longer than a test takes."""
    with serve(tiny_checkpoint("kept", context=2048), stream_grace=30) as served:
        yield served


CONNECTIONS: list[http.client.HTTPConnection] = []


@pytest.fixture(autouse=True)
def closed_afterwards() -> Iterator[None]:
    yield
    while CONNECTIONS:
        CONNECTIONS.pop().close()


def ask(served, method: str, path: str, body: dict | None = None, last: str | None = None) -> http.client.HTTPResponse:
    """A request on a connection of its own, which lives as long as the response."""
    headers = {"Content-Type": "application/json"} | ({} if last is None else {"Last-Event-ID": last})
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    connection.auto_open = 0
    CONNECTIONS.append(connection)
    response = connection.getresponse()
    response.socket = connection.sock
    return response


def cut(response: http.client.HTTPResponse) -> None:
    """Close the connection as a cable pulled out would: with a reset, whatever is still under way."""
    if response.socket is not None:
        response.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        response.socket.close()
    response.close()


def complete(received: bytes) -> bytes:
    """What a client keeps of a cut stream: whole events."""
    return received[: received.rfind(b"\n\n") + 2] if b"\n\n" in received else b""


def last_id(received: bytes) -> str:
    return re.findall(rb"^id: (.*)$", received, re.MULTILINE)[-1].decode()


def contents(stream: bytes) -> list[tuple[str, dict]]:
    """The events, without what differs from run to run."""
    events = []
    for event in stream.decode().removesuffix("\n\n").split("\n\n"):
        identifier, name, data = event.split("\n")
        assert re.fullmatch(r"id: \S+:\d+", identifier)
        parsed = json.loads(data.removeprefix("data: "))
        for changing in ("id", "created", "timings", "usage"):
            parsed.pop(changing, None)
        events.append((name.removeprefix("event: "), parsed))
    return events


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6000), min_size=1, max_size=8),
    by_post=st.booleans(),
)
def test_cut_anywhere_and_resumed_it_is_the_same_bytes(kept, sizes, by_post) -> None:
    received = b""
    for size in [*sizes, None]:
        last = last_id(received) if received else None
        if last is None or by_post:
            response = ask(kept, "POST", "/generate", BODY, last)
        else:
            response = ask(kept, "GET", f"/streams/{last.partition(':')[0]}", last=last)
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        received += response.read() if size is None else complete(response.read(size))
        cut(response)
    whole = ask(kept, "GET", f"/streams/{last_id(received).partition(':')[0]}").read()
    assert received == whole
    numbers = [int(number) for number in re.findall(rb"^id: \S+:(\d+)$", whole, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    *tokens, (last_name, done) = contents(whole)
    assert last_name == "done" and {name for name, _ in tokens} == {"token"}
    assert contents(whole) == contents(ask(kept, "POST", "/generate", BODY).read())
    assert [o["finish_reason"] for o in done["outputs"]] == ["length", "length"]


def test_two_connections_may_read_one_stream(kept) -> None:
    first = ask(kept, "POST", "/generate", SLOW | {"max_tokens": 200})
    begin = first.read(3000)
    second = ask(kept, "GET", f"/streams/{last_id(complete(begin)).partition(':')[0]}")
    assert begin + first.read() == second.read()


def dropped(served) -> str:
    """The last event's id of a long stream whose connection was cut after a few events."""
    response = ask(served, "POST", "/generate", SLOW)
    received = complete(response.read(2000))
    assert served.running == 1
    cut(response)
    return last_id(received)


def test_a_dropped_stream_goes_on_for_the_grace_period_and_is_then_cancelled(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("graceful", context=131072), stream_grace=2.0) as served:
        last = dropped(served)
        again = ask(served, "GET", f"/streams/{last.partition(':')[0]}", last=last)
        assert again.read(500)
        other = ask(served, "POST", "/generate", SLOW)
        complete(other.read(2000))
        assert served.running == 2
        cut(other)
        end = time.monotonic() + 60
        while served.running == 2:
            assert time.monotonic() < end, "a stream without a reader is cancelled"
            time.sleep(0.02)
        assert again.read(500), "a reader stopped the clock of the one that was dropped before"
        assert served.running == 1
        cut(again)
        served.wait_until_idle()
        response = ask(served, "GET", f"/streams/{last.partition(':')[0]}", last=last)
        assert response.status == 404 and json.load(response)["error"]["type"] == "unknown_stream"


def test_without_grace_a_client_that_leaves_frees_the_engine_at_once(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("hasty", context=131072), stream_grace=0) as served:
        last = dropped(served)
        served.wait_until_idle(5.0)
        response = ask(served, "POST", "/generate", SLOW, last)
        assert response.status == 404 and "TOPKAPI_STREAM_GRACE is 0" in json.load(response)["error"]["hint"]


def test_a_stream_can_be_ended_without_waiting(kept) -> None:
    reading = ask(kept, "POST", "/generate", SLOW)
    begin = reading.read(1000)
    identifier = last_id(complete(begin)).partition(":")[0]
    assert ask(kept, "DELETE", f"/streams/{identifier}").status == 204
    kept.wait_until_idle(5.0)
    _, done = contents(begin + reading.read())[-1]
    assert done["outputs"][0]["finish_reason"] == "cancelled"
    assert ask(kept, "DELETE", "/streams/gen-0").status == 404


def test_of_many_prompts_those_not_begun_are_cancelled_too(kept) -> None:
    reading = ask(kept, "POST", "/generate", SLOW | {"prompt": ["a"] * 80})
    begin = reading.read(1000)
    ask(kept, "DELETE", f"/streams/{last_id(complete(begin)).partition(':')[0]}").read()
    _, done = contents(begin + reading.read())[-1]
    assert [output["finish_reason"] for output in done["outputs"]] == ["cancelled"] * 80
    kept.wait_until_idle(5.0)


def refused(response: http.client.HTTPResponse, status: int) -> dict:
    assert response.status == status
    return json.load(response)["error"]


def test_what_is_no_place_in_a_stream_is_refused_by_name(kept) -> None:
    whole = ask(kept, "POST", "/generate", BODY).read()
    last = last_id(whole)
    name, _, count = last.partition(":")
    for wrong in ("", "7", "gen-1:", "gen-1:x", f"{name}:-1", f"{name}:{10**9}"):
        error = refused(ask(kept, "POST", "/generate", BODY, wrong), 422)
        assert error["field"] == "Last-Event-ID" and "no event's id" in error["message"]
    assert (
        f"has had {count} events" in refused(ask(kept, "GET", f"/streams/{name}", last=f"{name}:999"), 422)["message"]
    )
    assert "not one of the stream" in refused(ask(kept, "GET", "/streams/gen-2", last=last), 422)["message"]
    assert refused(ask(kept, "POST", "/generate", BODY, "gen-2:1"), 404)["type"] == "unknown_stream"
    other = BODY | {"seed": 6}
    assert "the body is not the one" in refused(ask(kept, "POST", "/generate", other, last), 422)["message"]
    unstreamed = BODY | {"stream": False}
    assert "does not ask for one" in refused(ask(kept, "POST", "/generate", unstreamed, last), 422)["message"]
    assert ask(kept, "POST", "/generate", dict(reversed(BODY.items())), last).read() == b"", "nothing is left to send"


async def counted(events: int, size: int = 1000, pause: float = 0.0) -> Events:
    for number in range(events):
        yield "token", {"text": "x" * size, "number": number}
        await asyncio.sleep(pause)


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def test_what_is_kept_is_bounded() -> None:
    """Finished streams go first, the oldest before the newest, then unread ones; a read one keeps what is unsent."""

    async def play() -> None:
        cancelled: list[str] = []
        streams = Streams(grace_s=60, limit=40_000)

        def begin(name: str, events: Events) -> Callable[[], None]:
            response = streams.begin(name, b"", events, lambda: cancelled.append(name))
            reader = response._reader
            return lambda: reader.stream.leave(reader)

        for name in ("a", "b"):
            leave = begin(name, counted(10))
            await settle()
            leave()
        leave = begin("unread", counted(10**6, pause=1e9))
        await settle()
        leave()
        begin("read", counted(20))
        await settle()
        kept = [name for name in ("a", "b", "unread", "read") if _known(streams, name)]
        assert kept == ["b", "unread", "read"] and not cancelled
        begin("more", counted(25))
        await settle()
        assert cancelled == ["unread"] and not _known(streams, "b")
        assert streams.size > 40_000, "what readers have not been sent is kept beyond the limit"
        assert sum(stream.size for stream in streams) == streams.size

    asyncio.run(play())


def _known(streams: Streams, name: str) -> bool:
    try:
        streams.get(name)
    except UnknownStream:
        return False
    return True


def test_events_that_were_sent_are_dropped_for_room_and_then_refused() -> None:
    async def play() -> None:
        streams = Streams(grace_s=60, limit=OVERHEAD + 5_000)
        response = streams.begin("s", b"", counted(50, pause=0.001), lambda: None)
        sent = b"".join([chunk async for chunk in response.body_iterator])
        assert len(contents(sent)) == 50 and streams.size <= OVERHEAD + 5_000
        with pytest.raises(UnknownStream, match="not kept any more"):
            streams.resume("s:3")
        assert b"".join([chunk async for chunk in streams.resume("s:49").body_iterator]) == sent[sent.rindex(b"id: ") :]
        with pytest.raises(InvalidRequest, match="has had 50 events"):
            streams.resume("s:51")

    asyncio.run(play())


def test_a_failing_stream_says_so_and_is_resumable_too() -> None:
    async def broken() -> Events:
        yield "token", {}
        raise ZeroDivisionError

    async def play() -> None:
        streams = Streams(grace_s=60, limit=10_000)
        response = streams.begin("s", b"", broken(), lambda: None)
        sent = b"".join([chunk async for chunk in response.body_iterator])
        assert [name for name, _ in contents(sent)] == ["token", "error"] and b"division" not in sent
        again = b"".join([chunk async for chunk in streams.resume("s:1").body_iterator])
        assert again == sent[sent.rindex(b"id: ") :]

    asyncio.run(play())


def test_a_stream_that_will_not_be_resumed_ends_with_its_connection(kept) -> None:
    for path, body in (
        ("/generate", SLOW | {"resumable": False}),
        ("/score", {"text": "word " * 60_000, "stream": True, "resumable": False}),
    ):
        response = ask(kept, "POST", path, body)
        received = response.read1(4096)
        assert kept.running == 1
        cut(response)
        # Far less than the thirty seconds that a stream is kept here.
        kept.wait_until_idle(5.0)
        stream = re.search(rb"^id: (\S+):\d+$", received, re.MULTILINE)[1].decode()
        assert ask(kept, "GET", f"/streams/{stream}").status == 404


def test_a_prompt_tells_how_it_stands(kept) -> None:
    prompt = "word " * 1000
    events = contents(
        ask(kept, "POST", "/generate", SLOW | {"prompt": prompt, "max_tokens": 3, "progress": True}).read()
    )
    told = [data for name, data in events if name == "progress"]
    total = kept.answer("/tokenize", text=prompt)["count"]
    assert told[0] == {"state": "queued", "prompt_index": 0, "read": 0, "total": total, "others": 0}
    reading = [each["read"] for each in told[1:]]
    assert reading and reading == sorted(set(reading)) and reading[-1] < total
    assert {each["state"] for each in told[1:]} == {"reading"}
    names = [name for name, _ in events]
    assert names == ["progress"] * len(told) + ["token"] * 3 + ["done"]


@pytest.mark.one_process("of several replicas, another one is asked than the one that computes already")
def test_who_comes_second_is_told_who_was_there_before(kept) -> None:
    first = ask(kept, "POST", "/generate", SLOW)
    first.read1(1024)
    second = ask(kept, "POST", "/generate", SLOW | {"max_tokens": 1, "progress": True})
    assert contents(second.read())[0][1]["others"] == 1
    cut(first)


def test_progress_is_of_streams(kept) -> None:
    refused = kept.post("/generate", prompt="a", progress=True)
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "progress"
