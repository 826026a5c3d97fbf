"""The one way from a request to its answer: off the event loop, told to its end, and cancelled when nobody waits."""

import ast
import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import Request

from tests.conftest import ROOT
from topkapi.model.errors import EngineError
from topkapi.service.api.http.answering import CHUNK, MOMENT, PIECE, Answer, Event, EventStream, to_the_end, written
from topkapi.service.api.http.errors import NATIVE
from topkapi.service.jobs import EngineWork


class Counting(EngineWork[int]):
    """EngineWork of so many steps, which may fail at its end."""

    def __init__(self, steps: int, error: Exception | None = None) -> None:
        self.count, self.error = steps, error
        self.cancelled = 0

    async def steps(self) -> AsyncIterator[int]:
        for number in range(self.count):
            yield number
        if self.error is not None:
            raise self.error

    def start(self) -> None:
        pass

    async def begun(self) -> bool:
        return True

    def cancel(self) -> None:
        self.cancelled += 1


class Told(Answer[int]):
    """Notes on which thread each part was told. What is told of the steps in `slow` takes long."""

    dialect = NATIVE

    def __init__(self, work: Counting, slow: tuple[int, ...] = (), opening: int = 1, size: int = 1) -> None:
        super().__init__(work, stream=True)
        self.slow, self.count, self.size = slow, opening, size
        self.threads: dict[object, threading.Thread] = {}
        self.opened = 0

    def whole(self) -> object:
        raise NotImplementedError

    def opening(self) -> Iterator[Event]:
        self.threads["opening"] = threading.current_thread()
        for number in range(self.count):
            self.opened += 1
            yield "open", list(range(self.size)) if self.size > 1 else number

    def told(self, step: int) -> Iterator[Event]:
        self.threads[step] = threading.current_thread()
        until = time.thread_time() + 4 * MOMENT * (step in self.slow)
        while time.thread_time() < until:
            pass
        yield "step", step

    def ending(self) -> Iterator[Event]:
        self.threads["ending"] = threading.current_thread()
        yield None, "[DONE]"


async def collected(answer: Answer) -> list[Event]:
    return [event async for event in answer.events()]


def test_long_parts_are_told_on_threads_and_steps_after_a_slow_one() -> None:
    answer = Told(Counting(5), slow=(1, 2))
    events = asyncio.run(collected(answer))
    assert events == [("open", "0"), *(("step", str(number)) for number in range(5)), (None, "[DONE]")]
    own = threading.current_thread()
    assert own not in (answer.threads["opening"], answer.threads["ending"], answer.threads[2], answer.threads[3])
    assert answer.threads[0] is own


def test_a_long_opening_is_not_made_before_it_is_sent() -> None:
    answer = Told(Counting(0), opening=10, size=CHUNK)

    async def first() -> None:
        async for _ in answer.events():
            assert answer.opened == 1
            return

    asyncio.run(first())


@pytest.mark.parametrize("error,raised", [(EngineError("broke"), False), (ZeroDivisionError("secret"), True)])
def test_what_breaks_off_says_so_last_and_ends_the_rest(error: Exception, raised: bool) -> None:
    work = Counting(2, error)
    answer, seen = Told(work), []

    async def play() -> None:
        async for event in to_the_end(answer.events(), answer.failed, work.cancel):
            seen.append(event)

    if raised:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(play())
    else:
        asyncio.run(play())
    assert [name for name, _ in seen] == ["open", "step", "step", "error"] and work.cancelled == 1
    assert "secret" not in str(seen[-1])


def test_a_stream_whose_client_leaves_ends_its_work() -> None:
    work = Counting(10**6)
    sent: list[bytes] = []

    async def gone() -> dict:
        while len(sent) < 5:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message.get("body", b""))
        await asyncio.sleep(0)

    async def play() -> None:
        response = await Told(work).connected(Request({"type": "http"}, gone))
        assert isinstance(response, EventStream)
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send)

    asyncio.run(play())
    assert work.cancelled == 1 and 5 <= len(sent) < 100


@pytest.mark.parametrize(
    "event,identifier,mark,expected",
    [
        (("a", {"b": "ü\n"}), "s:1", "data: ", 'id: s:1\nevent: a\ndata: {"b": "ü\\n"}\n\n'),
        ((None, "[DONE]"), None, "data: ", "data: [DONE]\n\n"),
        ((None, [1, None]), None, "data:", "data:[1, null]\n\n"),
    ],
)
def test_how_an_event_is_sent(event: Event, identifier: str | None, mark: str, expected: str) -> None:
    assert written(event, identifier, mark) == expected.encode()


def test_a_large_event_is_written_in_pieces_as_the_same_json() -> None:
    sent = written((None, {"n": list(range(2 * PIECE))}))
    assert sent == b'data: {"n":[' + ",".join(map(str, range(2 * PIECE))).encode() + b"]}\n\n"


def test_no_dialect_has_a_way_of_its_own() -> None:
    """Work is started, streams are opened and errors in mid-stream are caught in one place; elsewhere it is a copy."""
    own = {"http/answering.py", "native/streams.py"}

    def calls(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ExceptHandler)
                and node.type is not None
                and "TopkapiError" in ast.unparse(node.type)
            ):
                yield "catches TopkapiError"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "steps":
                yield "follows the steps of work itself"
            elif isinstance(node, ast.Name) and node.id == "StreamingResponse":
                yield "opens a stream itself"

    api = ROOT / "service" / "api"
    files = {path.relative_to(api).as_posix(): ast.parse(path.read_text()) for path in api.rglob("*.py")}
    assert {name: list(calls(tree)) for name, tree in files.items() if name not in own and list(calls(tree))} == {}
    catching = [name for name, tree in files.items() if "catches TopkapiError" in list(calls(tree))]
    assert catching == ["http/answering.py"]
