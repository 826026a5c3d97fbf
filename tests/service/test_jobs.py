"""What threads hand to an event loop arrives whole and in order, and wakes it once for all that has come meanwhile."""

import asyncio
import threading
from typing import Any

from topkapi.service.jobs import Mailbox


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


def test_posts_to_a_closed_loop_are_let_go() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox.of(loop)
    loop.close()
    for _ in range(3):
        mailbox.post(asyncio.Queue(), (0, [], 0.0))
    assert not mailbox._posts
