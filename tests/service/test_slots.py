"""The snapshot of an engine's slots: what runs where, readable while the engine works."""

from __future__ import annotations

import threading

from tests.tiny import tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import GenerateJob, ScoreJob
from topkapi.model.decoding.parameters import resolve
from topkapi.service.slots import slot_views


def test_slots_show_what_runs_in_them_step_by_step() -> None:
    engine = Engine(tiny_model(), name="tiny", max_running=3)
    assert [view.busy for view in slot_views(engine)] == [False] * 3
    writing = GenerateJob([1, 2, 3], resolve({"seed": 1, "n": 2, "max_tokens": 6, "ignore_end_token": True}))
    reading = ScoreJob([4, 5, 6, 7])
    engine.submit(writing, lambda events: None)
    assert not any(view.busy for view in slot_views(engine)), "nothing is in a slot before the first step"
    engine.step()
    first = next(view for view in slot_views(engine) if view.busy)
    assert (first.job, first.sequence_index, first.prompt_tokens) == (writing, 0, 3)
    assert (first.computed_tokens, first.generated_tokens, len(first.generated_ids)) == (3, 1, 1)
    assert first.started_at is not None
    engine.step()
    assert [(view.job, view.sequence_index) for view in slot_views(engine) if view.busy] == [(writing, 0), (writing, 1)]
    assert [view.slot for view in slot_views(engine)] == [0, 1, 2]
    engine.submit(reading, lambda events: None)
    while engine.step():
        pass
    assert not any(view.busy for view in slot_views(engine))


def test_slots_may_be_looked_at_while_the_engine_works() -> None:
    engine = Engine(tiny_model(), name="tiny", max_running=4)
    engine.start()
    over = threading.Event()
    left = 12

    def deliver(events: list) -> None:
        nonlocal left
        left -= any(type(event).__name__ == "Completed" for event in events)
        if not left:
            over.set()

    for seed in range(12):
        parameters = resolve({"seed": seed, "n": 2, "max_tokens": 20, "ignore_end_token": True})
        engine.submit(GenerateJob([seed + 1, 2], parameters), deliver)
    seen = 0
    while not over.wait(timeout=0.0005):  # a pause, or this thread keeps the interpreter from the engine's
        views = slot_views(engine)
        assert len(views) == 4
        for view in views:
            assert 0 <= view.computed_tokens <= view.prompt_tokens + view.generated_tokens
            seen += view.busy
    engine.close()
    assert seen
