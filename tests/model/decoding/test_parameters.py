"""The table's own promises: nothing unknown, nothing out of range, nothing silently ignored."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkapi.model.decoding import documentation
from topkapi.model.decoding.parameters import (
    BY_NAME,
    CONSTRAINTS,
    DEFAULT_ORDER,
    PARAMETERS,
    from_generation_config,
    in_force,
    resolve,
)
from topkapi.model.errors import InvalidRequest


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        ({"top_k": -1}, "top_k", r"at least 0 \(0 means off\), not -1$"),
        ({"top_p": 1.5}, "top_p", r"at most 1 \(1 means off\), not 1.5$"),
        ({"temperature": -1}, "temperature", r"at least 0, not -1$"),
        ({"n": 0}, "n", r"at least 1, not 0$"),
        ({"repetition_penalty": 0}, "repetition_penalty", r"above 0, not 0$"),
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
        *(
            ({"logit_bias": {key: 1}}, "logit_bias", "is no id")
            for key in ("٣", "+3", "03", " 3", "3_0", "3.0", "", "9" * 5000, 3.7, True, None)
        ),
        ({"logit_bias": {99: 1}}, "logit_bias", "vocabulary"),
        ({"stop_token_ids": [50]}, "stop_token_ids", "vocabulary"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "above max_tokens"),
        ({"ignore_end_token": 1}, "ignore_end_token", "true or false"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"bad_words": [""]}, "bad_words", "none of them empty"),
        ({"bad_words": [[3, "a"]]}, "bad_words", "whole number"),
        ({"bad_words": [[3, 50]]}, "bad_words", "vocabulary"),
        ({"bad_words": ["text"]}, "bad_words", "no tokenizer"),
        ({"dry_multiplier": 1}, "dry_breakers", "no tokenizer"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
        ({"allowed_token_ids": [3, 4], "banned_token_ids": [4, 3]}, "banned_token_ids", "every token"),
        ({"allowed_token_ids": [3], "bad_words": [[3]]}, "bad_words", "every token"),
        ({"banned_token_ids": list(range(50))}, "banned_token_ids", "every token"),
        ({"allowed_token_ids": [0, 7], "min_tokens": 2, "stop_token_ids": [7]}, "min_tokens", "no other one"),
        ({"order": ["top_k", "nonsense"]}, "order", "not a stage"),
        ({"order": ["top_k", "top_k"]}, "order", "twice"),
        ({"order": ["temperature"], "top_k": 5}, "order", "leaves out 'top_k'"),
        ({"order": ["top_k", "min_tokens"]}, "order", "settled first"),
        ({"mirostat": 1}, "mirostat", "2 .version 2. or 0"),
        ({"mirostat": 2, "top_k": 5}, "top_k", "can't be combined"),
        ({"mirostat": 2, "xtc_probability": 0.1}, "xtc_probability", "can't be combined"),
        ({"mirostat": 2, "temperature": 0}, "mirostat", "temperature 0"),
        ({"dynamic_temperature_range": 1, "temperature": 0}, "dynamic_temperature_range", "temperature 0"),
        ({"xtc_probability": 1, "temperature": 0}, "xtc_probability", "temperature 0"),
        ({"mirostat_tau": 3}, "mirostat_tau", "no effect without mirostat"),
        ({"dry_base": 3}, "dry_base", "no effect without dry_multiplier"),
        ({"repetition_range": 3}, "repetition_range", "no effect without repetition_penalty"),
        ({"include_stop": True}, "include_stop", "no effect"),
        ({"timeout_s": 0}, "timeout_s", "above 0"),
        ({"n": 3, "best_of": 2}, "best_of", "below n"),
        ({"best_of": 2, "temperature": 0}, "best_of", "temperature 0"),
        ({"num_beams": 2, "n": 3}, "n", "above num_beams"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups", "equal groups"),
        ({"num_beams": 4, "diversity_penalty": 1}, "diversity_penalty", "without num_beam_groups"),
        ({"length_penalty": 2}, "length_penalty", "without num_beams"),
        ({"early_stopping": True}, "early_stopping", "without num_beams"),
        ({"num_beams": 2, "mirostat": 2}, "mirostat", "can't be combined with num_beams"),
        ({"num_beams": 2, "prompt_lookup": 2}, "prompt_lookup", "can't be combined with num_beams"),
        ({"num_beams": 2, "best_of": 2}, "best_of", "can't be combined with num_beams"),
        ({"num_beams": 2, "penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha", "can't be combined with num_beams"),
        ({"guidance_scale": 2, "penalty_alpha": 0.5, "top_k": 4}, "guidance_scale", "combined with penalty_alpha"),
        ({"num_beams": 2, "temperature": 0.7}, "temperature", "can't be combined with num_beams"),
        ({"num_beams": 2, "top_p": 0.7}, "top_p", "can't be combined with num_beams"),
        ({"penalty_alpha": 0.5, "top_k": 4, "min_p": 0.1}, "min_p", "can't be combined with penalty_alpha"),
        ({"penalty_alpha": 0.5}, "top_k", "nothing to choose from"),
        ({"negative_prompt": "no"}, "negative_prompt", "without guidance_scale"),
        ({"negative_prompt": [99], "guidance_scale": 2}, "negative_prompt", "vocabulary"),
        ({"negative_prompt": "", "guidance_scale": 2}, "negative_prompt", "not an empty one"),
        ({"dola_layers": "middle"}, "dola_layers", "low"),
        ({"dola_layers": []}, "dola_layers", "low"),
    ],
)
def test_bad_values_are_refused_by_name(request_: dict, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        resolve(request_, vocab_size=50, end_token_ids=[0])
    assert caught.value.field == field


def test_unknown_fields_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve({"temprature": 1})
    assert "temperature" in str(caught.value.hint)
    with pytest.raises(InvalidRequest) as caught:
        resolve({"max_new_tokens": 1})
    assert "max_tokens" in str(caught.value.hint)


def test_stages_in_one_text_are_told_apart() -> None:
    for order in (["temperature,top_a"], "temperature; top_a"):
        with pytest.raises(InvalidRequest, match="is not a stage") as caught:
            resolve({"order": order, "top_a": 0.5})
        assert caught.value.hint == 'name each stage by itself: ["temperature", "top_a"], or --order once for each'


def test_defaults_of_the_table_are_in_range() -> None:
    effective = resolve({})
    assert effective.as_dict().keys() == BY_NAME.keys()
    assert resolve(effective.as_dict()) == effective
    for parameter in PARAMETERS:
        if parameter.slider:
            main = {} if parameter.needs is None else {parameter.needs: BY_NAME[parameter.needs].slider[1]}
            for end in parameter.slider[:2]:
                request = main | {parameter.name: end}
                request |= {"top_k": 4} if parameter.name == "penalty_alpha" else {}
                resolve(request | ({"dry_breakers": []} if request.get("dry_multiplier") else {}))


def test_request_wins_over_checkpoint_wins_over_table() -> None:
    checkpoint = from_generation_config({"temperature": 0.6, "top_k": 20, "eos_token_id": 3, "max_new_tokens": 64})
    effective = resolve({"top_k": 5, "top_p": None}, checkpoint)
    assert (effective.temperature, effective.top_k, effective.top_p) == (0.6, 5, 1.0)
    assert effective.max_tokens == 64


def test_generation_config_without_sampling_is_greedy() -> None:
    effective = resolve({}, from_generation_config({"do_sample": False, "temperature": 0.6, "top_k": 50}))
    assert (effective.temperature, effective.top_k) == (0.0, 0)


ANY_VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.dictionaries(st.sampled_from(sorted(BY_NAME)), ANY_VALUE))
def test_any_values_resolve_or_are_refused(request_: dict) -> None:
    try:
        effective = resolve(request_, vocab_size=100)
    except InvalidRequest as error:
        assert error.field in BY_NAME
    else:
        assert resolve(effective.as_dict(), vocab_size=100) == effective


def test_what_only_the_checkpoint_asks_for_gives_way() -> None:
    checkpoint = from_generation_config({"top_k": 50, "top_p": 0.9, "temperature": 0.6})
    effective = resolve({"mirostat": 2}, checkpoint)
    assert (effective.top_k, effective.top_p, effective.temperature) == (0, 1.0, 0.6)
    assert resolve(effective.as_dict()) == effective
    effective = resolve({"repetition_penalty": 1.0}, {"repetition_penalty": 1.2, "repetition_range": 64})
    assert effective.repetition_range == 0


def test_a_search_is_at_temperature_zero_whatever_the_checkpoint_says() -> None:
    checkpoint = from_generation_config({"top_k": 50, "top_p": 0.9, "temperature": 0.6})
    beams = resolve({"num_beams": 3}, checkpoint)
    assert (beams.temperature, beams.top_k, beams.top_p) == (0.0, 0, 1.0)
    contrastive = resolve({"penalty_alpha": 0.6, "top_k": 4}, checkpoint)
    assert (contrastive.temperature, contrastive.top_k, contrastive.top_p) == (0.0, 4, 1.0)
    assert resolve(beams.as_dict()) == beams
    assert resolve(contrastive.as_dict()) == contrastive


def test_the_order_in_force_is_complete_and_can_be_sent_again() -> None:
    assert resolve({}).order == list(DEFAULT_ORDER)
    effective = resolve({"order": ["top_p", "temperature"], "top_p": 0.9, "temperature": 0.5, "min_tokens": 3})
    assert effective.order == [*CONSTRAINTS, "top_p", "temperature"]
    assert resolve(effective.as_dict()) == effective


def test_every_stage_is_in_the_table_and_every_default_is_off_or_needed() -> None:
    stages = {parameter.stage for parameter in PARAMETERS if parameter.stage}
    assert stages == set(DEFAULT_ORDER)
    assert in_force(resolve({})) == set()
    for parameter in PARAMETERS:
        assert parameter.needs is None or BY_NAME[parameter.needs].stage == parameter.stage


def test_no_two_parameters_share_a_name() -> None:
    names = [name for parameter in PARAMETERS for name in (parameter.name, *parameter.aliases)]
    assert len(names) == len(set(names))


def test_texts_become_the_sequences_that_can_spell_them(tiny_tokenizer) -> None:
    effective = resolve({"bad_words": ["the", [1, 2]], "dry_multiplier": 1}, vocabulary=tiny_tokenizer)
    words = effective.bad_words
    assert words == ["the", [1, 2]], "the echo is what was sent"
    assert set(words.sequences) == {tuple(tiny_tokenizer.encode("the")), tuple(tiny_tokenizer.encode(" the")), (1, 2)}
    assert resolve(effective.as_dict()).bad_words.sequences == words.sequences
    breakers = set(effective.dry_breakers.sequences)
    holding = {(i,) for i in range(512) if any(b in tiny_tokenizer.token_bytes(i) for b in (b"\n", b":", b'"', b"*"))}
    assert breakers == holding
    assert json.loads(json.dumps(effective.as_dict())) == effective.as_dict()


def test_a_breaker_across_tokens_is_found(tiny_tokenizer) -> None:
    effective = resolve({"dry_multiplier": 1, "dry_breakers": ["zqx"]}, vocabulary=tiny_tokenizer)
    sequences = effective.dry_breakers.sequences
    assert tuple(tiny_tokenizer.encode("zqx")) in sequences
    for sequence in sequences:
        assert b"zqx" in b"".join(map(tiny_tokenizer.token_bytes, sequence))


def test_the_documentation_is_current_and_complete() -> None:
    """`python -m topkapi.model.decoding.documentation` writes it."""
    text = documentation.page()
    assert documentation.PAGE.read_text(encoding="utf-8") == text, "python -m topkapi.model.decoding.documentation"
    for parameter in PARAMETERS:
        assert text.count(f"| `{parameter.name}` | ") >= 1
    for stage in DEFAULT_ORDER:
        assert f"| `{stage}` | " in text
