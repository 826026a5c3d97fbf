"""Whatever becomes of the engine's thread, every job ends, and the engine begins anew or says that it can't."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.test_engine import Receiver, job, submit
from tests.tiny import tiny_model
from topkapi.engine import engine as engine_module
from topkapi.engine.engine import MOST_CRASHES, Engine
from topkapi.engine.request import Failed, Finished, ScoreJob
from topkapi.engine.watch import RETURN_SECONDS, Watch
from topkapi.model.errors import Cancelled, EngineStopped, Overloaded
from topkapi.model.generation import generate

BREAKAGES = [RuntimeError("out of luck"), SystemExit(3), KeyboardInterrupt(), MemoryError(), GeneratorExit()]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(engine_module, "PAUSE_SECONDS", 0.0)
    engine = Engine(tiny_model(), name="tiny", max_running=2)
    yield engine
    engine.close(10)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException) -> None:
    """Let the method raise `error` when it is next called, and work again after that."""
    whole = getattr(owner, name)

    def broken(*arguments: Any) -> Any:
        monkeypatch.setattr(owner, name, whole)
        raise error

    monkeypatch.setattr(owner, name, broken)


def failure(receiver: Receiver) -> EngineStopped:
    last = receiver.wait()[-1]
    assert isinstance(last, Failed) and isinstance(last.error, EngineStopped)
    return last.error


def assert_as_good_as_new(engine: Engine) -> None:
    wait_for(lambda: engine.healthy)
    alone = generate(engine.model, [1, 2, 3] * 8, {"seed": 1, "max_tokens": 8}).token_ids
    again = submit(engine, job([1, 2, 3] * 8, max_tokens=8))
    assert again.tokens() == alone
    # Nothing is taken from a cache of which nobody knows in what state it was left.
    assert again.wait()[-1].cached_tokens == 0


PLACES = ["add", "drop_done", "_settle", "check_idle", "_end_what_must"]


@pytest.mark.parametrize(
    ("where", "error"),
    [*(("plan", error) for error in BREAKAGES), *zip(PLACES, BREAKAGES, strict=True)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_loop_that_breaks_off_ends_its_jobs_and_begins_anew(engine, monkeypatch, where, error) -> None:
    owner = engine if where.startswith("_") else engine._steps if where == "check_idle" else engine._steps.scheduler
    jobs = [job([1, 2, 3] * 8, max_tokens=3), job([4] * 5, max_tokens=3, n=2), ScoreJob([1, 2, 3, 4])]
    receivers = [submit(engine, each) for each in jobs]
    failing_once(monkeypatch, owner, where, error)
    engine.start()
    if where == "check_idle":
        # The jobs were over by then.
        assert all(not isinstance(receiver.wait()[-1], Failed) for receiver in receivers)
        wait_for(lambda: engine.restarts)
    else:
        for receiver in receivers:
            assert type(error).__name__ in failure(receiver).message
    assert_as_good_as_new(engine)
    assert engine.restarts == 1


def test_one_that_breaks_down_again_and_again_is_dead_and_refuses(engine, monkeypatch) -> None:
    def broken() -> None:
        raise RuntimeError("plan")

    engine.start()
    for crash in range(MOST_CRASHES + 1):
        wait_for(lambda: engine.healthy)
        monkeypatch.setattr(engine._steps.scheduler, "plan", broken)
        assert failure(submit(engine, job([1]))).retry_after, crash
    wait_for(lambda: engine.dead)
    with pytest.raises(EngineStopped, match="broke down"):
        submit(engine, job([1]))
    watch = Watch(lambda: [engine], 10)
    watch.look(0)
    assert watch.lost is not None and not engine.healthy


def test_a_thread_that_ended_unseen_is_noticed(engine, monkeypatch) -> None:
    def nothing(*_: object) -> None:
        raise RuntimeError("not even that")

    monkeypatch.setattr(engine, "_break_down", nothing)
    monkeypatch.setattr(engine._steps.scheduler, "plan", nothing)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    waiting = submit(engine, job([1]))
    engine.start()
    wait_for(lambda: engine.dead)
    watch = Watch(lambda: [engine], 10)
    watch.look(0)
    assert watch.lost is not None and "stopped" in failure(waiting).message


def test_an_accelerators_error_is_no_single_jobs(engine, monkeypatch) -> None:
    receivers = [submit(engine, job([1, 2])), submit(engine, job([3, 4]))]
    failing_once(monkeypatch, engine.network, "run", torch.AcceleratorError("device-side assert"))
    engine.start()
    assert all("device-side assert" in failure(receiver).message for receiver in receivers)
    assert_as_good_as_new(engine)


def test_an_exit_in_the_network_fails_the_job_whose_tokens_it_read(engine, monkeypatch) -> None:
    run = engine.network.run

    def broken(works: Any) -> Any:
        if any(list(work.token_ids) == [9, 9] for work in works):
            raise SystemExit(1)
        return run(works)

    monkeypatch.setattr(engine.network, "run", broken)
    bad, good = submit(engine, job([9, 9])), submit(engine, job([1, 2], max_tokens=5))
    engine.start()
    last = bad.wait()[-1]
    assert isinstance(last, Failed) and "SystemExit" in last.error.message
    assert good.tokens() == generate(engine.model, [1, 2], {"seed": 1, "max_tokens": 5}).token_ids
    assert engine.restarts == 0


def test_a_draft_network_that_breaks_off_costs_nothing_but_guesses(monkeypatch) -> None:
    engine = Engine(tiny_model(), name="tiny", max_running=2, draft=tiny_model())
    assert engine.drafter is not None
    failing_once(monkeypatch, engine.drafter.network, "run", SystemExit(1))
    engine.start()
    alone = generate(engine.model, [1, 2], {"seed": 1, "max_tokens": 12, "ignore_end_token": True}).token_ids
    assert submit(engine, job([1, 2], max_tokens=12, ignore_end_token=True)).tokens() == alone
    assert engine.restarts == 0
    engine.close()


class Hanging:
    """Lets a network hang until `go_on` is set."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        run = engine.network.run

        def hang(works: Any) -> Any:
            self.entered.set()
            assert self.go_on.wait(20)
            return run(works)

        monkeypatch.setattr(engine.network, "run", hang)


def test_a_network_that_hangs_is_noticed_and_what_waits_for_it_ended(engine, monkeypatch) -> None:
    hanging = Hanging(engine, monkeypatch)
    watch = Watch(lambda: [engine], 10)
    engine.start()
    running = submit(engine, job([1, 2, 3] * 8, max_tokens=3))
    assert hanging.entered.wait(20)
    waiting = submit(engine, job([4, 5]))
    watch.look(0.1)
    watch.look(9.8)
    assert engine.healthy and not running.over.is_set()
    watch.look(0.2)
    assert not engine.healthy and watch.lost is None
    assert "more than 10 s" in failure(running).message and "more than 10 s" in failure(waiting).message
    with pytest.raises(EngineStopped, match="more than 10 s"):
        submit(engine, job([1]))
    watch.look(RETURN_SECONDS)
    assert watch.lost is not None
    hanging.go_on.set()
    assert_as_good_as_new(engine)
    watch.look(0.1)
    assert watch.lost is None and engine.restarts == 1


def test_long_waits_and_many_steps_are_no_hang(engine) -> None:
    watch = Watch(lambda: [engine], 10)
    engine.start()
    for _ in range(3):
        submit(engine, job([1, 2], max_tokens=2)).wait()
        wait_for(lambda: not engine.heartbeat.busy)
        watch.look(9)
        watch.look(9)
    assert engine.healthy and engine.restarts == 0


def test_no_limit_means_none(engine, monkeypatch) -> None:
    hanging = Hanging(engine, monkeypatch)
    watch = Watch(lambda: [engine], 0)
    engine.start()
    running = submit(engine, job([1, 2], max_tokens=2))
    assert hanging.entered.wait(20)
    watch.look(0.1)
    watch.look(1e9)
    assert engine.healthy
    hanging.go_on.set()
    assert running.tokens()


def test_an_engine_that_hangs_is_closed_all_the_same(engine, monkeypatch) -> None:
    hanging = Hanging(engine, monkeypatch)
    engine.start()
    running = submit(engine, job([1, 2], max_tokens=3, n=2))
    assert hanging.entered.wait(20)
    engine.close(0, Cancelled("the server is stopping"))
    assert [event for event in running.wait() if isinstance(event, Finished)] == [
        Finished(0, "cancelled"), Finished(1, "cancelled")
    ]  # fmt: skip
    assert engine.cancellation().message == "the server is stopping"
    hanging.go_on.set()
    wait_for(lambda: engine.stopped)


def test_what_nobody_wants_any_more_is_never_read_and_takes_up_no_room() -> None:
    engine = Engine(tiny_model(), name="tiny", max_queue=2)
    gone, late = submit(engine, job([1] * 20)), submit(engine, job([1] * 20, deadline=time.monotonic()))
    gone.handle.cancel()
    wanted = [submit(engine, job([1] * 3, max_tokens=0)) for _ in range(2)]
    with pytest.raises(Overloaded):
        submit(engine, job([1]))
    while engine.step():
        pass
    assert (gone.reasons(), late.reasons()) == ({0: "cancelled"}, {0: "deadline"})
    assert [receiver.reasons() for receiver in wanted] == [{0: "length"}] * 2
    assert engine.counters.read_tokens == 0


def test_a_full_queue_says_how_long_what_it_holds_will_take() -> None:
    engine = Engine(tiny_model(), name="tiny", max_running=2, max_queue=3)

    def refused() -> int:
        with pytest.raises(Overloaded) as caught:
            submit(engine, job([1]))
        return caught.value.retry_after

    for _ in range(3):
        submit(engine, job([1] * 21, max_tokens=30))
    assert refused() == 1, "nothing has been measured yet"
    speed = engine._steps.speed
    for _ in range(50):
        speed.step(2.0, 0)
        speed.step(5.0, 10)
    # 3 x 21 tokens of prompts at 0.5 s each, and 3 x 30 of answers, two at a time, at 2 s.
    assert refused() == pytest.approx(63 * 0.5 + 90 / 2 * 2, abs=1)
    for _ in range(100):
        speed._used[:] = [10.0, 30.0]
    assert refused() == pytest.approx(63 * 0.5 + 30 / 2 * 2, abs=1)
    engine.close()
