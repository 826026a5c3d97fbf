"""Many jobs at once are answered as each alone, and what one fails by is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from topkapi.engine.batch import run_batch
from topkapi.engine.request import GenerateJob
from topkapi.engine.steps import DecoderNetwork
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import EngineError, InvalidRequest
from topkapi.model.generation import generate
from topkapi.model.transformer import Decoder

PROMPTS = [[7, 3], [9], list(range(1, 40)), [2, 2, 2], [80, 81, 82, 83, 84]]
SAMPLED = {"temperature": 1.2, "seed": 5, "top_k": 30}


def jobs(model: Decoder, prompts: list[list[int]], wanted: dict[str, Any]) -> list[GenerateJob]:
    config = model.config
    parameters = resolve(wanted, vocab_size=config.vocab_size, end_token_ids=config.end_token_ids)
    return [GenerateJob(prompt, parameters) for prompt in prompts]


@pytest.mark.parametrize("wanted", [{"temperature": 0}, SAMPLED, {"temperature": 0, "stop_token_ids": [88, 90]}])
@pytest.mark.parametrize("together", [1, 2, 16])
def test_many_prompts_are_continued_as_each_alone(wanted: dict[str, Any], together: int) -> None:
    model = tiny_model(scale=12, end_token_ids=(106, 115))
    parameters = {**wanted, "max_tokens": 12}
    told: list[tuple[int, int]] = []
    found = run_batch(model, jobs(model, PROMPTS, parameters), together=together, progress=lambda *at: told.append(at))
    assert found == [generate(model, prompt, parameters) for prompt in PROMPTS]
    assert told[-1] == (len(PROMPTS), len(PROMPTS)) and told == sorted(set(told))
    if wanted == {"temperature": 0}:
        assert {one.finish_reason for one in found} == {"length", "stop"}, "the prompts should show both"


def test_what_needs_several_sequences_side_by_side_has_its_place() -> None:
    model = tiny_model(scale=12)
    found = run_batch(model, jobs(model, PROMPTS, {"num_beams": 3, "max_tokens": 6}), together=3)
    assert [len(one.token_ids) for one in found] == [6] * len(PROMPTS)


def test_no_jobs_and_no_tokens_are_answered() -> None:
    model = tiny_model()
    assert run_batch(model, []) == []
    full = list(range(1, model.config.context_length))
    (found,) = run_batch(model, jobs(model, [full], {"max_tokens": 5, "temperature": 0}))
    assert len(found.token_ids) == 1 and found.finish_reason == "length"


def test_a_job_that_cannot_run_is_refused_before_any_does() -> None:
    model = tiny_model()
    with pytest.raises(InvalidRequest, match="empty"):
        run_batch(model, jobs(model, [[1], []], {"max_tokens": 2}))
    with pytest.raises(InvalidRequest, match="one answer"):
        run_batch(model, jobs(model, [[1]], {"max_tokens": 2, "n": 2}))
    with pytest.raises(InvalidRequest, match="constraint"):
        run_batch(model, jobs(model, [[1]], {"max_tokens": 2, "json_schema": {"type": "object"}}))


def test_what_a_job_fails_by_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DecoderNetwork, works: object) -> list[torch.Tensor]:
        raise ValueError("no memory")

    monkeypatch.setattr(DecoderNetwork, "run", broken)
    model = tiny_model()
    with pytest.raises(EngineError, match="no memory"):
        run_batch(model, jobs(model, [[1], [2]], {"max_tokens": 2}))
