"""Every stage against transformers' processor on random and adversarial logits, and against its own contract."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as reference

from model.decoding.parameters import resolve
from model.decoding.stages import Row, process

VOCABULARY = 50
HISTORY = [3, 7, 7, 9, 3, 3, 41]
PROMPT_LENGTH = 3


def adversarial_logits() -> torch.Tensor:
    random = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    ties = random[0].round()
    infinite = random[1].clone()
    infinite[::2] = float("-inf")
    single = torch.full((VOCABULARY,), float("-inf"))
    single[5] = 1.0
    equal = torch.zeros(VOCABULARY)
    huge = random[2] * 1e4
    return torch.stack([*random, ties, infinite, single, equal, huge])


def row(**parameters: object) -> Row:
    return Row(resolve({"seed": 1, **parameters}), list(HISTORY), PROMPT_LENGTH, end_token_ids=(2,))


CASES = {
    "temperature": ({"temperature": 0.7}, reference.TemperatureLogitsWarper(0.7)),
    "top_k": ({"top_k": 5}, reference.TopKLogitsWarper(5)),
    "top_k of more than all": ({"top_k": 500}, reference.TopKLogitsWarper(500)),
    "top_p": ({"top_p": 0.81}, reference.TopPLogitsWarper(0.81)),
    "min_p": ({"min_p": 0.15}, reference.MinPLogitsWarper(0.15)),
    "repetition_penalty": ({"repetition_penalty": 1.3}, reference.RepetitionPenaltyLogitsProcessor(1.3)),
    "logit_bias": (
        {"logit_bias": {4: 5.0, 11: -7.5}},
        reference.SequenceBiasLogitsProcessor([[[4], 5.0], [[11], -7.5]]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_stage_equals_transformers(case: str) -> None:
    parameters, processor = CASES[case]
    logits = adversarial_logits()
    before = logits.clone()
    ours = process(logits, [row(**parameters) for _ in logits])
    theirs = processor(torch.tensor([HISTORY]).expand(len(logits), -1), before.clone())
    # A distribution is what must agree: where ties are cut is free in a full sort.
    ours_p, theirs_p = ours.double().softmax(-1), theirs.double().softmax(-1)
    if case == "top_p":
        ours_p, theirs_p = ours_p.sort(-1).values, theirs_p.sort(-1).values
    torch.testing.assert_close(ours_p, theirs_p, atol=1e-6, rtol=1e-5)
    assert torch.equal(logits, before), "a stage must leave its input as it is"


def test_min_tokens_rules_out_ends_until_reached() -> None:
    logits = torch.zeros(1, VOCABULARY)
    early = process(logits, [row(min_tokens=5, stop_token_ids=[8])])
    assert early[0, 2] == early[0, 8] == float("-inf")
    assert torch.equal(process(logits, [row(min_tokens=4, stop_token_ids=[8])]), logits)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    processed = process(torch.zeros(1, VOCABULARY), [row(presence_penalty=0.5, frequency_penalty=0.25)])
    expected = torch.zeros(VOCABULARY)
    expected[3], expected[9], expected[41] = -0.5 - 0.5, -0.75, -0.75
    torch.testing.assert_close(processed[0], expected)


def test_rows_with_other_parameters_do_not_touch_each_other() -> None:
    logits = adversarial_logits()[:6]
    rows = [
        row(temperature=0.7, top_k=4), row(top_p=0.5), row(), row(temperature=0, repetition_penalty=1.5),
        row(min_p=0.2, presence_penalty=1.0), row(top_k=1, top_p=0.1, temperature=1.7),
    ]  # fmt: skip
    together = process(logits, rows)
    for index, single in enumerate(rows):
        assert torch.equal(process(logits[index : index + 1], [single])[0], together[index])
    assert torch.equal(together[2], logits[2]), "a row that asks for nothing keeps its logits"


def test_no_filter_removes_the_most_likely_token() -> None:
    logits = adversarial_logits()
    for parameters in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        kept = process(logits, [row(**parameters) for _ in logits])
        assert torch.equal(kept.amax(-1), logits.amax(-1))
