"""What is too long or too much is refused by name before anything is done with it, in every dialect and quickly."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from topkapi.model.decoding.gbnf import is_gbnf, lark_of
from topkapi.model.decoding.grammar_source import _GBNF_RULE, _LITERAL, _TEMPERATURE
from topkapi.model.decoding.parameters import BY_NAME, PARAMETERS, check
from topkapi.model.errors import MOST_TOLD, Cancelled, InvalidRequest
from topkapi.model.interruption import between_pieces, given_up_when
from topkapi.service import limits
from topkapi.service.api.http.answering import as_json, pieces, weight
from topkapi.service.api.http.body import MalformedBody, parse_json
from topkapi.service.api.native.schemas import parameter_schema

LONG = "word " * 200_000
MANY = ["a"] * 300_000
USER = [{"role": "user", "content": "Hello"}]
LONG_USER = [{"role": "user", "content": LONG}]


@pytest.fixture(scope="module")
def served(serve, tiny_checkpoint) -> Iterator:
    with serve(tiny_checkpoint("limits")) as each:
        yield each


TOO_MUCH: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {"prompt": LONG}, "prompt"),
    ("/generate", {"prompt": ["a", LONG]}, "prompt[1]"),
    ("/generate", {"prompt": MANY}, "prompt"),
    ("/generate", {"prompt": [1] * 1_000_000}, "prompt"),
    ("/generate", {"messages": LONG_USER}, "messages"),
    ("/generate", {"messages": USER * 10_000}, "messages"),
    ("/generate", {"prompt": "a", "stop": MANY}, "stop"),
    ("/generate", {"prompt": "a", "stop": ["b", LONG]}, "stop[1]"),
    ("/generate", {"prompt": "a", "bad_words": MANY}, "bad_words"),
    ("/generate", {"prompt": "a", "bad_words": [LONG]}, "bad_words[0]"),
    ("/generate", {"prompt": "a", "banned_token_ids": [1] * 100_000}, "banned_token_ids"),
    ("/generate", {"prompt": "a", "logit_bias": {str(each): 1 for each in range(17_000)}}, "logit_bias"),
    ("/generate", {"prompt": "a", "dry_multiplier": 1, "dry_breakers": MANY}, "dry_breakers"),
    ("/generate", {"prompt": "a", "regex": LONG}, "regex"),
    ("/generate", {"prompt": "a", "grammar": "\n" * 1_000_000}, "grammar"),
    ("/generate", {"prompt": "a", "json_schema": {"enum": MANY}}, "json_schema"),
    ("/generate", {"prompt": "a", "choice": MANY}, "choice"),
    ("/generate", {"prompt": "a", "guidance_scale": 2, "negative_prompt": LONG}, "negative_prompt"),
    ("/generate", {"prompt": ["a"] * 100, "n": 100}, "n"),
    ("/score", {"text": MANY}, "text"),
    ("/score", {"text": "word " * 2_000_000}, "text"),
    ("/score", {"prompt": "a", "choices": MANY}, "choices"),
    ("/score", {"text": "a", "segments": 10_001}, "segments"),
    ("/score", {"text": ["a b c d e f g h"] * 2000, "per_token": False, "surprising": 8, "top": 1000}, "surprising"),
    ("/score", {"prompt": "word " * 30_000, "choices": [" a"] * 400}, "choices"),
    ("/score", {"text": "word " * 100_000, "top": 1000}, "per_token"),
    ("/tokenize", {"text": "word " * 2_000_000}, "text"),
    ("/detokenize", {"token_ids": [1] * 4_000_001}, "token_ids"),
    ("/v1/completions", {"prompt": MANY}, "prompt"),
    ("/v1/completions", {"prompt": "a", "stop": MANY}, "stop"),
    ("/v1/chat/completions", {"messages": LONG_USER}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2000}]},
     "messages[0].content"),
    ("/v1/responses", {"input": LONG}, "input"),
    ("/v1/embeddings", {"input": MANY}, "input"),
    ("/v1/embeddings", {"input": LONG}, "input"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "field"), TOO_MUCH, ids=lambda value: str(value)[:30])
def test_the_field_that_is_too_long_is_named(served, path, body, field) -> None:
    answer = served.post(path, **body)
    assert answer.status_code in (400, 422), answer.text[:500]
    error = answer.json()["error"]
    assert error.get("field", error.get("param")) == field
    assert field in error["message"] and re.search(r"\d{2}", error["message"]), error
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"inputs": LONG}, "inputs"),
        ("/generate", {"inputs": "a", "parameters": {"stop": MANY}}, "stop"),
        ("/generate", {"text": MANY}, "text"),
        ("/generate", {"text": "a", "sampling_params": {"stop": MANY}}, "stop"),
        ("/completion", {"prompt": LONG}, "tokens"),
        ("/completion", {"prompt": MANY}, "prompt"),
        ("/completion", {"prompt": "a", "logit_bias": [[1, 1]] * 70_000}, "logit_bias"),
        ("/completion", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ("/tokenize", {"content": "word " * 2_000_000}, "content"),
        ("/embedding", {"content": MANY}, "content"),
        ("/apply-template", {"messages": LONG_USER}, "tokens"),
        ("/chat/completions/input_tokens", {"messages": LONG_USER}, "tokens"),
        ("/v1/messages", {"model": "limits", "max_tokens": 1, "messages": LONG_USER}, "messages"),
        ("/v1/messages", {"model": "limits", "max_tokens": 1, "messages": USER, "stop_sequences": MANY}, "stop"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_so_do_the_dialects_that_say_it_in_one_text(served, path, body, field) -> None:
    answer = served.post(path, **body)
    assert answer.status_code in (400, 422) and field in answer.text, answer.text[:500]
    assert len(answer.content) < 1000


LONG_NAME = "m" * 1_000_000
QUOTED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "a"}), ("/generate", {"inputs": "a"}), ("/generate", {"text": "a"}),
    ("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": USER}),
    ("/v1/responses", {"input": "a"}), ("/v1/messages", {"messages": USER, "max_tokens": 1}),
    ("/completion", {"prompt": "a"}),
    ("/v1/embeddings", {"input": "a"}), ("/score", {"text": "a b"}), ("/tokenize", {"text": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), QUOTED, ids=lambda value: str(value)[:30])
def test_what_is_refused_is_not_quoted_at_length(served, path, body) -> None:
    for fault in ({"model": LONG_NAME}, {LONG_NAME: 1}, {"seed": LONG_NAME}, {"stop": {LONG_NAME: 1}}):
        answer = served.post(path, **body, **fault)
        assert answer.status_code in (400, 404, 422) or "model" in fault, answer.text[:500]
        assert len(answer.content) < 4 * MOST_TOLD


@pytest.mark.parametrize(("path", "body"), QUOTED, ids=lambda value: str(value)[:30])
def test_a_number_of_any_size_is_taken_or_refused(served, path, body) -> None:
    """In all fields that are a number anywhere, though no step can count so far."""
    names = {parameter.name for parameter in PARAMETERS if parameter.kind in ("integer", "number")}
    names |= {"top_logprobs", "n_probs", "n_predict", "t_max_predict_ms", "n_keep", "id_slot", "priority", "dimensions"}
    names |= {"prompt_logprobs", "max_new_tokens", "no_repeat_ngram_size", "timeout_s", "top", "segments"}
    within = {"inputs": "parameters", "text": "sampling_params"}.get(next(iter(body))) if path == "/generate" else None
    for name in sorted(names):
        for number in (2**63 - 1, 2**64, -(2**63) - 1, 10**300, 10**400, -(10**400)):
            sent = body | ({within: {name: number}} if within else {"max_tokens": 1, name: number})
            answer = served.client.post(path, content=json.dumps(sent), headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 404, 408, 422), (name, number, answer.text[:500])


def test_what_real_clients_send_is_within_the_limits(served) -> None:
    """A list of long prompts as an evaluation sends it, a book to score, and its tokens."""
    book = "The quick brown fox jumps over the lazy dog.\n" * 3500
    told = served.answer("/tokenize", text=book)
    assert told["count"] == len(told["token_ids"]) == len(told["pieces"]) > 10_000
    assert served.answer("/detokenize", token_ids=told["token_ids"])["text"] == book
    prompts = ["The quick brown fox jumps over the lazy dog. "] * 100
    assert len(served.answer("/v1/completions", prompt=prompts, max_tokens=1)["choices"]) == 100


def test_every_list_and_text_of_the_table_has_a_limit_that_the_description_tells() -> None:
    for parameter in PARAMETERS:
        schema = json.dumps(parameter_schema(parameter))
        if parameter.kind in ("strings", "integers", "words", "integer_to_number", "layers"):
            assert parameter.most is not None, parameter.name
            assert re.search(rf'"max(Items|Properties)": {parameter.most}\b', schema), parameter.name
        if parameter.kind in ("strings", "words", "text", "schema"):
            assert parameter.longest is not None, parameter.name
        if parameter.kind in ("strings", "words", "text"):
            assert f'"maxLength": {parameter.longest}' in schema, parameter.name


def test_limits_are_exact() -> None:
    stop = BY_NAME["stop"]
    assert stop.most is not None and stop.longest is not None
    assert len(check(stop, ["a"] * stop.most)) == stop.most
    assert check(stop, "a" * stop.longest)
    with pytest.raises(InvalidRequest, match=r"stop has 129 entries, and 128 is the most"):
        check(stop, ["a"] * (stop.most + 1))
    with pytest.raises(InvalidRequest, match=r"stop\[0\] has 1,025 characters, and 1,024 is the most"):
        check(stop, ["a" * (stop.longest + 1)])
    with pytest.raises(InvalidRequest, match="more than 65,536 characters of JSON"):
        check(BY_NAME["json_schema"], {"enum": ["a" * 70_000]})


# JSON


def documents() -> Iterator[Any]:
    chance = random.Random(7)

    def value(depth: int) -> Any:
        kind = chance.randrange(8 if depth else 5)
        if kind == 0:
            return chance.choice(["", "a", 'q"\\', "é€𝔘", "\n\t", "\x7f"])
        if kind == 1:
            return chance.choice([0, -1, 7, 10**15, -(10**30), 12345678901234])
        if kind == 2:
            return chance.choice([1.5, -0.0, 1e300])
        if kind in (3, 4):
            return chance.choice([True, False, None])
        if kind == 5:
            return [chance.randrange(10**6) for _ in range(chance.randrange(6))]
        if kind == 6:
            return [value(depth - 1) for _ in range(chance.randrange(5))]
        return {str(number): value(depth - 1) for number in range(chance.randrange(5))}

    return ({"a": value(4)} for _ in range(300))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_both_readers_of_json_read_the_same(monkeypatch, indent, ascii_only) -> None:
    monkeypatch.setattr("topkapi.service.api.http.body.FAST", 0)
    for document in documents():
        text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
        assert parse_json(text.encode()) == document


@pytest.mark.parametrize("fast", [0, 10**9])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"a": [1,2,]}', "not valid JSON"), ('{"a": [1,2 3]}', "not valid JSON"), ('{"a": [1,,2]}', "not valid JSON"),
        ('{"a": [01,2]}', "not valid JSON"), ('{"a": [1,2', "not valid JSON"), ('{"a": [,]}', "not valid JSON"),
        ('{"a": 1,}', "not valid JSON"), ('{"a": "b', "not valid JSON"), ('{"a": 1} 2', "not valid JSON"),
        ('{"a": "\n"}', "not valid JSON"), ("[1]", "must be a JSON object"), ("  ", "empty"), ("", "empty"),
        ('{"a": NaN}', "NaN"), ('{"a": 1e999}', "float64"), ('{"a": 1, "a": 2}', "twice"),
        ('{"a": {"b": "\\ud800"}}', "surrogate"), ('{"\\udc00": 1}', "surrogate"),
        ('{"a": ' + "9" * 5000 + "}", "beyond float64"), ('{"a": [1,' + "9" * 309 + "]}", "beyond float64"),
        ('{"a": ' + "[" * 129 + "]" * 129 + "}", "nested"), ('{"a": ' * 200 + "1" + "}" * 200, "nested"),
        ('{"a": ' + "[" * 100_000, "nested"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_both_refuse_the_same(monkeypatch, fast, body, words) -> None:
    monkeypatch.setattr("topkapi.service.api.http.body.FAST", fast)
    with pytest.raises(MalformedBody, match=words):
        parse_json(body.encode())


def test_lists_and_objects_without_end_are_refused() -> None:
    for entry in ("[]", "{}", '{"a":[]}'):
        with pytest.raises(MalformedBody, match="more than 100,000 lists and objects"):
            parse_json(('{"a": [' + f"{entry}," * 3_000_000 + "1]}").encode())


def test_reading_ends_when_nobody_waits() -> None:
    body = ('{"a": [' + "[1,2]," * 90_000 + "1]}").encode()
    with given_up_when(lambda: True), pytest.raises(Cancelled):
        parse_json(body)
    between_pieces()


# Answers


def test_answers_in_pieces_are_the_same_json() -> None:
    for document in documents():
        assert json.loads(b"".join(piece.encode() for piece in pieces(document))) == document
    large = {"outputs": [{"logprobs": [{"top": [{"id": n, "p": 0.5} for n in range(20)]} for _ in range(500)]}] * 3}
    written = list(pieces(large))
    assert json.loads("".join(written)) == large and len(written) > 10
    assert max(map(len, written)) < 200_000
    generated = {"a": (number for number in range(20_000)), "b": iter(()), "c": "é"}
    assert json.loads(as_json(generated).body) == {"a": list(range(20_000)), "b": [], "c": "é"}
    assert weight([[1] * 10] * 10) == 121 and weight([1] * 10**6) >= 4096
    with pytest.raises(ValueError, match="JSON compliant"):
        list(pieces({"a": [float("nan")] * 10_000}))


# Regular expressions that read what strangers wrote


def test_no_pattern_takes_the_square_of_a_texts_length() -> None:
    """Each took from two seconds to a minute, and held the interpreter for it."""
    size = 65_000
    texts = [
        "[" * size, "\n" * size, '"' + '\\"' * (size // 2), '"' + '\\"' * (size // 2) + "\\", "/" + "\\/" * (size // 2),
        "a" + " " * size, "[temperature " * 5000, 'a "' * 20_000, "a::" * 20_000, "//" * 30_000,
    ]  # fmt: skip
    began = time.process_time()
    for text in texts:
        bare = _LITERAL.sub(" ", text)
        _GBNF_RULE.search(bare)
        _TEMPERATURE.search(bare)
        is_gbnf(text)
    assert time.process_time() - began < 2


def test_grammars_beyond_the_limit_are_not_converted() -> None:
    with pytest.raises(InvalidRequest, match="grammar has 70,000 characters"):
        lark_of("a" * 70_000)
    assert not is_gbnf("root ::= a\n" + "\n" * 70_000)


def test_the_limits_leave_room() -> None:
    """What real workloads need, by several times."""
    assert limits.LONGEST_TEXT >= 4 * 1_500_000 and limits.MOST_PROMPTS >= 1000 and limits.MOST_TOKENS >= 8 * 131_072


DEEP = '{"a":' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "sampling_params": {"json_schema": DEEP}}),
        ("/generate", {"text": "a", "sampling_params": {"json_schema": "null"}}),
        ("/generate", {"text": "a", "sampling_params": {"json_schema": "1" * 5000}}),
        ("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": DEEP}}}),
        ("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": "null"}}}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": DEEP}}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": "null"}}),
    ],
)
def test_json_in_a_text_is_read_as_carefully_as_the_body(served, path: str, body: dict[str, Any]) -> None:
    answer = served.post(path, **body)
    assert answer.status_code in (400, 422), answer.text
    assert "json" in answer.text or "grammar.value" in answer.text
    assert "set_int_max_str_digits" not in answer.text


def test_an_origin_that_is_no_address_is_foreign(served) -> None:
    for origin in ("http://[", "http://a]b"):
        answer = served.client.post("/tokenize", json={"text": "a"}, headers={"Origin": origin})
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "foreign_origin"
