"""How long a wait is foretold to be, beside how long it is: on a clock that only the network moves."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from tests.engine.test_fairness import Order, job
from tests.tiny import run_by
from topkapi.engine.scheduler import FORGETTING, Speed
from topkapi.model.errors import Overloaded

STEP_SECONDS, TOKEN_SECONDS = 0.2, 0.002


class Clock:
    """Time that goes on by what a pass of the network takes, and by nothing else."""

    def __init__(self, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slowness = 1000.0, 1.0
        run = order.engine.network.run

        def slow(works: Any) -> Any:
            self.now += self.slowness * (STEP_SECONDS + TOKEN_SECONDS * sum(len(work.token_ids) for work in works))
            return run(works)

        run_by(monkeypatch, order.engine.network, slow)
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)


def soak(order: Order, clock: Clock, arrivals: int, per_second: float) -> tuple[list[float], list[float]]:
    """Told of the refused, divided by when the next that is let in begins; and how long those that are let in wait.

    As many requests arrive as are said, at random; one in ten goes away before long.
    """
    drawn = random.Random(2)
    due, told, submitted = clock.now, [], []
    while arrivals or order.engine._jobs or order.engine._arriving:
        while arrivals and due <= clock.now:
            arrivals -= 1
            due += drawn.expovariate(per_second)
            asked = job("", tokens=drawn.randrange(2, 14), prompt=drawn.randrange(2, 40))
            try:
                submitted.append((clock.now, order.submit(str(arrivals), asked)))
                submitted[-1][1].queued_at = clock.now
            except Overloaded as refusal:
                told.append((clock.now, refusal.retry_after, len(submitted)))
        if submitted and drawn.random() < 0.05:
            drawn.choice(submitted[-20:])[1].cancel()
        if not order.engine.step():
            clock.now = max(clock.now, due) if arrivals else clock.now
    begun = [(each.started_at, at) for at, each in submitted]
    ratios = []
    for at, seconds, place in told:
        start = next((start for start, _ in begun[place:] if start is not None), None)
        if start is not None:
            ratios.append(seconds / max(1.0, start - at))
    return ratios, [start - at for start, at in begun if start is not None]


@pytest.mark.parametrize("slower", [2.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_what_is_told_is_true_and_nobody_waits_longer_than_allowed(monkeypatch, slower) -> None:
    order = Order(12, max_queue_seconds=10)
    clock = Clock(order, monkeypatch)
    soak(order, clock, 60, 2.0)
    # Twelve places, seven and a half tokens on average: one and a half times what can be done, nearly every step of
    # which reads a prompt, on a machine that may have become slower.
    clock.slowness = slower
    capacity = 12 / (7.5 * (STEP_SECONDS + 40 * TOKEN_SECONDS)) / slower
    ratios, waits = soak(order, clock, 400, 1.5 * capacity)
    assert len(ratios) > 20
    right = sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios)
    assert right > 0.97, (right, sorted(ratios)[:: max(1, len(ratios) // 20)])
    assert max(waits) <= 10 + 1, max(waits)
    # And nobody is refused in vain: those that are let in wait about as long as they may.
    assert sorted(waits)[len(waits) // 2] > 4


def test_a_step_that_reads_and_generates_counts_once() -> None:
    order = Order(2)
    order.submit("running", job("", tokens=20, prompt=11))
    speed, jobs = Speed(), order.engine._arriving
    for _ in range(500):
        speed.step(1.0, 0)
        speed.step(2.0, 10, generated=True)
    speed._used[:] = [100.0, 100.0]
    assert speed.wait(jobs, 1) == pytest.approx(11 * 0.1 + 20 * 1.0)


def test_waits_teach_how_right_foretelling_is() -> None:
    speed = Speed()
    assert speed.corrected(10.0) == 10.0
    for _ in range(round(5 / (1 - FORGETTING))):
        speed.began(10.0, 7.0)
        # Too short to tell.
        speed.began(0.1, 50.0)
        speed.began(None, 50.0)
    assert speed.corrected(10.0) == pytest.approx(7.0)
    for _ in range(round(9 / (1 - FORGETTING))):
        speed.began(1.0, 100.0)
    assert speed.corrected(10.0) == 40.0
