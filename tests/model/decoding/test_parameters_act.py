"""No parameter is ever ignored: for each one of the table, a request whose answer it changes, over HTTP."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from topkapi.model.decoding.parameters import PARAMETERS

Request = dict[str, Any]
PROMPT = "The value of the expression is"

# A random network is nearly undecided; these biases make it repeat itself and leave something to cut.
PEAKED: Request = {"logit_bias": {"5": 7.0, "6": 7.0, "7": 5.0}}
LOOPING: Request = {"logit_bias": {"5": 12.0, "6": 11.0}}
DRY: Request = {**LOOPING, "dry_multiplier": 4.0, "dry_breakers": []}
BEAMS: Request = {"num_beams": 4, "n": 4, "temperature": 0}

# The request without the parameter, and what is added to it.
EXAMPLES: dict[str, tuple[Request, Request]] = {
    "max_tokens": ({}, {"max_tokens": 3}),
    "min_tokens": ({"stop_token_ids": list(range(400))}, {"min_tokens": 6}),
    "timeout_s": ({}, {"timeout_s": 1e-6}),
    "temperature": ({}, {"temperature": 0.1}),
    "dynamic_temperature_range": (PEAKED, {"dynamic_temperature_range": 0.9}),
    "dynamic_temperature_exponent": (PEAKED | {"dynamic_temperature_range": 0.9}, {"dynamic_temperature_exponent": 5}),
    "top_k": ({}, {"top_k": 2}),
    "top_p": ({}, {"top_p": 0.1}),
    "min_p": ({}, {"min_p": 0.95}),
    "typical_p": ({}, {"typical_p": 0.1}),
    "epsilon_cutoff": (PEAKED, {"epsilon_cutoff": 0.1}),
    "eta_cutoff": (PEAKED, {"eta_cutoff": 0.9}),
    "top_n_sigma": ({}, {"top_n_sigma": 0.2}),
    "top_a": (PEAKED, {"top_a": 1.0}),
    "xtc_probability": (PEAKED, {"xtc_probability": 1.0}),
    "xtc_threshold": (PEAKED | {"xtc_probability": 1.0}, {"xtc_threshold": 0.0}),
    "mirostat": ({}, {"mirostat": 2}),
    "mirostat_tau": (PEAKED | {"mirostat": 2}, {"mirostat_tau": 0.5}),
    "mirostat_eta": (PEAKED | {"mirostat": 2, "mirostat_tau": 1.0}, {"mirostat_eta": 0.9}),
    "repetition_penalty": (LOOPING, {"repetition_penalty": 8.0}),
    "repetition_range": (LOOPING | {"repetition_penalty": 8.0}, {"repetition_range": 1}),
    "presence_penalty": (LOOPING, {"presence_penalty": 2.0}),
    "frequency_penalty": (LOOPING, {"frequency_penalty": 2.0}),
    "dry_multiplier": (LOOPING | {}, {"dry_multiplier": 4.0}),
    "dry_base": (DRY, {"dry_base": 8.0}),
    "dry_allowed_length": (DRY, {"dry_allowed_length": 9}),
    "dry_range": (DRY, {"dry_range": 3}),
    "dry_breakers": (DRY, {"dry_breakers": [[5], [6]]}),
    "no_repeat_ngram_size": (LOOPING, {"no_repeat_ngram_size": 2}),
    "logit_bias": ({}, PEAKED),
    "allowed_token_ids": ({}, {"allowed_token_ids": [5, 6]}),
    "banned_token_ids": (LOOPING, {"banned_token_ids": [5]}),
    "bad_words": (LOOPING, {"bad_words": [[5, 5]]}),
    "json_schema": ({}, {"json_schema": {"type": "integer"}}),
    "json_object": ({}, {"json_object": True}),
    "regex": ({}, {"regex": "[0-9]{3}"}),
    "choice": ({}, {"choice": ["yes", "no"]}),
    "grammar": ({}, {"grammar": 'start: "a" | "b"'}),
    "guidance_scale": ({}, {"guidance_scale": 8.0}),
    "negative_prompt": ({"guidance_scale": 8.0}, {"negative_prompt": "something quite different"}),
    "dola_layers": ({"logprobs": 1}, {"dola_layers": "low"}),
    "num_beams": ({}, {"num_beams": 3}),
    "num_beam_groups": (BEAMS, {"num_beam_groups": 2}),
    "diversity_penalty": (BEAMS | {"num_beam_groups": 2}, {"diversity_penalty": 9.0}),
    "length_penalty": (BEAMS, {"length_penalty": -2.0}),
    "early_stopping": (BEAMS | {"logit_bias": LOOPING["logit_bias"] | {"end": 11.5}}, {"early_stopping": True}),
    "penalty_alpha": (PEAKED | {"top_k": 4}, {"penalty_alpha": 0.9}),
    "order": (PEAKED | {"temperature": 2.0, "top_p": 0.5}, {"order": ["logit_bias", "top_p", "temperature"]}),
    "prompt_lookup": (LOOPING, {"prompt_lookup": 8}),
    "seed": ({}, {"seed": 2}),
    "n": ({}, {"n": 2}),
    # Of twenty the best three are in no other order than the first three once in thousands of networks.
    "best_of": ({"n": 3}, {"best_of": 20}),
    "stop": ({}, {"stop": "e"}),
    "stop_regex": ({}, {"stop_regex": "[a-m]"}),
    "include_stop": ({"stop_regex": "[a-m]"}, {"include_stop": True}),
    "stop_token_ids": ({}, {"stop_token_ids": list(range(400))}),
    "ignore_end_token": ({"logit_bias": {"end": 100.0}}, {"ignore_end_token": True}),
    "logprobs": ({}, {"logprobs": 2}),
    "trace": ({}, {"trace": True}),
}


def outcome(answer: dict[str, Any]) -> dict[str, Any]:
    """What a caller gets, apart from the echo of the request and from what differs every time."""
    told = ("id", "created", "timings", "parameters", "order")
    return {name: value for name, value in answer.items() if name not in told}


@pytest.fixture(scope="module")
def unchanged(served) -> Callable[[Request], dict[str, Any]]:
    """The outcome of a request, asked twice; many parameters are added to the same one."""
    known: dict[str, dict[str, Any]] = {}

    def ask(request: Request) -> dict[str, Any]:
        key = json.dumps(request, sort_keys=True)
        if key not in known:
            before, again = (outcome(served.answer("/generate", **request)) for _ in range(2))
            before["usage"].pop("cached_tokens")
            again["usage"].pop("cached_tokens")
            assert before == again, "the same request must give the same answer"
            known[key] = before
        return known[key]

    return ask


# One needs a draft checkpoint: see test_speculation.py, where it changes what is guessed. The other one needs a
# checkpoint that thinks: see tests/service/api/openai/test_reasoning.py.
ELSEWHERE = {"draft_tokens", "thinking_budget"}


@pytest.mark.parametrize("name", [parameter.name for parameter in PARAMETERS if parameter.name not in ELSEWHERE])
def test_the_parameter_changes_an_answer(served, unchanged: Callable[[Request], dict[str, Any]], name: str) -> None:
    assert name in EXAMPLES, f"{name} is new in the table: add a request whose answer it changes"
    without, added = copy.deepcopy(EXAMPLES[name])
    assert name in added
    ends = served.models.get().checkpoint.config.end_token_ids
    without = {"prompt": PROMPT, "seed": 1, "max_tokens": 24, **without}
    bias = without.get("logit_bias", {})
    if "end" in bias:
        bias |= dict.fromkeys(map(str, ends), bias.pop("end"))
    after = outcome(served.answer("/generate", **(without | added)))
    after["usage"].pop("cached_tokens")
    assert after != unchanged(without)
