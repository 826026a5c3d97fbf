"""Sampling draws from the distribution it claims, and the same request always draws the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.decoding.decoding_cases import EVERY_STRATEGY, HISTORY, PROMPT_LENGTH, VOCABULARY, Marked
from topkapi.model.decoding.choosing import UnusableLogits, choose, process
from topkapi.model.decoding.noise import gumbel, gumbel_of_keys, loud_tokens, row_keys
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stage import Row
from topkapi.model.errors import EngineError

LOGITS = torch.tensor([2.0, 1.5, 0.3, -0.2, -1.0, 0.9, -3.0, 1.1])
DRAWS = 3000


def rows_of_seeds(count: int, **parameters: object) -> list[Row]:
    effective = resolve({"seed": 0, **parameters}, vocabulary=Marked())
    return [Row(replace(effective, seed=seed), [1, 2], 2) for seed in range(count)]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of observed counts against probabilities; infinite where something impossible was observed."""
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return math.inf
    total = float(counts.sum())
    return float(((counts - total * expected)[possible] ** 2 / (total * expected[possible])).sum())


@pytest.mark.parametrize(("name", "parameters"), EVERY_STRATEGY, ids=[str(p) for _, p in EVERY_STRATEGY])
def test_every_strategy_draws_from_its_exact_distribution(name: str, parameters: dict) -> None:
    """Thousands of seeds against the full enumeration of the eight most likely tokens of a small vocabulary."""
    logits = torch.full((VOCABULARY,), float("-inf"))
    logits[[2, 5, 7, 11, 12, 20, 30, 41]] = LOGITS
    effective = resolve({"seed": 0, **parameters}, vocabulary=Marked())
    rows = [Row(replace(effective, seed=seed), HISTORY, PROMPT_LENGTH) for seed in range(DRAWS)]
    # Of strategies that are chance themselves (XTC), the mean over many coins is the exact distribution.
    processed = process(logits.expand(DRAWS, -1), rows)
    expected = processed.double().softmax(-1).mean(0)
    choices = choose(logits.expand(DRAWS, -1), rows)
    counts = torch.bincount(torch.tensor([choice.token_id for choice in choices]), minlength=VOCABULARY).double()
    # The chi-square quantile at 1 - 1e-6 for up to 7 degrees of freedom is 40.5; the draws are fixed by their seeds.
    assert chi_square(counts, expected) < 40.5


RANDOM = torch.randn(3, 5000, generator=torch.Generator().manual_seed(5))
SHAPES = {
    "peaked": RANDOM * 9,
    "like language": -1.4 * torch.arange(1, 5001).log() + RANDOM * 0.3,
    "flat": RANDOM * 0.01,
    "equal": torch.zeros(2, 5000),
    "huge": RANDOM * 1e5,
    "mostly ruled out": torch.where(RANDOM < 2, torch.tensor(float("-inf")), RANDOM.roll(1)),
    "one far ahead of many": torch.cat([torch.full((3, 1), 30.0), RANDOM[:, 1:] + 24], dim=1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.6}, {"min_p": 1e-6}, {"epsilon_cutoff": 1e-5}])
def test_drawing_from_few_is_drawing_from_all(shape: str, parameters: dict) -> None:
    """Only some tokens are given noise; the one chosen is the one with the largest sum in float64 over all of them."""
    logits = SHAPES[shape]
    for seed in range(25):
        rows = [
            Row(resolve({"seed": seed, **parameters}, vocabulary=Marked()), [1], 1, at) for at in range(len(logits))
        ]
        column = torch.arange(len(rows))
        noise = gumbel(torch.full_like(column, seed), column, torch.zeros_like(column), torch.arange(5000))
        expected = (process(logits, rows).double() + noise).argmax(-1).tolist()
        assert [choice.token_id for choice in choose(logits, rows)] == expected


def test_loud_tokens_are_found_without_logarithms() -> None:
    keys = row_keys([Row(resolve({"seed": seed}), [1], 1) for seed in range(8)])
    noise = gumbel_of_keys(keys, torch.arange(20_000))
    for level in (1.0, 3.0, 5.5, 9.0):
        for mask, exact in zip(loud_tokens(keys, 20_000, None, level), noise > level, strict=True):
            assert bool(torch.from_numpy(mask)[exact].all()), "none may be missed"
            assert mask.sum() <= exact.sum() + 1


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


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**53 - 1), st.integers(0, 127), st.integers(0, 5), st.sampled_from(EVERY_STRATEGY), st.booleans()
)
def test_a_row_chooses_the_same_alone_and_among_others(
    seed: int, sequence: int, at: int, strategy: tuple, wide: bool
) -> None:
    width = 3000 if wide else VOCABULARY
    logits = torch.randn(6, width, generator=torch.Generator().manual_seed(seed % 1000)) * 2
    parameters = resolve({"seed": seed, "logprobs": 3, **strategy[1]}, vocabulary=Marked())
    others = [resolve({"seed": n, **EVERY_STRATEGY[n * 5][1]}, vocabulary=Marked()) for n in range(6)]
    rows = [Row(each, list(HISTORY), PROMPT_LENGTH) for each in others]
    rows[at] = Row(parameters, list(HISTORY), PROMPT_LENGTH, sequence)
    alone = choose(logits[at : at + 1], [Row(parameters, list(HISTORY), PROMPT_LENGTH, sequence)])[0]
    assert choose(logits, rows)[at] == alone


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
    with pytest.raises(EngineError, match="NaN"):
        choose(torch.tensor([[0.0, float("inf")]]), [Row(plain, [0], 1)])
    with pytest.raises(EngineError, match="no token is left"):
        choose(torch.full((1, 4), float("-inf")), [Row(plain, [0], 1)])


def test_the_rows_that_failed_are_named_so_that_the_others_can_go_on() -> None:
    logits = torch.randn(4, 6)
    logits[2, 3] = float("nan")
    rows = rows_of_seeds(4)
    with pytest.raises(UnusableLogits) as caught:
        choose(logits, rows)
    assert caught.value.rows == (2,)
    logits[2] = logits[1]
    logits[3, 1:] = float("-inf")
    rows[3] = Row(resolve({"seed": 1, "banned_token_ids": [0]}), [0], 1)
    with pytest.raises(UnusableLogits, match="no token is left") as caught:
        choose(logits, rows)
    assert caught.value.rows == (3,)


def test_mirostat_replays_the_same_and_from_any_position() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)) * 3

    def continued(row: Row, count: int) -> list[int]:
        for _ in range(count):
            row.tokens.append(choose(logits, [row])[0].token_id)
        return row.generated

    parameters = resolve({"seed": 4, "mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5})
    row = Row(parameters, [1], 1)
    whole = list(continued(row, 30))
    assert len({round(bound, 6) for bound in row.surprise_bounds}) > 20
    assert continued(Row(parameters, [1], 1), 30) == whole
    # Tokens that are taken back, after a preemption say, are chosen again under the bounds they had.
    del row.tokens[11:]
    assert continued(row, 20) == whole


def test_mirostat_holds_the_surprise_near_its_aim() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(2)) * 2
    for tau in (1.5, 3.0):
        row = Row(resolve({"seed": 4, "mirostat": 2, "mirostat_tau": tau, "logprobs": 0}), [1], 1)
        surprise = []
        for _ in range(400):
            choice = choose(logits, [row])[0]
            row.tokens.append(choice.token_id)
            surprise.append(-choice.logprob / math.log(2))
        assert sum(surprise[50:]) / len(surprise[50:]) == pytest.approx(tau, rel=0.1)


def test_greedy_rows_skip_what_cannot_matter_and_obey_what_can() -> None:
    plain = choose(LOGITS[None], [Row(resolve({"temperature": 0}), [9], 1)])[0].token_id
    filtered = resolve({"temperature": 0, "top_p": 0.5, "min_p": 0.2, "top_k": 3, "epsilon_cutoff": 0.1})
    assert choose(LOGITS[None], [Row(filtered, [9], 1)])[0].token_id == plain == 0
    typical = resolve({"temperature": 0, "typical_p": 0.1})
    assert choose(LOGITS[None], [Row(typical, [9], 1)])[0].token_id != plain
    banned = resolve({"temperature": 0, "banned_token_ids": [0, 1], "top_k": 3})
    assert choose(LOGITS[None], [Row(banned, [9], 1)])[0].token_id == 7


def test_a_greedy_truncation_counts_where_scores_are_changed_after_it() -> None:
    """What `order` puts before a penalty has left no other token that the penalty could bring to the front."""
    request = {"temperature": 0, "top_k": 1, "logit_bias": {0: -100.0}}
    for order, token_id in ((["logit_bias", "top_k"], 1), (["top_k", "logit_bias"], 0)):
        row = Row(resolve(request | {"order": [*order, "temperature"]}), [9], 1)
        assert choose(LOGITS[None], [row])[0].token_id == token_id
