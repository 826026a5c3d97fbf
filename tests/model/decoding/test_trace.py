"""A trace tells what really happened: recomputed here from the logits, stage by stage, in the plainest way."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from tests.model.decoding.decoding_cases import EVERY_STRATEGY, HISTORY, PROMPT_LENGTH, VOCABULARY, awkward_logits, row
from topkapi.model.decoding.choosing import choose, process
from topkapi.model.decoding.noise import gumbel
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stage import Row

LOGITS = awkward_logits()[:6]


def entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def test_a_trace_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]))
    order = ["temperature", "top_k", "min_p"]
    request = {"seed": 3, "temperature": 0.5, "top_k": 3, "min_p": 0.5, "order": order, "trace": True}
    single = Row(resolve(request), [4], 1)
    choice = choose(logits, [single])[0]
    trace = choice.trace
    assert trace is not None
    squares = [p * p for p in (0.4, 0.3, 0.15, 0.1, 0.05)]
    sharp = [p / sum(squares) for p in squares]
    assert (trace.candidates, trace.how) == (5, "sampled")
    assert trace.entropy == pytest.approx(entropy([0.4, 0.3, 0.15, 0.1, 0.05]))
    assert [stage.stage for stage in trace.stages] == order
    assert [stage.kept for stage in trace.stages] == [5, 3, 2]
    assert [stage.cut for stage in trace.stages] == pytest.approx([0, sum(sharp[3:]), sharp[2] / sum(sharp[:3])])
    assert trace.stages[-1].entropy == pytest.approx(entropy([0.64, 0.36]), abs=1e-6)
    won, other = choice.token_id, 1 - choice.token_id
    final = [0.64, 0.36]
    assert trace.raw_probability == pytest.approx([0.4, 0.3][won])
    assert trace.probability == pytest.approx(final[won])
    assert trace.rank == won + 1
    assert [(r.token_id, r.probability) for r in trace.runners_up] == [(other, pytest.approx(final[other]))]
    assert [each.token_id for each in trace.contenders] == [0, 1, 2, 3, 4]
    assert [each.raw_probability for each in trace.contenders] == pytest.approx([0.4, 0.3, 0.15, 0.1, 0.05])
    after = [sharp, [*(p / sum(sharp[:3]) for p in sharp[:3]), 0, 0], [*final, 0, 0, 0]]
    for stage, probabilities in zip(trace.stages, after, strict=True):
        assert stage.probabilities == pytest.approx(probabilities, abs=1e-6)
    zero = torch.zeros(1, dtype=torch.int64)
    noise = gumbel(zero + 3, zero, zero, torch.arange(5))[0].tolist()
    assert trace.noise == noise[won]
    assert math.log(final[won]) + noise[won] > math.log(final[other]) + noise[other]


@pytest.mark.parametrize(("name", "parameters"), EVERY_STRATEGY, ids=[str(p) for _, p in EVERY_STRATEGY])
def test_a_trace_changes_nothing_and_agrees_with_the_stages(name: str, parameters: dict) -> None:
    plain = [row(seed, **parameters, logprobs=1) for seed in range(len(LOGITS))]
    traced = [row(seed, **parameters, logprobs=1, trace=True) for seed in range(len(LOGITS))]
    processed = process(LOGITS, plain).double()
    for at, (bare, full) in enumerate(zip(choose(LOGITS, plain), choose(LOGITS, traced), strict=True)):
        trace = full.trace
        assert bare.trace is None
        assert trace is not None
        assert dataclasses.replace(full, trace=None) == bare
        assert [stage.stage for stage in trace.stages] == [name]
        assert trace.stages[0].kept == int((processed[at] > float("-inf")).sum())
        kept = LOGITS[at].double().softmax(-1)[processed[at] > float("-inf")]
        assert trace.stages[0].cut == pytest.approx(1 - float(kept.sum()), abs=1e-9)
        probabilities = processed[at].softmax(-1)
        assert trace.stages[0].entropy == pytest.approx(entropy(probabilities.tolist()), abs=1e-9)
        assert trace.probability == pytest.approx(float(probabilities[full.token_id]))
        assert trace.raw_probability == pytest.approx(math.exp(full.raw_logprob or 0.0), rel=1e-5)
        assert trace.rank == full.rank
        contenders = [each.token_id for each in trace.contenders]
        others = [each.token_id for each in trace.runners_up]
        best = LOGITS[at].topk(min(5, int((LOGITS[at] > float("-inf")).sum()))).values[-1]
        assert {full.token_id, *others} <= set(contenders)
        assert set(contenders) - {full.token_id, *others} <= set((LOGITS[at] >= best).nonzero().view(-1).tolist())
        assert trace.stages[0].probabilities == pytest.approx(probabilities[contenders].tolist(), abs=1e-6)
        likeliest = [other.probability for other in trace.runners_up]
        assert likeliest == sorted(likeliest, reverse=True)
        json.dumps(trace.as_dict(), allow_nan=False)


def test_how_a_token_came_about() -> None:
    def how(**parameters: object) -> tuple[str, float | None]:
        single = Row(resolve({"seed": 1, "trace": True, **parameters}), list(HISTORY), PROMPT_LENGTH)
        trace = choose(LOGITS[:1], [single])[0].trace
        assert trace is not None
        return trace.how, trace.noise

    assert how()[0] == "sampled"
    assert isinstance(how()[1], float)
    assert how(temperature=0) == ("greedy", None)
    assert how(top_k=1) == ("forced", None)


def test_as_many_others_are_named_as_log_probabilities_were_asked_for() -> None:
    rows = [row(1, trace=True, logprobs=count) for count in (None, 2, 9)]
    traces = [choice.trace for choice in choose(LOGITS[:1].repeat(3, 1), rows)]
    assert [len(trace.runners_up) for trace in traces if trace is not None] == [5, 5, 9]
    for trace, least in zip(traces, (5, 5, 9), strict=True):
        assert trace is not None and len(trace.contenders) >= least
        raw = [each.raw_probability for each in trace.contenders]
        assert raw == sorted(raw, reverse=True)


def test_rows_with_and_without_trace_share_a_batch() -> None:
    rows = [row(seed, top_p=0.8, trace=seed % 2 == 0) for seed in range(len(LOGITS))]
    choices = choose(LOGITS, rows)
    assert [choice.trace is not None for choice in choices] == [True, False] * 3
    assert [choice.token_id for choice in choices] == [
        choice.token_id for choice in choose(LOGITS, [row(seed, top_p=0.8) for seed in range(len(LOGITS))])
    ]
    assert len(LOGITS[0]) == VOCABULARY
