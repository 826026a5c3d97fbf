"""What a request leaves out: the checkpoint's own defaults, which give way to what is sent, and tame ones for chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkapi.model.decoding.parameters import (
    BY_NAME,
    CHAT_DEFAULTS,
    DecodingParameters,
    check_generation_config,
    decoding_defaults,
    from_generation_config,
    resolve,
)
from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.commands.cli import main

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "stored,sent,gives_way",
    [
        ({"min_new_tokens": 10}, {"max_tokens": 5}, {"min_tokens": 0}),
        ({"max_new_tokens": 5}, {"min_tokens": 10}, {"max_tokens": None}),
        ({"min_new_tokens": 10, "max_new_tokens": 5, "top_k": 3}, {}, {"min_tokens": 0, "max_tokens": 5, "top_k": 3}),
        ({"do_sample": False}, {"mirostat": 2}, {"temperature": 1.0, "mirostat": 2}),
        ({"do_sample": False}, {"best_of": 2}, {"temperature": 1.0, "best_of": 2}),
        ({"do_sample": False}, {"xtc_probability": 0.5}, {"temperature": 1.0, "xtc_probability": 0.5}),
        ({"temperature": 0.0, "top_k": 5}, {"dynamic_temperature_range": 0.5}, {"temperature": 1.0, "top_k": 5}),
        ({"top_k": 5, "top_p": 0.9}, {"mirostat": 2}, {"top_k": 0, "top_p": 1.0}),
        ({"top_k": 5, "repetition_penalty": 1.2}, {"order": ["repetition_penalty"]}, {"top_k": 0}),
        (
            {"top_k": 5, "top_p": 0.5, "temperature": 0.5, "repetition_penalty": 1.2},
            {"order": ["temperature"]},
            {"top_k": 0, "top_p": 1.0, "temperature": 0.5, "repetition_penalty": 1.0},
        ),
        ({"suppress_tokens": [3, 4]}, {"allowed_token_ids": [3]}, {"banned_token_ids": []}),
        ({"bad_words_ids": [[3]]}, {"allowed_token_ids": [3]}, {"bad_words": []}),
        ({"min_new_tokens": 2}, {"allowed_token_ids": [0]}, {"min_tokens": 0}),
        ({"top_k": 50, "min_new_tokens": 9}, {"penalty_alpha": 0.6, "max_tokens": 4}, {"top_k": 50, "min_tokens": 0}),
        ({"top_p": 0.9}, {"num_beams": 2}, {"top_p": 1.0, "temperature": 0.0}),
    ],
)
def test_a_stored_default_gives_way_to_what_is_sent(stored: dict, sent: dict, gives_way: dict) -> None:
    effective = resolve(sent, from_generation_config(stored), vocab_size=50, end_token_ids=[0])
    assert {name: getattr(effective, name) for name in gives_way} == gives_way
    assert {name: getattr(effective, name) for name in sent if name != "order"} == {
        n: v for n, v in sent.items() if n != "order"
    }


def test_what_was_sent_is_refused_by_its_own_name_whatever_is_stored() -> None:
    stored = from_generation_config({"min_new_tokens": 10, "top_k": 4})
    with pytest.raises(InvalidRequest, match="include_stop has no effect"):
        resolve({"max_tokens": 5, "include_stop": True}, stored)
    with pytest.raises(InvalidRequest, match="min_tokens .8. is above max_tokens .5."):
        resolve({"max_tokens": 5, "min_tokens": 8}, stored)


@pytest.mark.parametrize(
    "stored,sent,says",
    [
        ({"top_p": 0.5}, {"order": ["temperature"], "top_a": 0.5}, "order leaves out 'top_a', which is in force"),
        (
            {"top_p": 0.5, "repetition_penalty": 1.2},
            {"order": ["temperature"], "xtc_probability": 0.5, "top_a": 0.5},
            "order leaves out 'top_a' and 'xtc', which are in force",
        ),
        ({"temperature": 0.0}, {"mirostat": 2, "top_k": 5}, "mirostat decides itself where to cut .* with top_k"),
        ({"top_k": 4, "min_new_tokens": 9}, {"penalty_alpha": 0.6, "min_tokens": 5, "max_tokens": 3}, "min_tokens"),
    ],
)
def test_a_refusal_names_what_was_sent_and_not_what_is_stored(stored: dict, sent: dict, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        resolve(sent, from_generation_config(stored))


NUMBERS = st.sampled_from([0, 1, 2, 0.5, 0.9, 5, 20])
STORED = st.dictionaries(
    st.sampled_from(["temperature", "top_k", "top_p", "min_p", "typical_p", "max_new_tokens", "min_new_tokens",
                     "repetition_penalty", "no_repeat_ngram_size", "do_sample", "suppress_tokens"]),
    NUMBERS | st.booleans() | st.lists(st.integers(0, 9), max_size=9),
)  # fmt: skip
SENT = st.dictionaries(st.sampled_from(sorted(BY_NAME)), NUMBERS | st.booleans() | st.lists(st.integers(0, 9)))


@given(STORED, SENT)
def test_no_stored_defaults_make_a_request_fail(stored: dict, sent: dict) -> None:
    try:
        check_generation_config(stored, 10, "here")
        alone = resolve(sent, vocab_size=10, end_token_ids=[0])
    except (CheckpointError, InvalidRequest):
        return
    effective = resolve(sent, from_generation_config(stored), vocab_size=10, end_token_ids=[0])
    assert {name: getattr(effective, name) for name in sent if name != "order"} == {
        name: getattr(alone, name) for name in sent if name != "order"
    }


@pytest.mark.parametrize(
    "stored,says",
    [
        ({"top_p": 2}, "top_p must be at most 1"),
        ({"top_k": -5}, "top_k must be at least 0"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"min_new_tokens": -3}, "min_new_tokens must be at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"suppress_tokens": [512]}, "suppress_tokens names token id 512, but the vocabulary has ids 0 to 511"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list"),
        ({"bad_words_ids": [[1, 600]]}, "bad_words_ids names token id 600"),
    ],
)
def test_a_stored_default_that_no_request_could_be_answered_with_is_refused_at_load(
    stored: dict, says: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    path = tiny_checkpoint("stored", generation=stored)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_checkpoint(path)
    assert str(path / "generation_config.json") in caught.value.message and caught.value.field in stored


def test_top_k_minus_one_keeps_all() -> None:
    assert from_generation_config({"top_k": -1}) == {"top_k": 0}
    assert resolve({}, from_generation_config({"top_k": -1})).top_k == 0


def test_a_conversation_is_tame_where_nothing_is_stored_of_how_tokens_are_drawn() -> None:
    for nothing in ({}, {"eos_token_id": 2}, {"do_sample": True}):
        assert decoding_defaults(nothing, chat=True) == CHAT_DEFAULTS
        assert decoding_defaults(nothing, chat=False) == {}
    assert decoding_defaults({"repetition_penalty": 1.1}, chat=True) == CHAT_DEFAULTS | {"repetition_penalty": 1.1}
    for something in ({"temperature": 1.0}, {"top_k": 50}, {"top_p": 0.5}, {"min_p": 0.1}, {"do_sample": False}):
        assert decoding_defaults(something, chat=True) == from_generation_config(something)


ALL_STORED: dict[str, Any] = {
    "temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01, "xtc_probability": 0.1, "xtc_threshold": 0.2, "repetition_penalty": 1.3,
    "repetition_range": 7, "no_repeat_ngram_size": 3, "max_new_tokens": 3, "min_new_tokens": 2, "suppress_tokens": [9],
    "bad_words_ids": [[8]],
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator[Any]:
    """A server of checkpoints without stored defaults, with some, and with all there are."""
    stored = {"min_new_tokens": 10, "top_k": -1, "temperature": 0.9}
    some, every = tiny_checkpoint("stored", generation=stored), tiny_checkpoint("every", generation=ALL_STORED)
    with serve(tiny_checkpoint("plain"), some, every) as served:
        yield served


@pytest.mark.parametrize(
    "path,body",
    [
        ("/completion", {"prompt": "Hello", "seed": 3, "n_predict": -1}),
        ("/completion", {"prompt": "Hello", "seed": 3, "n_predict": 4, "mirostat": 2}),
        ("/generate", {"inputs": "Hello", "parameters": {"do_sample": True, "seed": 3}}),
        ("/generate", {"inputs": "Hello"}),
    ],
)
def test_dialects_with_defaults_of_their_own_take_none_of_the_checkpoint(
    plain: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict
) -> None:
    from topkapi.service.api.llama import completion as llama
    from topkapi.service.api.tgi import routes as tgi
    from topkapi.service.generation import plan

    assert from_generation_config(ALL_STORED).keys() >= {"temperature", "max_tokens", "min_tokens", "bad_words"}
    seen: list[list[DecodingParameters]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        planned = plan(*arguments, **options)
        seen.append([replace(each, seed=0) for each in planned.parameters])
        return planned

    for dialect in (llama, tgi):
        monkeypatch.setattr(dialect, "plan", spy)
    for model in ("every", "plain"):
        plain.models.change(model, default=True)
        assert plain.client.post(path, json=body).status_code == 200
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "path,body,tame",
    [
        ("/generate", {"messages": MESSAGES}, True),
        ("/v1/chat/completions", {"messages": MESSAGES}, True),
        ("/chat/completions", {"messages": MESSAGES}, True),
        ("/v1/responses", {"input": "Hello"}, True),
        ("/v1/messages", {"messages": MESSAGES}, True),
        ("/generate", {"prompt": "Hello"}, False),
        ("/v1/completions", {"prompt": "Hello"}, False),
    ],
)
def test_every_dialect_answers_messages_tamely(
    plain: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict, tame: bool
) -> None:
    seen: list[DecodingParameters] = []

    def spy(*arguments: Any, **options: Any) -> DecodingParameters:
        seen.append(resolve(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr("topkapi.service.generation.resolve", spy)
    limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    whole = {"model": "plain", limit: 2, **body}
    assert plain.client.post(path, json=whole).status_code == 200
    assert plain.client.post(path, json=whole | {"temperature": 0.3, "top_p": 0.4}).status_code == 200
    expected = CHAT_DEFAULTS if tame else {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
    assert {name: getattr(seen[0], name) for name in expected} == expected
    assert {name: getattr(seen[1], name) for name in expected} == expected | {"temperature": 0.3, "top_p": 0.4}


def test_the_defaults_are_shown_and_echoed(plain: Any) -> None:
    shown = {each["name"]: each for each in plain.client.get("/models").json()["models"]}
    assert (shown["plain"]["defaults"], shown["plain"]["chat_defaults"]) == ({}, CHAT_DEFAULTS)
    assert shown["stored"]["defaults"] == shown["stored"]["chat_defaults"]
    answer = plain.client.post("/generate", json={"messages": MESSAGES, "max_tokens": 2}).json()
    assert {name: answer["parameters"][name] for name in CHAT_DEFAULTS} == CHAT_DEFAULTS
    answer = plain.client.post("/generate", json={"model": "stored", "messages": MESSAGES, "max_tokens": 5}).json()
    used = {name: answer["parameters"][name] for name in ("max_tokens", "min_tokens", "top_k", "temperature", "top_p")}
    assert used == {"max_tokens": 5, "min_tokens": 0, "top_k": 0, "temperature": 0.9, "top_p": 1.0}


def test_an_order_is_held_to_the_stages_that_were_asked_for(plain: Any) -> None:
    body = {"model": "every", "prompt": "Hello", "order": ["temperature"]}
    refused = plain.client.post("/generate", json=body | {"top_a": 0.5})
    assert refused.status_code == 422
    assert "order leaves out 'top_a', which is in force" in refused.json()["error"]["message"]
    assert plain.client.post("/generate", json=body | {"max_tokens": 2}).status_code == 200


def test_the_limit_that_an_answer_has_reached_may_be_the_checkpoint_s_own(plain: Any) -> None:
    body = {"model": "every", "prompt": "Hello", "answer_prefix": [5, 6, 7]}
    error = plain.client.post("/generate", json=body).json()["error"]
    assert "max_tokens (3) counts them" in error["message"] and error["hint"] == "send a max_tokens above 3"
    assert plain.client.post("/generate", json=body | {"max_tokens": 4}).status_code == 200


def test_the_terminal_is_tame_too(tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_checkpoint("plain"))
    for more, expected in (("--chat",), CHAT_DEFAULTS), ((), {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}):
        assert main(["generate", "Hello", "-c", path, "--json", "--max-tokens", "2", *more]) == 0
        used = json.loads(capsys.readouterr().out)["parameters"]
        assert {name: used[name] for name in expected} == expected
