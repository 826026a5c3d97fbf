"""The trace of a request, recomputed by plain arithmetic from what `/score` says of every token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from topkapi.model.decoding.table import PARAMETERS, SHAPE

Floats = NDArray[np.float64]
# What one strategy makes of logits, given the tokens before and the answer so far; what is ruled out becomes -inf.
Rule = Callable[[Floats, list[int], list[int]], Floats]
PROMPT = "The value of the expression is the value of the"


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(probabilities: Floats) -> float:
    possible = probabilities[probabilities > 0]
    return float(-(possible * np.log(possible)).sum())


def keep(logits: Floats, kept: NDArray[np.bool_]) -> Floats:
    return np.where(kept, logits, -np.inf)


def likeliest(logits: Floats, order: Floats, mass: float) -> Floats:
    """The tokens in `order` until their probability reaches `mass`; those equal to the last stay."""
    probabilities = softmax(logits)
    ranked = np.argsort(order, kind="stable")
    last = ranked[int(np.searchsorted(probabilities[ranked].cumsum(), mass))]
    return keep(logits, order <= order[last])


def typical(logits: Floats) -> Floats:
    probabilities = softmax(logits)
    return np.abs(-np.log(probabilities) - entropy(probabilities))


def counted(answer: list[int], size: int) -> Floats:
    return np.bincount(np.asarray(answer, dtype=np.int64), minlength=size).astype(np.float64)


RULES: dict[str, tuple[dict[str, Any], Rule]] = {
    "temperature": ({"temperature": 0.6}, lambda x, _, __: x / 0.6),
    "top_k": ({"top_k": 7}, lambda x, _, __: keep(x, x >= np.sort(x)[-7])),
    "top_p": ({"top_p": 0.6}, lambda x, _, __: likeliest(x, -x, 0.6)),
    "min_p": ({"min_p": 0.4}, lambda x, _, __: keep(x, softmax(x) >= 0.4 * softmax(x).max())),
    "typical_p": ({"typical_p": 0.5}, lambda x, _, __: likeliest(x, typical(x), 0.5)),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.002}, lambda x, _, __: keep(x, softmax(x) >= 0.002)),
    "eta_cutoff": ({"eta_cutoff": 0.9}, lambda x, _, __: keep(
        x, softmax(x) >= min(0.9, math.sqrt(0.9) * math.exp(-entropy(softmax(x)))))),
    "top_n_sigma": ({"top_n_sigma": 1.2}, lambda x, _, __: keep(x, x >= x.max() - 1.2 * x.std())),
    "top_a": ({"top_a": 0.9}, lambda x, _, __: keep(x, softmax(x) >= 0.9 * softmax(x).max() ** 2)),
    "xtc": ({"xtc_probability": 1.0, "xtc_threshold": 0.0025}, lambda x, _, __: keep(
        x, x <= x[softmax(x) >= 0.0025].min())),
    "logit_bias": ({"logit_bias": {"5": 6.0, "9": -3.0}}, lambda x, _, __: x + np.eye(len(x))[5] * 6
                   - np.eye(len(x))[9] * 3),
    "count_penalties": ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, lambda x, _, answer:
                        x - 1.5 * (counted(answer, len(x)) > 0) - 0.5 * counted(answer, len(x))),
    "banned_token_ids": ({"banned_token_ids": list(range(40))}, lambda x, _, __: keep(x, np.arange(len(x)) >= 40)),
}  # fmt: skip
# Stages of the distribution's shape that have no row above, and where their formula is held instead.
ELSEWHERE = {"mirostat": "its bound moves with every token: test_mirostat_cuts_by_surprise_and_learns has it"}


def test_every_stage_that_cuts_has_its_formula_here() -> None:
    for name in sorted({str(row.stage) for row in PARAMETERS if row.group == SHAPE} - ELSEWHERE.keys()):
        assert name in RULES, (
            f"the stage {name} is new: add a row to RULES in {__file__}, a request and the same formula in numpy, "
            "or to ELSEWHERE why there can't be one"
        )


def log_probabilities(served: Any, token_ids: list[int], size: int) -> Floats:
    """What the network says of every token after each of `token_ids`: `[len(token_ids) - 1, size]`."""
    result = served.answer("/score", token_ids=token_ids, top=size)["results"][0]
    found = np.zeros((len(token_ids) - 1, size))
    for at, entry in enumerate(result["per_token"][1:]):
        for other in entry["top"]:
            found[at, other["token_id"]] = other["logprob"]
    return found


@pytest.mark.parametrize("stage", RULES)
def test_a_trace_by_hand_from_score(served, stage: str) -> None:
    parameters, rule = RULES[stage]
    tokenizer = served.models.get().checkpoint.tokenizer
    prompt = tokenizer.encode(PROMPT)
    wanted = {"prompt": prompt, "seed": 5, "max_tokens": 6, "ignore_end_token": True, "trace": True, "logprobs": 0}
    output = served.answer("/generate", **wanted, **parameters)["outputs"][0]
    tokens = prompt + output["token_ids"]
    all_raw = log_probabilities(served, [*tokens], tokenizer.vocab_size)
    for position, (trace, explained) in enumerate(zip(output["trace"], output["logprobs"], strict=True)):
        raw = all_raw[len(prompt) + position - 1]
        token_id = output["token_ids"][position]
        final = rule(raw, tokens[: len(prompt) + position], output["token_ids"][:position])
        probabilities = softmax(final)
        assert trace["token_id"] == token_id
        assert trace["rank"] == int((raw > raw[token_id]).sum()) + 1
        assert trace["entropy"] == pytest.approx(entropy(softmax(raw)), rel=1e-5)
        assert trace["raw_probability"] == pytest.approx(math.exp(raw[token_id]), rel=1e-5)
        assert trace["probability"] == pytest.approx(probabilities[token_id], rel=1e-4)
        assert explained["logprob"] == pytest.approx(math.log(probabilities[token_id]), abs=1e-4)
        if stage == "count_penalties" and position == 0:
            assert trace["stages"] == []
            continue
        (seen,) = trace["stages"]
        assert seen["stage"] == stage
        assert seen["kept"] == int((final > -np.inf).sum())
        assert seen["cut"] == pytest.approx(float(softmax(raw)[final == -np.inf].sum()), abs=1e-6)
        assert seen["entropy"] == pytest.approx(entropy(probabilities), rel=1e-4)
        before = [(each["token_id"], each["raw_probability"]) for each in trace["contenders"]]
        followed = np.array([token for token, _ in before])
        assert [raw for _, raw in before] == pytest.approx(softmax(raw)[followed], rel=1e-4)
        assert seen["probabilities"] == pytest.approx(probabilities[followed], rel=1e-4, abs=1e-7)
        assert [each["text"] for each in trace["contenders"]] == [
            tokenizer.token_bytes(token).decode("utf-8", "replace") for token, _ in before
        ]
        others = sorted(np.delete(probabilities, token_id), reverse=True)[: len(trace["runners_up"])]
        assert [other["probability"] for other in trace["runners_up"]] == pytest.approx(others, rel=1e-4)


def test_the_stages_of_several_strategies_in_the_requests_own_order(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    prompt = tokenizer.encode(PROMPT)
    for order in (["repetition_penalty", "temperature", "top_p"], ["top_p", "temperature", "repetition_penalty"]):
        output = served.answer(
            "/generate", prompt=prompt, seed=3, max_tokens=5, ignore_end_token=True, trace=True, temperature=0.7,
            top_p=0.5, repetition_penalty=1.4, order=order,
        )["outputs"][0]  # fmt: skip
        tokens = prompt + output["token_ids"]
        all_raw = log_probabilities(served, [*tokens], tokenizer.vocab_size)
        for position, trace in enumerate(output["trace"]):
            # The penalty looks at the sign of a logit, which log-probabilities do not have: checked up to there.
            logits = all_raw[len(prompt) + position - 1]
            assert [stage["stage"] for stage in trace["stages"]] == order
            if order[0] == "top_p":
                cut = likeliest(logits, -logits, 0.5)
                assert trace["stages"][0]["kept"] == int((cut > -np.inf).sum())
                assert trace["stages"][1]["entropy"] == pytest.approx(entropy(softmax(cut / 0.7)), rel=1e-4)
