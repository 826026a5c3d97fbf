"""POST /v1/completions: echo and log-probabilities that an evaluation can trust, streams, and what is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.service.api.openai.openai_cases import chunks, refused
from topkapi.model.scoring import score
from topkapi.service.api.openai.completions import CompletionResponse
from topkapi.service.api.openai.logprobs import CompletionLogprobsWriter, Scored

PATH = "/v1/completions"
PROMPT = "The value of the expression is"


def byte_ids(served, raw: bytes) -> list[int]:
    """The ids of single-byte tokens."""
    tokenizer = served.models.get().checkpoint.tokenizer
    return [next(i for i in range(512) if tokenizer.token_bytes(i) == bytes([byte])) for byte in raw]


def test_an_answer_has_openais_shape_and_defaults(served) -> None:
    answer = served.answer(PATH, prompt=PROMPT, seed=1, ignore_eos=True)
    assert CompletionResponse.model_validate(answer).model_dump(exclude_unset=True) == answer
    (choice,) = answer["choices"]
    assert answer["object"] == "text_completion" and choice["finish_reason"] == "length"
    assert (answer["usage"]["completion_tokens"], choice["logprobs"]) == (16, None)
    native = served.answer("/generate", prompt=PROMPT, seed=1, max_tokens=16, ignore_end_token=True)
    assert choice["text"] == native["outputs"][0]["text"]


def test_echoed_log_probabilities_are_those_of_the_network_with_the_best_beside(served) -> None:
    checkpoint = served.models.get().checkpoint
    ids = checkpoint.tokenizer.encode(PROMPT)
    (choice,) = served.answer(PATH, prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    logprobs = choice["logprobs"]
    expected = score(checkpoint.model, ids, top=1)
    assert logprobs["token_logprobs"][:-1] == [None, *expected.logprobs]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(ids) + 1
    assert logprobs["top_logprobs"][0] is None
    for position, ((_, best),) in enumerate(expected.tops, start=1):
        tops = logprobs["top_logprobs"][position]
        assert max(tops.values()) == best and logprobs["token_logprobs"][position] in tops.values()
    # The generated token is greedy: it is the best one, to the last bit.
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    assert choice["text"].startswith(PROMPT)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_an_end_token_still_makes_one_more_entry(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    ids, end = tokenizer.encode(PROMPT), tokenizer.control_tokens["<|endoftext|>"]
    forced = {"allowed_token_ids": [end], "max_tokens": 1, "temperature": 0}
    (choice,) = served.answer(PATH, prompt=[ids], echo=True, logprobs=1, **forced)["choices"]
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (PROMPT, "stop", None)


def test_log_probabilities_do_not_depend_on_the_cache_or_on_company(served) -> None:
    ids = served.models.get("base").checkpoint.tokenizer.encode("a prefix that comes again and again " * 12)
    body = {"model": "base", "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
    (cold,) = served.answer(PATH, prompt=[ids], **body)["choices"]
    warm = served.answer(PATH, prompt=[ids], **body)
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert warm["choices"][0]["logprobs"] == cold["logprobs"]
    together = served.answer(PATH, prompt=[ids[5:60], ids, ids[1:40]], **body)["choices"]
    assert together[1]["logprobs"] == cold["logprobs"]


def test_no_tokens_and_echo_give_the_prompt_alone(served) -> None:
    answer = served.answer(PATH, prompt=[PROMPT, [65, 66]], echo=True, logprobs=0, max_tokens=0)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [PROMPT, served.models.get().checkpoint.tokenizer.decode([65, 66])]
    assert answer["usage"]["completion_tokens"] == 0
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] is None and logprobs["token_logprobs"][0] is None
    (bare,) = served.answer(PATH, prompt=PROMPT, max_tokens=0)["choices"]
    assert (bare["text"], bare["finish_reason"]) == ("", "length")


def test_tokens_that_are_no_text_are_named_by_their_bytes(served) -> None:
    ids = byte_ids(served, "🦊".encode())
    (choice,) = served.answer(PATH, prompt=ids, echo=True, logprobs=1, max_tokens=0)["choices"]
    assert choice["text"] == "🦊"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x8a"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 0]


@given(data=st.data())
def test_offsets_are_places_in_the_text_whatever_the_tokens(served, data) -> None:
    model = served.models.get()
    ids = data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    tokens = [Scored(token_id, -1.0, ()) for token_id in ids]
    writer = CompletionLogprobsWriter(model, 0)
    parts = [writer.write(tokens[:cut], spelled=True), writer.write(tokens[cut:])]
    decode = model.checkpoint.tokenizer.decode
    text = decode(ids[:cut]) + decode(ids[cut:], skip_control=True)
    named = [each for part in parts for each in zip(part["tokens"], part["text_offset"], strict=True)]
    for token_id, (name, offset), place in zip(ids, named, range(len(ids)), strict=True):
        shown = place < cut or token_id not in model.control_ids
        assert not shown or name.startswith("bytes:") or text[offset:].startswith(name)
    offsets = [offset for _, offset in named]
    assert offsets == sorted(offsets) and offsets[0] == 0


@pytest.mark.one_process("changes what the network computes")
def test_minus_infinity_is_a_number(serve, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(
        "topkapi.model.native.levels", lambda: ()
    )  # what is put in place of a method of the network is to be called
    with serve(tiny_checkpoint("impossible")) as served:
        model = served.models.get().checkpoint.model
        unaltered = model.logits

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            scores = unaltered(hidden)
            scores[..., 65] = -torch.inf
            return scores

        model.logits = logits  # type: ignore[method-assign]
        body = {"prompt": [[64, 65]], "echo": True, "logprobs": 1, "max_tokens": 0, "prompt_logprobs": 1}
        (choice,) = served.answer(PATH, **body)["choices"]
        assert choice["logprobs"]["token_logprobs"] == [None, -9999.0]
        assert choice["prompt_logprobs"][1]["65"]["logprob"] == -9999.0


def test_several_prompts_and_answers_are_numbered_prompt_by_prompt(served) -> None:
    choices = served.answer(PATH, prompt=["a", [66]], n=2, seed=1, max_tokens=3)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    alone = served.answer(PATH, prompt=[66], n=2, seed=1, max_tokens=3)["choices"]
    assert [choice["text"] for choice in choices[2:]] == [choice["text"] for choice in alone]


def test_vllms_fields(served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 3, "return_token_ids": True, "priority": 5}
    answer = served.answer(PATH, prompt_logprobs=1, min_tokens=2, ignore_eos=True, **body)
    (choice,) = answer["choices"]
    tokenizer = served.models.get().checkpoint.tokenizer
    ids = choice["prompt_token_ids"]
    assert ids == tokenizer.encode(PROMPT)
    assert tokenizer.decode(choice["token_ids"], skip_control=True) == choice["text"]
    assert choice["prompt_logprobs"][0] is None
    for token_id, place in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
        ranks = {entry["rank"] for entry in place.values()}
        assert place[str(token_id)]["decoded_token"] == tokenizer.decode([token_id]) and 1 in ranks
    stop = choice["text"][4:6]
    (stopped,) = served.answer(PATH, ignore_eos=True, stop=stop, include_stop_str_in_output=True, **body)["choices"]
    assert stopped["text"].endswith(stop) and (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    third = choice["token_ids"][2]
    (ended,) = served.answer(PATH, stop_token_ids=[third], **body)["choices"]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", third)
    (only,) = served.answer(PATH, structured_outputs={"choice": ["yes", "no"]}, **body)["choices"]
    assert only["text"] in ("yes", "no") and only["finish_reason"] == "stop"
    (number,) = served.answer(PATH, structured_outputs={"json": '{"enum": [7]}'}, **body)["choices"]
    assert json.loads(number["text"]) == 7


def test_a_stream_adds_up_to_the_whole_answer(served) -> None:
    body = {"prompt": [PROMPT, "Names are"], "n": 2, "max_tokens": 20, "seed": 3, "echo": True, "logprobs": 2}
    whole = served.answer(PATH, **body)
    *parts, usage, done = chunks(served, PATH, stream_options={"include_usage": True}, **body)
    assert done == "[DONE]" and usage["choices"] == [] and all(part["usage"] is None for part in parts)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    assert len({part["id"] for part in parts}) == len({part["created"] for part in parts}) == 1
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [each for part in own if part["logprobs"] for each in part["logprobs"][name]]
            assert joined == choice["logprobs"][name], name


def test_a_character_is_never_sent_in_halves(served) -> None:
    ids = byte_ids(served, "🦊".encode())
    bias = {str(token_id): 100 - position for position, token_id in enumerate(ids)}
    penalties = {"presence_penalty": 2, "frequency_penalty": 2}
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logit_bias": bias, **penalties}
    *parts, _, _ = chunks(served, PATH, **body)
    assert [part["choices"][0]["text"] for part in parts] == ["🦊"]


BAD = [
    ({}, "prompt", "missing"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [[1], [512]]}, "prompt[1][0]", "0 to 511"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "fill no gaps"),
    ({"prompt": "a", "temperature": -1}, "temperature", "at least 0"),
    ({"prompt": "a", "max_completion_tokens": -1}, "max_completion_tokens", "at least 0"),
    ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "two names"),
    ({"prompt": "a", "temprature": 1}, "temprature", "did you mean temperature"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "whole number"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "go with stream"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    ({"prompt": "a", "structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"prompt": "a", "structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"prompt": "a", "structured_outputs": {"regex": "(a"}}, "regex", "can't be followed"),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "streamed"),
    ({"prompt": "a", "service_tier": "flex"}, "service_tier", "no such thing"),
    ({"prompt": "a " * 300}, "prompt", "context holds 128"),
    ({"prompt": "a", "user": 5}, "user", "a text"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_a_400_that_names_it(served, body, param, words) -> None:
    error = refused(served.post(PATH, **body))
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error"


def test_a_lenient_server_answers_stubborn_clients(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("lenient"), ignore_unknown_fields=True) as served:
        response = served.post(PATH, prompt="a", max_tokens=1, suffix="b", mood="good", stream_options={"x": 1})
        assert response.status_code == 200
        ignored = response.headers["x-ignored-parameters"].split(", ")
        assert sorted(ignored) == ["mood", "stream_options", "stream_options.x", "suffix"]
        refused(served.post(PATH, prompt="a", temperature=-1))


def test_usage_counts_the_answers_that_are_given_in_streams_too(served) -> None:
    """Not the continuations that `best_of` made and left out."""
    body = {"prompt": PROMPT, "max_tokens": 5, "best_of": 4, "n": 2, "seed": 1, "return_token_ids": True}
    whole = served.answer(PATH, **body)
    *parts, last, _ = chunks(served, PATH, stream_options={"include_usage": True}, **body)
    told = sum(len(choice.get("token_ids", ())) for part in parts for choice in part["choices"])
    assert last["usage"]["completion_tokens"] == told == whole["usage"]["completion_tokens"]
    assert told == sum(len(choice["token_ids"]) for choice in whole["choices"])
