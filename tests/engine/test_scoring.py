"""Scoring a completion after its prompt: the numbers are the whole text's, and the prompt is read once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_config, tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, ScoreJob
from topkapi.model.errors import InvalidRequest
from topkapi.model.scoring import score, windows

TEXT = torch.randint(1, 120, (150,), generator=torch.Generator().manual_seed(1)).tolist()


def run(engine: Engine, *jobs: ScoreJob) -> list[Completed]:
    """The last event of each job, submitted together."""
    ends: dict[int, Completed] = {}
    for number, job in enumerate(jobs):
        engine.submit(job, lambda events, number=number: ends.update({number: events[-1]}))
    while engine.step():
        pass
    return [ends[number] for number in range(len(jobs))]


@given(length=st.integers(1, 200), first=st.integers(1, 200), size=st.integers(2, 64), step=st.integers(1, 63))
def test_a_later_beginning_keeps_the_windows_and_leaves_out_what_is_before(length, first, size, step) -> None:
    first, step = min(first, length), min(step, size - 1)
    whole = windows(length, tiny_config(), size, step)
    parts = windows(length, tiny_config(), size, step, first)
    assert {(part.start, part.end) for part in parts} <= {(part.start, part.end) for part in whole}
    assert [at for part in parts for at in range(part.first, part.end)] == list(range(first, length))


@pytest.mark.parametrize("first", [1, 2, 30, 41, 149, 150])
@pytest.mark.parametrize("window", [None, 40])
def test_what_is_scored_is_the_end_of_the_whole_texts_scores(first: int, window: int | None) -> None:
    engine = Engine(tiny_model(), name="tiny", max_running=2, step_tokens=7)
    whole = score(engine.model, TEXT, window=window, stride=11, top=2)
    (end,) = run(engine, ScoreJob(TEXT, window, 11, top=2, first=first))
    assert end.scores == score(engine.model, TEXT, window=window, stride=11, top=2, first=first)
    assert end.scores is not None and len(end.scores.logprobs) == 150 - first
    assert end.scores.logprobs == whole.logprobs[first - 1 :]
    assert end.scores.tops == whole.tops[first - 1 :]


def test_a_prompt_is_read_once_for_all_its_completions() -> None:
    prompt = TEXT[:40]
    jobs = [ScoreJob([*prompt, 5 + choice, 6, 7], first=40) for choice in range(4)]
    cold = [run(Engine(tiny_model(), name="tiny"), job)[0] for job in jobs]
    engine = Engine(tiny_model(), name="tiny", max_running=4)
    warm = [*run(engine, jobs[0]), *run(engine, *jobs[1:])]
    assert [end.cached_tokens for end in warm] == [0, 39, 39, 39], "all but its last token, which predicts the first"
    assert [end.scores for end in warm] == [end.scores for end in cold]


def test_a_beginning_outside_the_text_is_refused() -> None:
    engine = Engine(tiny_model(), name="tiny")
    for first in (0, -1, 4):
        with pytest.raises(InvalidRequest, match="nothing can be scored"):
            engine.submit(ScoreJob([1, 2, 3], first=first), lambda events: None)
