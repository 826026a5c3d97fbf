"""What threads hand to an event loop arrives whole and in order, and wakes it once for all that has come meanwhile."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tests.tiny import tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import GenerateJob
from topkapi.model.decoding.parameters import resolve
from topkapi.service.mailbox import Mailbox


def test_a_steps_posts_wake_the_loop_once_and_arrive_in_order(monkeypatch) -> None:
    async def receive() -> tuple[list[int], int]:
        loop, queue, wakes = asyncio.get_running_loop(), asyncio.Queue(), 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return wake(*arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        mailbox = Mailbox.of(loop)
        assert Mailbox.of(loop) is mailbox
        # The loop does nothing meanwhile, as when it waits for the interpreter.
        for number in range(32):
            mailbox.post(queue, (number, [], 0.0))
        assert wakes == 1
        received = [(await queue.get())[0] for _ in range(32)]
        threads = [
            threading.Thread(target=lambda: [mailbox.post(queue, (0, [], 0.0)) for _ in range(500)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in range(2000):
            await asyncio.wait_for(queue.get(), 30)
        for thread in threads:
            thread.join()
        return received, queue.qsize()

    assert asyncio.run(receive()) == (list(range(32)), 0)


def test_what_is_posted_together_wakes_each_loop_once_and_at_the_end() -> None:
    async def receive() -> list[str]:
        loop, queue, told = asyncio.get_running_loop(), asyncio.Queue(), list[str]()
        mailbox, here = Mailbox.of(loop), threading.Barrier(2)
        wake = mailbox._wake
        mailbox._wake = lambda: told.append("woken") or wake()

        def step() -> None:
            with Mailbox.together():
                for _ in range(3):
                    mailbox.post(queue, (0, [], 0.0))
                    told.append("posted")
                # Another thread is not held up by this one.
                here.wait(30)
                here.wait(30)
            told.append("over")
            mailbox.post(queue, (0, [], 0.0))

        thread = threading.Thread(target=step)
        thread.start()
        here.wait(30)
        mailbox.post(queue, (0, [], 0.0))
        here.wait(30)
        thread.join()
        for _ in range(5):
            await asyncio.wait_for(queue.get(), 30)
        return told

    assert asyncio.run(receive()) == ["posted"] * 3 + ["woken", "woken", "over", "woken"]


def test_an_engine_hands_out_a_step_as_a_whole() -> None:
    """Every receiver is called within one `handing_out()` for each step that tells of something."""
    told: list[str] = []

    @contextlib.contextmanager
    def handing_out() -> Iterator[None]:
        told.append("(")
        yield
        told.append(")")

    model = tiny_model("gpt2")
    engine = Engine(model, name="whole", handing_out=handing_out)
    parameters = resolve({"temperature": 0, "max_tokens": 2, "ignore_end_token": True, "seed": 0})
    for _ in range(2):
        engine.submit(GenerateJob([1, 2, 3], parameters), lambda events: told.append("e"))
    while engine.step():
        pass
    assert "".join(told) == "(ee)(ee)"


def test_posts_to_a_closed_loop_are_let_go() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox.of(loop)
    loop.close()
    for _ in range(3):
        mailbox.post(asyncio.Queue(), (0, [], 0.0))
    assert not mailbox._posts
