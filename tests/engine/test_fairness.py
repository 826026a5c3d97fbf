"""Whose turn it is where several callers want room, and what is refused because it could not begin in time."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from tests.tiny import tiny_model
from topkapi.engine import scheduler
from topkapi.engine.engine import Engine
from topkapi.engine.request import Caller, Event, Failed, Finished, GenerateJob
from topkapi.engine.sequences import Submitted
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import Overloaded

BEGINNINGS = itertools.count()


def job(caller: Caller | str, tokens: int = 8, prompt: int = 4, **options: Any) -> GenerateJob:
    """A prompt of so many tokens, of which none begins like another, and an answer of so many."""
    begun = options.pop("begun", None)
    parameters = resolve({"max_tokens": tokens, "ignore_end_token": True, "temperature": 0})
    caller = Caller(caller) if isinstance(caller, str) else caller
    first = 1 + next(BEGINNINGS) % 100 if begun is None else begun
    return GenerateJob([first] * prompt, parameters, caller=caller, **options)


class Order:
    """The jobs of an engine of so many slots, and the order in which they ended."""

    def __init__(self, slots: int = 1, **options: Any) -> None:
        self.engine = Engine(tiny_model(), name="tiny", max_running=slots, **options)
        self.ended: list[str] = []
        self.events: dict[str, list[Event]] = {}

    def submit(self, name: str, job: GenerateJob, **options: Any) -> Submitted:
        events = self.events[name] = []

        def deliver(new: list[Event]) -> None:
            events.extend(new)
            if any(isinstance(event, Finished | Failed) for event in new):
                self.ended.append(name)

        return self.engine.submit(job, deliver, **options)

    def run(self) -> list[str]:
        while self.engine.step():
            pass
        return self.ended


def test_one_callers_many_do_not_keep_another_waiting() -> None:
    order = Order()
    for number in range(6):
        order.submit(f"a{number}", job("a"))
    for number in range(2):
        order.submit(f"b{number}", job("b"))
    # In turn, and then what is left of the one who asked for more.
    assert order.run() == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_turns_are_by_tokens_and_not_by_requests() -> None:
    order = Order()
    for number in range(2):
        order.submit(f"long{number}", job("long", tokens=40))
    for number in range(6):
        order.submit(f"short{number}", job("short", tokens=8))
    ended = order.run()
    assert ended.index("long1") >= 5, ended


def test_whoever_was_away_has_no_claim_on_what_others_had_meanwhile() -> None:
    order = Order()
    order.submit("early", job("b"))
    order.run()
    for number in range(4):
        order.submit(f"a{number}", job("a", tokens=30))
    while not order.ended[1:]:
        order.engine.step()
    for number in range(4):
        order.submit(f"b{number}", job("b", tokens=30))
    ended = order.run()[2:]
    assert {each[0] for each in ended[:2]} == {each[0] for each in ended[2:4]} == {"a", "b"}, ended


def test_a_higher_precedence_goes_before_everything_and_pushes_aside() -> None:
    order = Order()
    order.submit("batch", job(Caller("batch", -10), tokens=30, priority=100))
    order.engine.step()
    order.submit("usual", job("usual"))
    order.submit("urgent", job(Caller("urgent", 10)))
    assert order.run() == ["urgent", "usual", "batch"]
    (finished,) = (event for event in order.events["batch"] if isinstance(event, Finished))
    assert finished.reason == "length", "it lost nothing but time"


def test_priorities_are_among_one_callers_own() -> None:
    order = Order()
    for name, caller, priority in (("a0", "a", 0), ("a1", "a", 5), ("b0", "b", 100), ("b1", "b", -100)):
        order.submit(name, job(caller, priority=priority))
    assert order.run() == ["a1", "b0", "a0", "b1"]


def test_answers_are_those_of_an_idle_engine() -> None:
    busy, idle = Order(2), Order(2)
    for number in range(3):
        for caller in (Caller("a"), Caller("b"), Caller("c", 5)):
            busy.submit(f"{caller.name}{number}", job(caller, prompt=3 + number, begun=7, priority=number))
    busy.run()
    idle.submit("alone", job("", prompt=5, begun=7))
    idle.run()
    tokens = [event for event in idle.events["alone"] if not hasattr(event, "timings")]
    for caller in "abc":
        assert [event for event in busy.events[f"{caller}2"] if not hasattr(event, "timings")] == tokens


def test_a_caller_leaves_room_in_the_queue() -> None:
    order = Order(max_queue=9)
    for number in range(6):
        order.submit(f"a{number}", job("a"))
    with pytest.raises(Overloaded, match="6 requests of a are waiting"):
        order.submit("a6", job("a"))
    for number in range(2):
        order.submit(f"b{number}", job("b"))
    with pytest.raises(Overloaded, match="requests of b"):
        order.submit("b2", job("b"))
    order.submit("c", job("c"))
    with pytest.raises(Overloaded, match="the queue is full"):
        order.submit("d", job("d"))
    assert len(order.run()) == 9


def test_without_names_the_whole_queue_is_there_for_everybody() -> None:
    order = Order(max_queue=9)
    for number in range(9):
        order.submit(str(number), job(""))
    with pytest.raises(Overloaded, match="full"):
        order.submit("9", job(""))


def measured(order: Order) -> None:
    """A token read takes 0.1 s, a step that writes 1 s, and answers are as long as they may be."""
    speed = order.engine._steps.speed
    for _ in range(500):
        speed.step(1.0, 0)
        speed.step(1.0, 10)
    speed._used[:] = [100.0, 100.0]


def test_what_could_not_begin_in_time_is_refused_at_once() -> None:
    order = Order(2, max_queue_seconds=30)
    measured(order)
    for number in range(2):
        order.submit(f"running{number}", job("", tokens=20, prompt=5))
    order.submit("third", job("", tokens=20, prompt=5))
    order.submit("fourth", job("", tokens=20, prompt=5))
    # Two of twenty steps before it in each place, and twenty tokens to read.
    with pytest.raises(Overloaded, match=r"about 42 s, which is more than --max-queue-seconds \(30 s\)") as refused:
        order.submit("fifth", job(""))
    assert refused.value.retry_after == 42
    # What has begun with an earlier job goes on; another caller has its turn before, and one with a deadline may not.
    order.submit("later part", job(""), begun=True)
    order.submit("later part, soon", job("", deadline=time.monotonic() + 5), begun=True)
    order.submit("late already", job("", deadline=time.monotonic() - 1))
    order.submit("other", job("other"))
    with pytest.raises(Overloaded, match="more than it was given"):
        order.submit("hasty", job("third", deadline=time.monotonic() + 5))
    order.submit("urgent", job(Caller("urgent", 1), deadline=time.monotonic() + 10))


def test_nothing_is_refused_for_what_answers_might_take_before_one_has_ended() -> None:
    order = Order(2, max_queue_seconds=30)
    measured(order)
    order.engine._steps.speed._used[:] = [0.0, 0.0]
    for number in range(8):
        order.submit(str(number), job("", tokens=50, prompt=5))


def test_what_waited_longer_than_it_may_after_all_is_told_so() -> None:
    order = Order(max_queue_seconds=30)
    order.submit("first", job("", tokens=20))
    order.engine.step()
    for waiting in (order.submit("second", job("")), order.submit("begun", job(""), begun=True)):
        waiting.queued_at -= 31
    order.engine.step()
    (failed,) = order.events["second"]
    assert isinstance(failed, Failed) and isinstance(failed.error, Overloaded) and "waited 31 s" in str(failed.error)
    assert order.run() == ["second", "first", "begun"]


def test_what_waited_too_long_is_told_when_it_would_begin_if_it_came_again() -> None:
    order = Order(max_queue_seconds=30)
    order.submit("running", job("", tokens=20, prompt=5))
    order.engine.step()
    late = [order.submit(f"late{number}", job("", tokens=20, prompt=5)) for number in range(2)]
    order.submit("behind", job("", tokens=10, prompt=5), begun=True)
    order.submit("of another", job("other", tokens=20, prompt=5))
    measured(order)
    for waiting in late:
        waiting.queued_at -= 31
    order.engine.step()
    errors = [order.events[f"late{number}"][-1].error for number in range(2)]
    # Nineteen steps that are left of what runs, those of the one behind and of another's first, and what they read.
    assert [error.retry_after for error in errors] == [19 + 10 + 20 + 1] * 2


def test_what_nobody_wants_counts_for_no_share() -> None:
    order = Order(max_queue=6)
    handles = [order.submit(str(number), job("a")) for number in range(4)]
    for handle in handles:
        handle.cancel()
    for number in range(4):
        order.submit(f"again{number}", job("a"))


def test_shares_are_as_the_threshold_has_them() -> None:
    """However many fill their part, some is left, and all have the same."""
    order = Order(max_queue=99)
    for caller in "abc":
        with pytest.raises(Overloaded):
            for number in range(100):
                order.submit(f"{caller}{number}", job(caller))
    waiting = [each.job.caller.name for each in order.engine._arriving]
    assert waiting.count("a") == round(99 * scheduler.SHARE / (1 + scheduler.SHARE))
    assert waiting.count("b") > waiting.count("c") > 0 and len(waiting) < 99
