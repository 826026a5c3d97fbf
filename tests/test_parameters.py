"""The table's own promises: nothing unknown, nothing out of range, nothing silently ignored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.decoding.parameters import BY_NAME, PARAMETERS, from_generation_config, resolve
from model.errors import InvalidRequest


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        ({"top_k": -1}, "top_k", "0 means off"),
        ({"temperature": -0.1}, "temperature", "at least 0"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": True}, "temperature", "finite number"),
        ({"top_p": 1.2}, "top_p", "at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"top_k": 2.5}, "top_k", "whole number"),
        ({"top_k": float("inf")}, "top_k", "whole number"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": 5}, "stop", "text"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {5: 101}}, "logit_bias", "at most 100"),
        ({"logit_bias": {99: 1}}, "logit_bias", "vocabulary"),
        ({"stop_token_ids": [50]}, "stop_token_ids", "vocabulary"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "above max_tokens"),
        ({"ignore_end_token": 1}, "ignore_end_token", "true or false"),
        ({"seed": -1}, "seed", "at least 0"),
    ],
)
def test_bad_values_are_refused_by_name(request_: dict, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        resolve(request_, vocab_size=50)
    assert caught.value.field == field


def test_unknown_fields_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve({"temprature": 1})
    assert "temperature" in str(caught.value.hint)
    with pytest.raises(InvalidRequest) as caught:
        resolve({"max_new_tokens": 1})
    assert "max_tokens" in str(caught.value.hint)


def test_defaults_of_the_table_are_in_range() -> None:
    effective = resolve({})
    assert effective.keys() == BY_NAME.keys()
    assert resolve(effective) == effective
    for parameter in PARAMETERS:
        if parameter.slider:
            main = {} if parameter.needs is None else {parameter.needs: BY_NAME[parameter.needs].slider[1]}
            for end in parameter.slider[:2]:
                request = main | {parameter.name: end}
                resolve(request | ({"dry_breakers": []} if request.get("dry_multiplier") else {}))


def test_request_wins_over_checkpoint_wins_over_table() -> None:
    checkpoint = from_generation_config({"temperature": 0.6, "top_k": 20, "eos_token_id": 3, "max_new_tokens": 64})
    effective = resolve({"top_k": 5, "top_p": None}, checkpoint)
    assert (effective["temperature"], effective["top_k"], effective["top_p"]) == (0.6, 5, 1.0)
    assert effective["max_tokens"] == 64


def test_generation_config_without_sampling_is_greedy() -> None:
    effective = resolve({}, from_generation_config({"do_sample": False, "temperature": 0.6, "top_k": 50}))
    assert (effective["temperature"], effective["top_k"]) == (0.0, 0)


ANY_VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.dictionaries(st.sampled_from(sorted(BY_NAME)), ANY_VALUE))
def test_any_values_resolve_or_are_refused(request_: dict) -> None:
    try:
        effective = resolve(request_, vocab_size=100)
    except InvalidRequest as error:
        assert error.field in BY_NAME
    else:
        assert resolve(effective, vocab_size=100) == effective
