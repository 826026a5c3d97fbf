"""Guidance and DoLa as stages: the formulas, rows beside each other, what is ruled out, and exact distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.model.decoding.decoding_cases import VOCABULARY, awkward_logits, row
from topkapi.model.decoding.choosing import choose, process
from topkapi.model.decoding.stage import Row
from topkapi.model.errors import EngineError

OTHERS = torch.randn(12, 3, VOCABULARY, generator=torch.Generator().manual_seed(8)) * 2
CASES: list[dict[str, Any]] = [
    {"guidance_scale": 3.0}, {"guidance_scale": 0.0}, {"guidance_scale": 0.4, "temperature": 0.7},
    {"dola_layers": "low"}, {"dola_layers": [1, 2], "top_k": 5}, {"dola_layers": "high", "guidance_scale": 1.5},
]  # fmt: skip


def rows(count: int, **parameters: Any) -> list[Row]:
    found = [row(seed, **parameters) for seed in range(count)]
    for at, each in enumerate(found):
        each.guide, each.early = OTHERS[at, 0], OTHERS[at, 1:]
    return found


@pytest.mark.parametrize("parameters", CASES, ids=str)
def test_a_row_is_bitwise_the_same_alone_and_among_others(parameters: dict[str, Any]) -> None:
    logits = awkward_logits()
    all_rows = rows(len(logits), **parameters)
    together = process(logits, all_rows)
    assert not torch.equal(together, logits)
    for index, single in enumerate(all_rows):
        assert torch.equal(process(logits[index : index + 1], [single])[0], together[index])


def test_guidance_is_transformers_processor() -> None:
    class Unconditional(torch.nn.Module):
        """What transformers calls with the negative prompt."""

        def forward(self, *args: object, **named: object) -> Any:
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=OTHERS[:1, :1])

    logits = awkward_logits()[:1]
    for scale in (0.5, 1.5, 4.0):
        processor = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, Unconditional())
        expected = processor(torch.tensor([[1]]), logits)
        torch.testing.assert_close(process(logits, rows(1, guidance_scale=scale)), expected, atol=1e-5, rtol=1e-5)


def test_what_either_prompt_rules_out_stays_ruled_out() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, :5] = -math.inf
    single = rows(1, guidance_scale=2.0)
    assert single[0].guide is not None
    single[0].guide = single[0].guide.clone()
    single[0].guide[3:8] = -math.inf
    assert (process(logits, single)[0] == -math.inf).nonzero().view(-1).tolist() == list(range(8))


def test_without_the_other_logits_it_is_an_error_and_not_ignored() -> None:
    for parameters in ({"guidance_scale": 2.0}, {"dola_layers": "low"}):
        with pytest.raises(EngineError, match="nobody computed"):
            choose(awkward_logits()[:1], [row(**parameters)])


def chi_square(counts: Tensor, expected: Tensor) -> float:
    possible = expected > 0
    assert counts[~possible].sum() == 0
    total = float(counts.sum())
    return float(((counts - total * expected)[possible] ** 2 / (total * expected[possible])).sum())


def test_draws_follow_the_formulas() -> None:
    """Seven tokens, thousands of seeds, against Sanchez et al. 2023 and Chuang et al. 2023 written out."""
    late, early = (
        torch.tensor([1.0, 0.5, 0.2, 0.0, -0.3, -0.8, -9.0]),
        torch.tensor([0.0, 0.9, 0.1, 0.4, -1.0, 0.0, 0.0]),
    )
    p, q = late.double().softmax(-1), early.double().softmax(-1)
    guided = (q.log() + 1.7 * (p.log() - q.log())).softmax(-1)
    contrasted = (p / q) * (p >= 0.1 * p.max())
    for parameters, expected in (
        ({"guidance_scale": 1.7}, guided),
        ({"dola_layers": [0]}, contrasted / contrasted.sum()),
    ):
        many = [row(seed, **parameters) for seed in range(4000)]
        for each in many:
            each.end_token_ids, each.guide, each.early = (), early, early[None]
        choices = choose(late.expand(len(many), -1), many)
        counts = torch.bincount(torch.tensor([choice.token_id for choice in choices]), minlength=7).double()
        assert chi_square(counts, expected) < 35  # p = 1e-5 at 6 degrees of freedom


def test_log_probabilities_and_trace_show_what_the_network_said() -> None:
    logits = awkward_logits()[:1]
    single = rows(1, guidance_scale=2.0, logprobs=1, trace=True)
    choice = choose(logits, single)[0]
    raw, final = logits[0].double().log_softmax(-1), process(logits, single)[0].double().log_softmax(-1)
    assert choice.raw_logprob == pytest.approx(float(raw[choice.token_id]), abs=1e-6)
    assert choice.logprob == pytest.approx(float(final[choice.token_id]), abs=1e-6)
    assert choice.trace is not None
    assert [stage.stage for stage in choice.trace.stages] == ["guidance"]
    assert choice.trace.raw_probability == pytest.approx(float(raw[choice.token_id].exp()), rel=1e-5)
