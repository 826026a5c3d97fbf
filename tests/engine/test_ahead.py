"""Steps that go on in the core before anybody is told of their tokens: the same tokens, ends and counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.tiny import tiny_model
from topkapi.engine import steps
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, Failed, Finished, GenerateJob, Job, Token
from topkapi.model import native
from topkapi.model.decoding.parameters import resolve

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native core was not built: there was no compiler")

REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "ignore_end_token": True, "max_tokens": 33},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 7, "min_p": 0.01, "max_tokens": 1},
    {"top_k": 20, "stop_token_ids": list(range(40, 90))},
    {"n": 3, "temperature": 1.0},
    {"n": 3, "temperature": 0},
]


def made(model: Any = None, **options: Any) -> Engine:
    if model is None:
        model = tiny_model("llama")
        native.hold(model, "float32")
    return Engine(model, name="tiny", max_running=4, **options)


def job(prompt: list[int], wanted: dict[str, Any], stop_check: Callable[[int], Any] | None = None) -> Job:
    return GenerateJob(prompt, resolve({"seed": 5, "max_tokens": 60, **wanted}), stop_check)


def finished(engine: Engine, jobs: Sequence[Job]) -> list[list[Event]]:
    """The events of each job."""
    found: list[list[Event]] = [[] for _ in jobs]
    for each, events in zip(jobs, found, strict=True):
        engine.submit(each, events.extend)
    while engine.step():
        pass
    for events in found:
        assert isinstance(events[-1], Completed)
    return [[event for event in events if isinstance(event, Token | Finished)] for events in found]


@pytest.fixture(autouse=True)
def plenty_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "AHEAD_SECONDS", 5.0)


def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.DecoderNetwork, "steps", lambda *_: [])


@pytest.mark.parametrize("wanted", REQUESTS, ids=str)
def test_tokens_and_ends_are_those_of_single_steps(wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    (ahead,), counted = finished(engine, [job([3, 1, 4], wanted)]), engine.counters
    one_at_a_time(monkeypatch)
    single = made(engine.model)
    assert finished(single, [job([3, 1, 4], wanted)]) == [ahead]
    assert counted.generated_tokens == single.counters.generated_tokens
    assert counted.read_tokens == single.counters.read_tokens


def test_beside_one_another_and_with_what_has_to_be_told_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [{"repetition_penalty": 1.3}, {"logprobs": 2}, {"min_tokens": 9}, {"prompt_lookup": 4}, {"num_beams": 2}]
    jobs = [job([7, at, 2], wanted) for at, wanted in enumerate([*REQUESTS, *others, *REQUESTS])]
    engine = made()
    ahead = finished(engine, jobs)
    one_at_a_time(monkeypatch)
    assert finished(made(engine.model), jobs) == ahead


def test_what_a_stop_check_ends_has_no_tokens_after_it() -> None:
    def third(index: int) -> Callable[[int], str | None]:
        seen: list[int] = []

        def check(token_id: int) -> str | None:
            seen.append(token_id)
            return "enough" if len(seen) == 3 else None

        return check

    engine = made()
    greedy = {"temperature": 0, "ignore_end_token": True}
    every, stopped = finished(engine, [job([1, 2], greedy), job([1, 2], greedy, third)])
    assert stopped == [*every[:3], Finished(0, "stop", "enough")]
    # What was read beyond the end is not taken for a part of the sequence.
    again = finished(engine, [job([1, 2, *(event.token_id for event in every[:9])], greedy)])
    assert [event.token_id for event in again[0][:20]] == [event.token_id for event in every[9:29]]


def test_several_steps_are_one_call_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    finished(engine, [job([1, 2], {"ignore_end_token": True})])
    assert engine.counters.steps == 60
    calls, run = list[int](), engine.network.steps
    monkeypatch.setattr(engine.network, "steps", lambda *given: calls.append(1) or run(*given))
    finished(engine, [job([1, 2], {"ignore_end_token": True})])
    assert len(calls) <= 1 + 60 // steps.MOST_AHEAD


def test_who_comes_meanwhile_does_not_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "AHEAD_SECONDS", 1000.0)
    monkeypatch.setattr(steps, "MOST_AHEAD", 10**6)
    model = tiny_model("llama", context_length=20_000)
    native.hold(model, "float32")
    engine = made(model)
    over, came = threading.Event(), threading.Event()

    def ended(event: threading.Event) -> Callable[[list[Event]], None]:
        return lambda events: event.set() if isinstance(events[-1], Completed | Failed) else None

    engine.start()
    try:
        long = engine.submit(job([1, 2], {"ignore_end_token": True, "max_tokens": 19_000}), ended(over))
        while engine.counters.steps < 1:
            pass
        engine.submit(job([3, 4], {"max_tokens": 2}), ended(came))
        assert came.wait(10) and not over.is_set()
        long.cancel()
    finally:
        engine.close()
    assert over.wait(10)


def test_where_it_fails_it_goes_on_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    (wanted,) = finished(engine, [job([1, 2], {})])
    failing = made(engine.model)

    def fail(*_: object) -> Any:
        raise MemoryError("injected")

    monkeypatch.setattr(failing.network, "steps", fail)
    assert finished(failing, [job([1, 2], {})]) == [wanted]
