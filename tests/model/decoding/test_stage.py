"""Every stage against transformers' processor on random and awkward logits, and against its own contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from tests.model.decoding.decoding_cases import (
    EVERY_STRATEGY,
    HISTORY,
    PROMPT_LENGTH,
    STRATEGIES,
    TIED,
    VOCABULARY,
    awkward_logits,
    row,
)
from topkapi.model.decoding.choosing import process
from topkapi.model.decoding.parameters import BY_NAME, DEFAULT_ORDER
from topkapi.model.decoding.stage import STAGES, Row

INFINITE = float("-inf")
CASES = {
    "min tokens": (
        {"min_tokens": 50},
        reference.MinNewTokensLengthLogitsProcessor(PROMPT_LENGTH, 50, 2),
    ),
    "banned tokens": ({"banned_token_ids": [5, 9]}, reference.SuppressTokensLogitsProcessor([5, 9])),
    "bad words": (
        {"bad_words": [[9, 3, 11], [6], [41, 5], [7, 7]]},
        reference.NoBadWordsLogitsProcessor([[9, 3, 11], [6], [41, 5], [7, 7]]),
    ),
    "allowed tokens": (
        {"allowed_token_ids": [5, 11, 30, 31]},
        reference.PrefixConstrainedLogitsProcessor(lambda batch, ids: [5, 11, 30, 31], 1),
    ),
    "n-grams of 1": ({"no_repeat_ngram_size": 1}, reference.NoRepeatNGramLogitsProcessor(1)),
    "n-grams of 2": ({"no_repeat_ngram_size": 2}, reference.NoRepeatNGramLogitsProcessor(2)),
    "n-grams of 3": ({"no_repeat_ngram_size": 3}, reference.NoRepeatNGramLogitsProcessor(3)),
    "n-grams longer than the text": ({"no_repeat_ngram_size": 99}, reference.NoRepeatNGramLogitsProcessor(99)),
    "repetition penalty": ({"repetition_penalty": 1.3}, reference.RepetitionPenaltyLogitsProcessor(1.3)),
    "logit bias": (
        {"logit_bias": {4: 5.0, 11: -7.5}},
        reference.SequenceBiasLogitsProcessor([[[4], 5.0], [[11], -7.5]]),
    ),
    "temperature": ({"temperature": 0.7}, reference.TemperatureLogitsWarper(0.7)),
    "top-k": ({"top_k": 5}, reference.TopKLogitsWarper(5)),
    "top-k of more than all": ({"top_k": 500}, reference.TopKLogitsWarper(500)),
    "top-p": ({"top_p": 0.81}, reference.TopPLogitsWarper(0.81)),
    "min-p": ({"min_p": 0.15}, reference.MinPLogitsWarper(0.15)),
    "typical": ({"typical_p": 0.6}, reference.TypicalLogitsWarper(0.6)),
    "typical, nearly all": ({"typical_p": 0.97}, reference.TypicalLogitsWarper(0.97)),
    "epsilon": ({"epsilon_cutoff": 0.03}, reference.EpsilonLogitsWarper(0.03)),
    "eta": ({"eta_cutoff": 0.03}, reference.EtaLogitsWarper(0.03)),
}


def label(parameters: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in parameters.items())


@pytest.mark.parametrize("case", CASES)
def test_stage_equals_transformers(case: str) -> None:
    parameters, processor = CASES[case]
    logits = awkward_logits()
    before = logits.clone()
    ours = process(logits, [row(**parameters) for _ in logits])
    assert torch.equal(logits, before), "a stage must leave its input as it is"
    theirs = processor(torch.tensor([HISTORY]).expand(len(logits), -1), before.clone())
    for index, (mine, other) in enumerate(zip(ours.double(), theirs.double(), strict=True)):
        if case == "top-p" and index in TIED:
            # Where a full sort cuts among equal logits is chance; here they stay together.
            assert bool((mine > INFINITE)[other > INFINITE].all())
            assert set(mine[(mine > INFINITE) & (other == INFINITE)].tolist()) <= {float(other[other > INFINITE].min())}
        elif bool((other > INFINITE).any()):
            torch.testing.assert_close(mine.softmax(-1), other.softmax(-1), atol=1e-6, rtol=1e-5)
        else:
            assert not bool((mine > INFINITE).any())


def test_every_stage_has_a_strategy_here_and_acts() -> None:
    # The grammar needs a tokenizer (test_grammar.py), the other two need other logits (test_contrast.py).
    expected = set(DEFAULT_ORDER) - {"grammar", "dola", "guidance"}
    assert set(STRATEGIES) == expected, (
        f"STRATEGIES in tests/model/decoding/decoding_cases.py needs a request for each of the stages "
        f"{sorted(expected - set(STRATEGIES))}, and there are no stages {sorted(set(STRATEGIES) - expected)}"
    )
    logits = awkward_logits()[:6]
    for name, requests in STRATEGIES.items():
        changed = [not torch.equal(process(logits, [row(**p) for _ in logits]), logits) for p in requests]
        assert any(changed), f"no request that STRATEGIES has for the stage {name} changes any of these logits"


@pytest.mark.parametrize(("name", "parameters"), EVERY_STRATEGY, ids=[label(p) for _, p in EVERY_STRATEGY])
def test_a_row_is_bitwise_the_same_alone_and_among_others(name: str, parameters: dict[str, Any]) -> None:
    logits = awkward_logits()
    rows = [row(seed, **parameters) for seed in range(len(logits))]
    together = process(logits, rows)
    for index, single in enumerate(rows):
        assert torch.equal(process(logits[index : index + 1], [single])[0], together[index])


COMBINATION = st.lists(
    st.sampled_from([case for case in EVERY_STRATEGY if case[0] not in ("mirostat", "min_tokens")]), max_size=4
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(200, 700), st.lists(COMBINATION, min_size=2, max_size=8))
def test_combinations_are_bitwise_independent(seed: int, width: int, combinations: list) -> None:
    """Rows of other strategies, other parameters and other tails stand in the same batch."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(combinations), width, generator=generator)
    logits *= torch.rand(len(combinations), 1, generator=generator) * 8
    rows = []
    for combination in combinations:
        merged = {key: value for _, request in combination for key, value in request.items()}
        merged.pop("allowed_token_ids", None)
        rows.append(row(seed % 1000, **merged))
    together = process(logits, rows)
    for index, single in enumerate(rows):
        assert torch.equal(process(logits[index : index + 1], [single])[0], together[index])


@pytest.mark.parametrize("name", ["temperature", "top_p", "typical_p", "eta_cutoff", "top_n_sigma", "mirostat", "xtc"])
def test_a_real_vocabulary_is_independent_of_neighbours_and_threads(name: str) -> None:
    """Sums over one long row are split among threads by torch, sums over several rows are not."""
    logits = torch.randn(3, 50_257, generator=torch.Generator().manual_seed(3)) * 3
    rows = [row(**STRATEGIES[name][-1]) for _ in logits]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = process(logits, rows)
        torch.set_num_threads(2)
        for index, single in enumerate(rows):
            assert torch.equal(process(logits[index : index + 1], [single])[0], together[index])
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(EVERY_STRATEGY), st.permutations(range(VOCABULARY)))
def test_truncations_do_not_depend_on_how_tokens_are_numbered(seed: int, case: tuple, order: list[int]) -> None:
    name, parameters = case
    if DEFAULT_ORDER.index(name) < DEFAULT_ORDER.index("temperature"):
        return
    logits = (torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2).round(decimals=1)
    kept, again = process(logits, [row(**parameters)]), process(logits[:, order], [row(**parameters)])
    assert torch.equal(kept[:, order] > INFINITE, again > INFINITE)


def test_min_tokens_rules_out_ends_until_reached() -> None:
    logits = torch.zeros(1, VOCABULARY)
    generated = len(HISTORY) - PROMPT_LENGTH
    early = process(logits, [row(min_tokens=generated + 1, stop_token_ids=[8])])
    assert early[0, 2] == early[0, 8] == INFINITE
    assert torch.equal(process(logits, [row(min_tokens=generated, stop_token_ids=[8])]), logits)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    single = row(presence_penalty=0.5, frequency_penalty=0.25)
    single.tokens[:] = [3, 7, 7, 9, 3, 3, 41]
    processed = process(torch.zeros(1, VOCABULARY), [single])
    expected = torch.zeros(VOCABULARY)
    expected[3], expected[9], expected[41] = -0.5 - 0.5, -0.75, -0.75
    torch.testing.assert_close(processed[0], expected)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_a_row_remembers_follows_its_tokens(data: st.DataObject) -> None:
    """Tokens are appended, taken back and replaced; counts and history equal those of a row that never saw others."""
    tokens = st.lists(st.integers(0, 5), max_size=6)
    parameters = {"repetition_penalty": 1.5, "repetition_range": data.draw(st.integers(0, 7)), "presence_penalty": 1.0,
                  "dry_multiplier": 1.0, "dry_breakers": [], "no_repeat_ngram_size": 3}  # fmt: skip
    living = row(**parameters)
    living.tokens[:] = [1, 2, 3]
    logits = torch.linspace(-1, 2, VOCABULARY).unsqueeze(0)
    for _ in range(4):
        back = data.draw(st.integers(0, len(living.tokens) - PROMPT_LENGTH))
        del living.tokens[len(living.tokens) - back :]
        living.tokens += data.draw(tokens)
        fresh = Row(living.parameters, list(living.tokens), PROMPT_LENGTH, end_token_ids=(2,))
        assert torch.equal(process(logits, [living]), process(logits, [fresh]))


def dry_by_hand(tokens: list[int], allowed: int, base: float, multiplier: float, breakers: list[int]) -> dict:
    """The definition, in the slow way: the longest earlier passage that ends like the context, for each next token."""
    longest: dict[int, int] = {}
    for place in range(len(tokens) - 1):
        length = 0
        while length <= place and tokens[place - length] == tokens[-1 - length]:
            if tokens[place - length] in breakers:
                break
            length += 1
        if length >= allowed and tokens[place + 1] not in breakers:
            longest[tokens[place + 1]] = max(length, longest.get(tokens[place + 1], 0))
    return {token: multiplier * base ** (length - allowed) for token, length in longest.items()}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 30), st.booleans())
def test_dry_equals_its_definition(tokens: list[int], allowed: int, last: int, broken: bool) -> None:
    breakers = [4] if broken else []
    single = row(dry_multiplier=0.7, dry_base=1.5, dry_allowed_length=allowed, dry_range=last,
                 dry_breakers=[[breaker] for breaker in breakers])  # fmt: skip
    single.tokens[:], single.prompt_length = tokens, 1
    processed = process(torch.zeros(1, VOCABULARY), [single])[0]
    expected = torch.zeros(VOCABULARY)
    for token, penalty in dry_by_hand(tokens[-last:] if last else tokens, allowed, 1.5, 0.7, breakers).items():
        expected[token] -= penalty
    torch.testing.assert_close(processed, expected)


def test_dry_breaks_at_sequences_too() -> None:
    single = row(dry_multiplier=1.0, dry_breakers=[[7, 8]])
    single.tokens[:] = [1, 7, 8, 2, 3, 5, 1, 7, 8, 2, 3]
    processed = process(torch.zeros(1, VOCABULARY), [single])[0]
    assert float(processed[5]) == -1.0, "2 3 was seen before 5: two tokens since the breaker, one more than free"
    single.parameters = row(dry_multiplier=1.0, dry_breakers=[]).parameters
    assert float(process(torch.zeros(1, VOCABULARY), [single])[0, 5]) == pytest.approx(-(1.75**3))


def test_dynamic_temperature_reaches_both_ends() -> None:
    certain, uncertain = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    certain[3] = 200.0
    processed = process(torch.stack([certain, uncertain + torch.arange(VOCABULARY) * 1e-4]),
                        [row(dynamic_temperature_range=0.5)] * 2)  # fmt: skip
    assert float(processed[0, 3]) == pytest.approx(200.0 / 0.5)
    assert float(processed[1, 49]) == pytest.approx(49e-4 / 1.5, rel=1e-4)


def test_top_n_sigma_and_top_a_by_hand() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -6.0, INFINITE] + [INFINITE] * (VOCABULARY - 6)])
    # Mean 0, squares 9 + 4 + 1 + 0 + 36 = 50, sigma sqrt(10) = 3.16.
    assert (process(logits, [row(top_n_sigma=0.9)])[0] > INFINITE).nonzero().view(-1).tolist() == [0, 1, 2]
    probabilities = logits.softmax(-1)[0]
    expected = (probabilities >= 0.35 * probabilities[0] ** 2).nonzero().view(-1).tolist()
    assert (process(logits, [row(top_a=0.35)])[0] > INFINITE).nonzero().view(-1).tolist() == expected == [0, 1]


def test_xtc_leaves_the_least_of_the_top_choices_and_only_by_chance() -> None:
    logits = torch.full((VOCABULARY,), -8.0)
    logits[[4, 9, 30]] = torch.tensor([2.0, 1.0, 1.5])
    always = process(logits[None], [row(xtc_probability=1.0)])[0]
    assert (always == INFINITE).nonzero().view(-1).tolist() == [4, 30]
    happened = sum(
        bool((process(logits[None], [row(seed, xtc_probability=0.3)]) == INFINITE).any()) for seed in range(400)
    )
    assert 80 < happened < 160
    lone = torch.full((VOCABULARY,), -8.0)
    lone[4] = 3.0
    assert torch.equal(process(lone[None], [row(xtc_probability=1.0)])[0], lone)


def test_mirostat_cuts_by_surprise_and_learns() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))
    single = Row(row(mirostat=2, mirostat_tau=1.0, mirostat_eta=0.5).parameters, [1], 1)
    assert (process(logits, [single]) > INFINITE)[0].tolist() == [True, True, False, False, False]
    single.surprise_bounds[:] = [3.5]
    assert (process(logits, [single]) > INFINITE)[0].tolist() == [True, True, True, False, False]


def furthest(name: str) -> list[dict[str, Any]]:
    """Requests that set each number of a stage to the ends of its range and of its slider."""
    found = []
    for each in (BY_NAME[parameter] for parameter in STAGES[name].parameters):
        needed = {} if each.needs is None else {each.needs: BY_NAME[each.needs].slider[1]}
        ends = {end for end in (each.minimum, each.maximum, *(each.slider or ())[:2]) if end is not None}
        # 1 of mirostat stands for nothing here.
        found += [needed | {each.name: end} for end in sorted(ends) if (each.name, end) != ("mirostat", 1)]
    return found


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.keeps_best])
def test_what_promises_to_keep_the_most_likely_token_does(name: str) -> None:
    logits = awkward_logits()
    best = logits == logits.amax(-1, keepdim=True)
    for parameters in (*STRATEGIES[name], *furthest(name)):
        kept = process(logits, [row(**parameters) for _ in logits])
        stays = (kept == kept.amax(-1, keepdim=True)) & (kept > INFINITE)
        assert bool(stays[best].all()), (
            f"{name} is declared with keeps_best=True, and with {parameters} the most likely token does not stay so"
        )


def test_the_order_is_the_request_s_own() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05] + [1e-9] * (VOCABULARY - 4)]))
    first = process(logits, [row(temperature=2.0, top_p=0.78, order=["temperature", "top_p"])])
    last = process(logits, [row(temperature=2.0, top_p=0.78, order=["top_p", "temperature"])])
    assert (first > INFINITE).sum() == 3
    assert (last > INFINITE).sum() == 2


def test_bias_and_penalties_reach_what_a_truncation_left() -> None:
    logits = torch.arange(VOCABULARY, dtype=torch.float32).unsqueeze(0) / 10
    single = row(top_k=3, logit_bias={48: 2.0, 5: 99.0}, repetition_penalty=2.0,
                 order=["top_k", "logit_bias", "repetition_penalty"])  # fmt: skip
    single.tokens.append(49)
    processed = process(logits, [single])[0]
    assert (processed > INFINITE).nonzero().view(-1).tolist() == [47, 48, 49]
    assert processed[47:].tolist() == pytest.approx([4.7, 6.8, 2.45])


def test_a_tiny_temperature_is_its_limit() -> None:
    processed = process(torch.tensor([[3.0, 2.0, -1e4]]), [row(temperature=1e-300)])
    assert math.isclose(float(processed.double().softmax(-1)[0, 0]), 1.0)
