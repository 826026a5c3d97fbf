"""What dribbles in, idles or comes in numbers is bounded; who reads slowly is left alone; and a server ends in time."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from topkapi.service.app import create_api
from topkapi.service.models import Models
from topkapi.service.requests import Requests
from topkapi.service.server import SMALL_CHUNKS
from topkapi.service.settings import Settings

HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def connection(served: Any) -> Iterator[socket.socket]:
    """A bare connection to the server."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as bare:
        yield bare


def told(bare: socket.socket) -> bytes:
    """Everything that comes until the server closes the connection."""
    parts = []
    while part := bare.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.fixture(scope="module")
def bounded(serve, tiny_checkpoint) -> Iterator[Any]:
    checkpoint = tiny_checkpoint("bounded", context=2048)
    with serve(checkpoint, request_timeout=0.5, idle_timeout=0.5, max_connections=6) as served:
        yield served


def dribble(bare: socket.socket, text: bytes, over: threading.Event) -> None:
    """Send one byte after the other until the connection is closed."""
    for byte in text:
        if over.wait(0.05):
            return
        try:
            bare.sendall(bytes([byte]))
        except OSError:
            return


@pytest.mark.parametrize(
    ("sent", "dribbled"),
    [(b"", HEAD * 20), (HEAD, b"X-Header: " + b"a" * 1000), (HEAD[:10], b"")],
    ids=["a head", "the end of a head", "a part and no more"],
)
def test_a_head_that_dribbles_in_has_its_time(bounded, sent, dribbled) -> None:
    over = threading.Event()
    with connection(bounded) as bare:
        bare.sendall(sent)
        thread = threading.Thread(target=dribble, args=(bare, dribbled, over))
        thread.start()
        answer = told(bare)
        over.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in answer


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_body_that_dribbles_in_is_told_so_in_the_dialect_of_its_route(bounded, path) -> None:
    over = threading.Event()
    with connection(bounded) as bare:
        bare.sendall(HEAD.replace(b"/generate", path.encode()) + b"Content-Length: 1000\r\n\r\n")
        thread = threading.Thread(target=dribble, args=(bare, b" " * 1000, over))
        thread.start()
        answer = told(bare)
        over.set()
        thread.join()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"of the body" in body
    assert ("param" in json.loads(body)["error"]) == (path == "/v1/completions")


def test_who_goes_on_sending_what_was_refused_can_read_why(bounded) -> None:
    with connection(bounded) as bare:
        bare.sendall(HEAD + b"Content-Length: 1000\r\n\r\n ")
        answer = b""
        while not answer.endswith(b"}}"):
            part = bare.recv(65536)
            assert part
            answer += part
        # A connection that is closed while this is on its way is reset, and takes along what was not read yet.
        for _ in range(3):
            bare.sendall(b" ")
            time.sleep(0.05)
        assert told(bare) == b""
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_the_rest_of_a_body_that_was_refused_is_not_waited_for(bounded) -> None:
    over = threading.Event()
    with connection(bounded) as bare:
        bare.sendall(HEAD.replace(b"/generate", b"/nothing") + b"Content-Length: 100000\r\n\r\n")
        thread = threading.Thread(target=dribble, args=(bare, b" " * 1000, over))
        thread.start()
        answer = told(bare)
        over.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 404 ")


def test_idle_connections_are_closed_before_and_after_a_request(bounded) -> None:
    with connection(bounded) as bare:
        assert told(bare) == b""
    with connection(bounded) as bare:
        bare.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert told(bare).startswith(b"HTTP/1.1 200 ")


def test_one_connection_too_many_is_told_so(bounded) -> None:
    # Streams that nobody reads hold their connections for as long as they like.
    body = {"prompt": "a", "stream": True, "max_tokens": 2000, "ignore_end_token": True}
    with ExitStack() as stack:
        for _ in range(6):
            stream = stack.enter_context(httpx.stream("POST", f"{bounded.url}/generate", json=body))
            assert stream.status_code == 200
        refused = httpx.get(f"{bounded.url}/health")
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "too_many_connections"
    end = time.monotonic() + 20
    while httpx.get(f"{bounded.url}/health").status_code != 200:
        assert time.monotonic() < end


def test_who_reads_slowly_gets_everything(bounded) -> None:
    """Far longer than any bound on what comes in."""
    body = {"prompt": "a", "stream": True, "max_tokens": 40, "ignore_end_token": True, "logprobs": 20}
    with httpx.stream("POST", f"{bounded.url}/generate", json=body, timeout=30) as answer:
        slowly = []
        for line in answer.iter_lines():
            slowly.append(line)
            time.sleep(0.01)
    assert sum(line == "event: token" for line in slowly) >= 40 and "event: done" in slowly


def test_a_request_in_pieces_that_come_in_time_is_served(bounded) -> None:
    text = b'{"prompt": "a", "max_tokens": 1}'
    request = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(text) + text
    with connection(bounded) as bare:
        for start in range(0, len(request), 40):
            bare.sendall(request[start : start + 40])
            time.sleep(0.005)
        assert told(bare).startswith(b"HTTP/1.1 200 ")


def test_what_is_open_does_not_keep_a_server_from_ending(serve, tiny_checkpoint, monkeypatch) -> None:
    """Idle connections, a half of a head, a half of a body: what can be answered is, and a stream has its end.

    At once, and not when the time is over that answers under way are given.
    """
    monkeypatch.setattr("topkapi.service.server.GRACE_SECONDS", 600.0)
    with serve(tiny_checkpoint("ending", context=2048)) as served:
        with (
            connection(served) as idle,
            connection(served) as head,
            connection(served) as upload,
            connection(served) as kept,
            connection(served) as stream,
        ):
            head.sendall(HEAD)
            upload.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert kept.recv(12) == b"HTTP/1.1 200"
            body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 2000, "ignore_end_token": True}).encode()
            stream.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200 OK" in stream.recv(20)
            while b"event: token" not in stream.recv(65536):
                pass
            served.stop()
            assert (told(idle), told(head)) == (b"", b"")
            assert b"the server is stopping" in told(upload)
            rest = told(stream)
        assert b"event: done" in rest and b'"finish_reason": "cancelled"' in rest and rest.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(("path", "is_its_own"), [
    ("/v1/messages", lambda body: body["type"] == "error"),
    ("/lab/v1/messages", lambda body: body["type"] == "error"),
    ("/v1/completions", lambda body: "param" in body["error"]),
    ("/lab/generate_stream", lambda body: "error_type" in body),
    ("/generate", lambda body: body["error"]["type"] == "cancelled"),
])  # fmt: skip
def test_while_it_stops_each_dialect_is_told_in_its_own_shape(path, is_its_own) -> None:
    settings = Settings(studio=False, root_path="/lab")
    api = create_api(Models(settings), settings)
    requests = Requests(api, api, settings.root_path)
    requests.stop()

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(requests), base_url="http://localhost") as client:
            return await client.post(path, json={})

    answer = asyncio.run(ask())
    assert answer.status_code in (424, 503) and is_its_own(answer.json()), answer.text
    assert "the server is stopping" in answer.text


CHUNKS = b"0\r\n\r\n"
SMUGGLED = b"DELETE /models/bounded HTTP/1.1\r\nHost: localhost\r\n\r\n"
AMBIGUOUS = {
    "two lengths": b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + CHUNKS,
    "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "another coding": b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "a length with a sign": b"Content-Length: +2\r\n\r\n{}",
    "a blank before the colon": b"Content-Length : 2\r\n\r\n{}",
    "a chunk in another notation": b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n" + CHUNKS,
    "a line end within a value": b"X-A: a\rContent-Length: 9\r\n\r\n",
    "two hosts": b"Host: example.org\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("rest", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_request_whose_end_is_in_doubt_is_refused_and_nothing_after_it_is_read(bounded, rest, caplog) -> None:
    with connection(bounded) as bare:
        bare.sendall(HEAD + rest + SMUGGLED)
        answer = told(bare)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1, answer
    assert bounded.client.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_body_in_very_many_small_chunks_is_no_request(bounded) -> None:
    """Each of them costs the server more than it costs the client."""
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    few, worthwhile = b"1\r\n \r\n" * (SMALL_CHUNKS - 2), b"100\r\n" + b" " * 256 + b"\r\n"
    with connection(bounded) as bare:
        bare.sendall(chunked + few + worthwhile * SMALL_CHUNKS + b"2\r\n{}\r\n" + CHUNKS)
        # The next request may have as many.
        bare.sendall(chunked + few + b"2\r\n{}\r\n" + CHUNKS + b"GET /health HTTP/1.0\r\n\r\n")
        answers = told(bare)
        assert answers.count(b"HTTP/1.1 422 ") == 2 and answers.count(b"HTTP/1.1 200 ") == 1, answers
    with connection(bounded) as bare:
        bare.sendall(chunked + few + b"1\r\n \r\n" * 4 + CHUNKS)
        assert told(bare).startswith(b"HTTP/1.1 400 ")


def test_nonsense_after_an_answer_is_no_error_of_ours(bounded, caplog) -> None:
    with connection(bounded) as bare:
        bare.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = bare.recv(65536)
        while not answer.endswith(b"}}"):
            answer += bare.recv(65536)
        bare.sendall(b"what is no chunk\r\n")
        assert told(bare) == b""
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_who_asks_for_a_web_socket_is_answered_without_and_fills_no_log(bounded, caplog) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    assert bounded.client.get("/health", headers=upgrade | {"Sec-WebSocket-Key": "a" * 24}).status_code == 200
    assert not caplog.records


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(bounded, caplog) -> None:
    def gone() -> float:
        text = bounded.client.get("/metrics").text
        return sum(float(line.split()[1]) for line in text.splitlines() if 'reason="client_gone"' in line)

    before = gone()
    with connection(bounded) as bare:
        bare.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt"')
    end = time.monotonic() + 20
    while gone() == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_one_too_many_that_has_left_already_is_no_error_and_takes_no_place(bounded, caplog) -> None:
    """Reset before it is accepted: its socket can't be shut down any more."""
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(connection(bounded)).sendall(HEAD)
        for _ in range(40):
            bare = stack.enter_context(connection(bounded))
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            bare.close()
    end = time.monotonic() + 20
    while True:
        try:
            if bounded.client.get("/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text
