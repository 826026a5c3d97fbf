"""Sampling draws from the distribution it claims, and the same request always draws the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.decoding.choosing import choose
from model.decoding.noise import gumbel
from model.decoding.parameters import resolve
from model.decoding.stages import Row, process
from model.errors import EngineError

LOGITS = torch.tensor([2.0, 1.5, 0.3, -0.2, -1.0, 0.9, -3.0, 1.1])
DRAWS = 8000


def rows_of_seeds(count: int, **parameters: object) -> list[Row]:
    effective = resolve({"seed": 0, **parameters})
    return [Row(effective | {"seed": seed}, [1, 2], 2) for seed in range(count)]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.8, "top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"logit_bias": {6: 4.0}, "top_k": 4},
        {"repetition_penalty": 2.0},
    ],
)
def test_empirical_distribution_is_the_exact_one(parameters: dict) -> None:
    rows = rows_of_seeds(DRAWS, **parameters)
    expected = process(LOGITS[None], rows[:1])[0].double().softmax(-1)
    choices = choose(LOGITS.expand(DRAWS, -1), rows)
    counts = torch.bincount(torch.tensor([choice.token_id for choice in choices]), minlength=len(LOGITS)).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = float(((counts - DRAWS * expected)[possible] ** 2 / (DRAWS * expected[possible])).sum())
    # The chi-square quantile at 1 - 1e-6 for up to 7 degrees of freedom is 40.5; the draws are fixed by their seeds.
    assert statistic < 40.5


def test_noise_is_standard_gumbel_and_depends_on_each_argument() -> None:
    one = torch.tensor([5])
    tokens = torch.arange(200_000)
    noise = gumbel(one, one, one, tokens)[0]
    assert noise.dtype == torch.float64
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean()) - 0.5772157) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    variants = [noise, gumbel(one + 1, one, one, tokens)[0], gumbel(one, one + 1, one, tokens)[0]]
    variants.append(gumbel(one, one, one + 1, tokens)[0])
    correlation = torch.corrcoef(torch.stack(variants)) - torch.eye(4)
    assert correlation.abs().max() < 0.01


def test_noise_is_pinned() -> None:
    """Recorded answers stay reproducible across releases: these values must never change."""
    one = torch.tensor([1234])
    values = gumbel(one, one * 0, one * 0 + 7, torch.tensor([0, 1, 49_999]))[0].tolist()
    assert values == pytest.approx(PINNED, abs=1e-12)


PINNED = [0.7098437865493731, 1.9277502491668062, -0.4214771167218674]


@settings(deadline=None)
@given(st.integers(0, 2**53 - 1), st.integers(0, 127), st.integers(0, 5))
def test_a_row_chooses_the_same_alone_and_among_others(seed: int, sequence: int, at: int) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed % 1000))
    mine = Row(resolve({"seed": seed, "temperature": 1.3, "top_p": 0.95}), [1, 2, 3], 1, sequence)
    rows = rows_of_seeds(6, temperature=0.9)
    rows[at] = mine
    assert choose(logits, rows)[at].token_id == choose(logits[at : at + 1], [mine])[0].token_id


def test_greedy_takes_the_first_of_equal_best_and_needs_no_seed() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    for seed in range(20):
        assert choose(logits, [Row(resolve({"temperature": 0, "seed": seed}), [0], 1)])[0].token_id == 1


def test_log_probabilities_are_raw_and_processed() -> None:
    row = Row(resolve({"seed": 3, "top_k": 2, "temperature": 0.5, "logprobs": 3}), [0], 1)
    choice = choose(LOGITS[None], [row])[0]
    raw = LOGITS.double().log_softmax(-1)
    kept = (LOGITS[:2].double() / 0.5).log_softmax(-1)
    assert choice.token_id in (0, 1)
    assert choice.raw_logprob == pytest.approx(float(raw[choice.token_id]))
    assert choice.logprob == pytest.approx(float(kept[choice.token_id]))
    assert choice.rank == choice.token_id + 1
    assert [token_id for token_id, _ in choice.top] == [0, 1, 7]


def test_nan_and_nothing_left_are_refused() -> None:
    plain = resolve({"seed": 1})
    with pytest.raises(EngineError, match="NaN"):
        choose(torch.tensor([[0.0, float("nan")]]), [Row(plain, [0], 1)])
    with pytest.raises(EngineError, match="no token is left"):
        choose(torch.full((1, 4), float("-inf")), [Row(plain, [0], 1)])
