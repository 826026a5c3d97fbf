"""The engine: every job ends once, none blocks another, and what runs beside a job never changes it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from topkapi.engine import steps
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, Failed, Finished, GenerateJob, Job, ScoreJob, ScoreProgress, Token
from topkapi.engine.steps import DecoderNetwork
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import EngineError, InvalidRequest, Overloaded
from topkapi.model.generation import generate
from topkapi.model.scoring import score


class Receiver:
    """Collects a job's events and knows when the job is over."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()

    def __call__(self, events: list[Event]) -> None:
        assert not self.over.is_set(), "nothing may follow the end of a job"
        self.events += events
        if isinstance(events[-1], Completed | Failed):
            self.over.set()

    def wait(self) -> list[Event]:
        assert self.over.wait(20), "the job never ended"
        return self.events

    def tokens(self, index: int = 0) -> list[int]:
        return [event.token_id for event in self.wait() if isinstance(event, Token) and event.index == index]

    def reasons(self) -> dict[int, str]:
        finished = [event for event in self.wait() if isinstance(event, Finished)]
        assert len({event.index for event in finished}) == len(finished), "a sequence ends once"
        return {event.index: event.reason for event in finished}


@pytest.fixture
def engine():
    engine = Engine(tiny_model(), name="tiny", max_running=4, max_queue=64)
    engine.start()
    yield engine
    engine.close()


def job(prompt: list[int], stop_check: Callable | None = None, deadline: float | None = None, **wanted: Any) -> Job:
    return GenerateJob(prompt, resolve({"seed": 1, **wanted}), stop_check, deadline)


def submit(engine: Engine, job: Job) -> Receiver:
    receiver = Receiver()
    receiver.handle = engine.submit(job, receiver)
    return receiver


def test_jobs_get_the_tokens_they_get_alone(engine: Engine) -> None:
    wanted = [{"seed": s, "max_tokens": 5 + s, "temperature": s / 4, "top_k": s % 3 * 5} for s in range(12)]
    prompts = [[1 + s, 2, 3 + s] * (1 + s) for s in range(12)]
    receivers = [submit(engine, job(p, **w)) for p, w in zip(prompts, wanted, strict=True)]
    scorer = submit(engine, ScoreJob([5, 6, 7, 8] * 30, window=32))
    for prompt, parameters, receiver in zip(prompts, wanted, receivers, strict=True):
        assert receiver.tokens() == generate(engine.model, prompt, parameters).token_ids
    assert scorer.wait()[-1].scores == score(engine.model, [5, 6, 7, 8] * 30, window=32)
    assert isinstance(scorer.events[0], ScoreProgress)
    assert engine.running == engine.waiting == 0


def test_sequences_of_one_job_are_those_of_single_ones(engine: Engine) -> None:
    receiver = submit(engine, job([4, 5, 6], n=4, max_tokens=12, temperature=1.5))
    for index in range(4):
        alone = generate(engine.model, [4, 5, 6], {"seed": 1, "max_tokens": 12, "temperature": 1.5}, sequence=index)
        assert receiver.tokens(index) == alone.token_ids
        assert receiver.reasons()[index] == alone.finish_reason
    assert len({tuple(receiver.tokens(index)) for index in range(4)}) > 1


def test_jobs_take_turns(engine: Engine) -> None:
    order: list[str] = []

    def recorder(name: str, receiver: Receiver) -> Callable[[list[Event]], None]:
        def deliver(events: list[Event]) -> None:
            order.extend(name for event in events if isinstance(event, Token))
            receiver(events)

        return deliver

    receivers = {name: Receiver() for name in "ab"}
    for name, receiver in receivers.items():
        engine.submit(job([1, 2], max_tokens=40, ignore_end_token=True), recorder(name, receiver))
    for receiver in receivers.values():
        receiver.wait()
    both = order[order.index("b") : len(order) - 1 - order[::-1].index("a")]
    assert max(both.count("a"), both.count("b")) - min(both.count("a"), both.count("b")) <= 1


def test_stop_tokens_stop_checks_and_length(engine: Engine) -> None:
    greedy = generate(engine.model, [9, 9], {"temperature": 0, "max_tokens": 10, "ignore_end_token": True}).token_ids
    stop = submit(engine, job([9, 9], temperature=0, stop_token_ids=[greedy[4]], ignore_end_token=True))
    assert stop.tokens() == greedy[: greedy.index(greedy[4]) + 1]
    assert Finished(0, "stop", greedy[4]) in stop.events
    seen: list[int] = []

    def check(token_id: int) -> str | None:
        seen.append(token_id)
        return "enough" if len(seen) == 3 else None

    checked = submit(engine, job([9, 9], lambda index: check, temperature=0, ignore_end_token=True))
    assert checked.tokens() == greedy[:3] == seen
    assert Finished(0, "stop", "enough") in checked.events
    length = submit(engine, job([9, 9], temperature=0, max_tokens=2, ignore_end_token=True))
    assert (length.tokens(), length.reasons()) == (greedy[:2], {0: "length"})
    assert submit(engine, job([9, 9], max_tokens=0)).reasons() == {0: "length"}


def test_cancel_deadline_and_close(engine: Engine) -> None:
    slow = submit(engine, job([1] * 3, max_tokens=60, ignore_end_token=True, n=2))
    slow.handle.cancel()
    assert slow.reasons() == {0: "cancelled", 1: "cancelled"}
    late = submit(engine, job([1] * 3, deadline=time.monotonic() - 1))
    assert late.reasons() == {0: "deadline"}
    last = [submit(engine, job([2] * 3, max_tokens=60, ignore_end_token=True)) for _ in range(8)]
    engine.close()
    assert {receiver.reasons()[0] for receiver in last} <= {"cancelled", "length"}
    with pytest.raises(EngineError, match="unloaded"):
        submit(engine, job([1]))


def test_a_failing_step_fails_only_its_own_job(engine: Engine) -> None:
    def explode(token_id: int) -> None:
        raise MemoryError("no memory")

    bad = submit(engine, job([1, 2], lambda index: explode))
    good = submit(engine, job([1, 2], max_tokens=10))
    failure = bad.wait()[-1]
    assert isinstance(failure, Failed)
    assert "MemoryError" in failure.error.message
    assert good.tokens() == generate(engine.model, [1, 2], {"seed": 1, "max_tokens": 10}).token_ids


def test_a_failed_job_leaves_nothing_for_others_to_start_from() -> None:
    """Logits that are no numbers may come from what is in the cache; the next job reads its prompt itself."""
    model = tiny_model()
    engine = Engine(model, name="tiny", max_running=2)
    run = engine.network.run
    engine.network.run = lambda works: [replace(output, logits=output.logits * float("nan")) for output in run(works)]
    failed, again = Receiver(), Receiver()
    engine.submit(job(list(range(1, 40)), max_tokens=2), failed)
    while engine.step():
        pass
    assert isinstance(failed.wait()[-1], Failed)
    engine.network.run = run
    engine.submit(job(list(range(1, 40)), max_tokens=2), again)
    while engine.step():
        pass
    assert again.wait()[-1].cached_tokens == 0


def test_a_failing_receiver_does_not_stop_the_loop(engine: Engine) -> None:
    def deliver(events: list[Event]) -> None:
        raise RuntimeError("event loop is closed")

    engine.submit(job([1, 2], max_tokens=20), deliver)
    assert submit(engine, job([1, 2], max_tokens=5)).reasons()


def test_who_leaves_the_queue_is_told_so_before_anything_is_computed() -> None:
    engine = Engine(tiny_model(), name="tiny", max_running=1)
    told: list[str] = []
    run = engine.network.run
    engine.network.run = lambda works: told.append("step") or run(works)

    def failing() -> None:
        raise RuntimeError("event loop is closed")

    for name in ("first", "second", "gone"):
        handle = engine.submit(
            job([1, 2], max_tokens=2, ignore_end_token=True), lambda events: None, starting=partial(told.append, name)
        )
    handle.cancel()
    failed = Receiver()
    engine.submit(job([1, 2], max_tokens=2, ignore_end_token=True), failed, starting=failing)
    while engine.step():
        pass
    assert told[:6] == ["first", "step", "step", "second", "step", "step"] and "gone" not in told
    assert failed.reasons() == {0: "cancelled"}


def test_what_does_not_fit_in_the_queue_is_refused_at_once() -> None:
    engine = Engine(tiny_model(), name="tiny", max_queue=2, max_queued_tokens=20)  # not started: nothing drains
    submit(engine, job([1] * 15))
    with pytest.raises(Overloaded) as caught:
        submit(engine, job([1] * 6))
    assert caught.value.retry_after >= 1
    submit(engine, job([1] * 5))
    with pytest.raises(Overloaded):
        submit(engine, job([1]))
    engine.close()


def test_jobs_that_could_never_run_are_refused(engine: Engine) -> None:
    for wrong in (job([]), job([1] * 64), job([500]), ScoreJob([]), ScoreJob([1, 2], window=1)):
        with pytest.raises(InvalidRequest):
            engine.submit(wrong, Receiver())


def test_weights_are_never_trained_by_serving(engine: Engine) -> None:
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    submit(engine, job([1, 2, 3], max_tokens=10)).wait()
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.state_dict().items())


@pytest.mark.parametrize(("said", "expected"), [("4096\n", 4096), ("max\n", None), (None, None)])
def test_memory_is_what_the_container_may_take(said, expected, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    if said is not None:
        limit.write_text(said)
    monkeypatch.setattr(steps, "CGROUP_LIMITS", (str(limit),))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert steps.memory_bytes(torch.device("cpu")) == (expected or machine)


def test_slots_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, key-value heads, head size, float32
    monkeypatch.setattr("topkapi.engine.steps.memory_bytes", lambda device: 2 * token_bytes * 64 * 3)
    assert (DecoderNetwork(model, 32).slots, DecoderNetwork(model, 2).slots) == (3, 2)
    monkeypatch.setattr("topkapi.engine.steps.memory_bytes", lambda device: 2 * token_bytes * 40)
    engine = Engine(model, name="tiny")
    assert (engine.network.slots, engine.network.capacity) == (1, 40)
    with pytest.raises(InvalidRequest, match="context holds 40"):
        engine.submit(job([1] * 50), Receiver())
