"""Structured output: whatever the network, the seed and the sampler, a complete answer fulfils what was asked."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from tests.tiny import tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, Failed, Finished, GenerateJob, Token
from topkapi.model.decoding import grammar
from topkapi.model.decoding.grammar import Constraint, compile_constraint
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import EngineError, InvalidRequest, Overloaded
from topkapi.model.generation import GenerationResult, generate
from topkapi.model.text.tokenizer import Tokenizer

END = "<|endoftext|>"
CONTROL = (END, "<|im_start|>", "<|im_end|>")
PADDING = 13
CONTEXT = 2048
PROMPT = [70, 71, 72]


def train(entries: int) -> Tokenizer:
    text = 'The name is "Ada", aged 36; {"tags": [1, 2.5, true, null]}: naïve 😀\n' * 4
    return Tokenizer.train([text + text.upper() + text.title()], entries, CONTROL)


BYTES = train(256 + len(CONTROL))
MERGED = train(330)


def sentencepiece() -> Tokenizer:
    """Pieces with a space put before every text, the bytes, and no canonical tokens for most texts."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁yes"]
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s")]
    pieces += ["▁y", "▁ye"]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [
        {
            "id": i,
            "content": c,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, c in enumerate(pieces[:3])
    ]
    return Tokenizer(definition, {"bos_token": "<s>", "eos_token": "</s>"})


PIECES = sentencepiece()
TOKENIZERS = {"bytes": BYTES, "merged": MERGED, "sentencepiece": PIECES}
MODELS = {
    name: tiny_model(
        vocab_size=tokenizer.vocab_size + PADDING,
        context_length=CONTEXT,
        end_token_ids=(tokenizer.end_token_id,),
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
    )
    for name, tokenizer in TOKENIZERS.items()
}


def answer(parameters: dict[str, Any], vocabulary: str = "bytes", **options: Any) -> tuple[str, GenerationResult]:
    """The text of a random network's answer, and how it ended."""
    tokenizer = TOKENIZERS[vocabulary]
    result = generate(MODELS[vocabulary], PROMPT, {"seed": 1, **parameters}, tokenizer=tokenizer, **options)
    return tokenizer.decode(result.token_ids, skip_control=True), result


def compiled(parameters: dict[str, Any], ends: tuple[int, ...] | None = None, padding: int = PADDING) -> Constraint:
    ends = (BYTES.control_tokens[END],) if ends is None else ends
    factory = compile_constraint(resolve(parameters), BYTES, BYTES.vocab_size + padding, ends)
    assert factory is not None
    return factory(0)


def allowed(constraint: Constraint) -> list[int]:
    return constraint.mask().nonzero().view(-1).tolist()


def spell(constraint: Constraint, text: str) -> Constraint:
    for byte in text.encode():
        constraint.advance(BYTE_IDS[byte])
    return constraint


BYTE_IDS = {BYTES.token_bytes(i)[0]: i for i in range(BYTES.vocab_size) if len(BYTES.token_bytes(i)) == 1}


# What an answer must fulfil, told independently of llguidance.


def fulfils(value: Any, schema: Any) -> bool:
    """A checker of the part of JSON Schema that these tests use."""
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    if "anyOf" in schema:
        return any(fulfils(value, each) for each in schema["anyOf"])
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= properties.keys()
            and all(fulfils(each, properties[name]) for name, each in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(fulfils(each, schema["items"]) for each in value)
        )
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return (kind == "boolean" and isinstance(value, bool)) or (kind == "null" and value is None)


LEAVES = (
    st.sampled_from([{"type": "boolean"}, {"type": "null"}])
    | st.tuples(st.integers(-200, 200), st.integers(0, 300)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    )
    | st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most})
    | st.lists(st.text(max_size=5) | st.integers(-5, 5) | st.booleans(), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    )
)
NAMES = st.text('abcé"\\ 😀', min_size=1, max_size=3)


def object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    required = list(properties)[::2]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 2))
        | st.dictionaries(NAMES, inner, max_size=3).map(object_schema)
        | st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})
    ),
    max_leaves=4,
)
# Expressions that Python's re and llguidance read alike, none of them unbounded.
EXPRESSIONS = st.recursive(
    st.text('ab /é.(+-😀"\n', min_size=1, max_size=3).map(re.escape)
    | st.sampled_from(["[a-d]", "[^a-z]", "[0-9]", "."]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("({0[0]}|{0[1]})".format)
        | st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda each: f"({each[0]}){{{each[1]},{sum(each[1:])}}}"
        )
        | inner.map("({})?".format)
    ),
    max_leaves=6,
).map("x{}".format)
SAMPLERS = st.sampled_from(
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5, "top_p": 0.8},
        {"min_p": 0.2, "temperature": 1.5},
        {"typical_p": 0.6},
        {"top_n_sigma": 1.0, "repetition_penalty": 1.5},
        {"mirostat": 2},
        {"min_tokens": 4},
        {"xtc_probability": 1.0, "frequency_penalty": 2.0},
        {"dry_multiplier": 1.0, "dry_breakers": []},
    ]
)
SEEDS = st.integers(0, 2**53 - 1)
VOCABULARIES = st.sampled_from(sorted(TOKENIZERS))


@settings(max_examples=120, deadline=None)
@given(SCHEMAS, SAMPLERS, SEEDS, VOCABULARIES)
def test_answers_fulfil_any_json_schema(schema: Any, sampler: dict, seed: int, vocabulary: str) -> None:
    text, result = answer({"json_schema": schema, "seed": seed, **sampler}, vocabulary)
    assert result.finish_reason == "stop"
    assert fulfils(json.loads(text), schema), text


@settings(max_examples=120, deadline=None)
@given(EXPRESSIONS, SAMPLERS, SEEDS, VOCABULARIES)
def test_answers_match_any_regular_expression(expression: str, sampler: dict, seed: int, vocabulary: str) -> None:
    text, result = answer({"regex": expression, "seed": seed, **sampler}, vocabulary)
    assert result.finish_reason == "stop"
    assert re.fullmatch(expression, text), (expression, text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), SAMPLERS, SEEDS, VOCABULARIES)
def test_answers_are_one_of_the_choices(choice: list[str], sampler: dict, seed: int, vocabulary: str) -> None:
    text, result = answer({"choice": choice, "seed": seed, **sampler}, vocabulary)
    assert result.finish_reason == "stop"
    assert text in choice


SUMS = """
start: sum
sum: product ((" + " | " - ") product){0,2}
product: atom ("*" atom){0,2}
atom: NUMBER | "(" NUMBER ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


@settings(max_examples=60, deadline=None)
@given(SAMPLERS, SEEDS, VOCABULARIES)
def test_answers_follow_a_lark_grammar(sampler: dict, seed: int, vocabulary: str) -> None:
    text, result = answer({"grammar": SUMS, "seed": seed, **sampler}, vocabulary)
    assert result.finish_reason == "stop"
    atom = r"(?:[1-9]\d{0,2}|\([1-9]\d{0,2}\))"
    product = rf"{atom}(?:\*{atom}){{0,2}}"
    assert re.fullmatch(rf"{product}(?: [+-] {product}){{0,2}}", text), text


NESTED = 'start: "(" start ")" | "[" start "]" | "x"'


def balanced(text: str) -> bool:
    while text != "x":
        if (text[:1], text[-1:]) not in {("(", ")"), ("[", "]")}:
            return False
        text = text[1:-1]
    return True


def test_recursion_is_followed_and_cut_by_max_tokens() -> None:
    reasons = set()
    for seed in range(40):
        text, result = answer({"grammar": NESTED, "seed": seed, "max_tokens": 12})
        reasons.add(result.finish_reason)
        if result.finish_reason == "stop":
            assert balanced(text), text
        else:
            assert len(result.token_ids) == 12
            assert re.fullmatch(r"[(\[]*(x[)\]]*)?", text), text
    assert reasons == {"stop", "length"}
    endless = {"grammar": 'start: "(" start ")" | "(" start "]" | "y"', "logit_bias": {BYTE_IDS[ord("y")]: -100}}
    text, result = answer({**endless, "max_tokens": 50})
    assert (text, result.finish_reason) == ("(" * 50, "length")


def test_any_json_and_any_json_object() -> None:
    found = set()
    for schema in ({"json_schema": {}}, {"json_schema": True}, {"json_object": True}):
        for seed in range(10):
            text, result = answer({**schema, "seed": seed, "temperature": 2.0, "max_tokens": 60}, "merged")
            if result.finish_reason == "stop":
                value = json.loads(text)
                assert isinstance(value, dict) or "json_object" not in schema
                found.add((next(iter(schema)), type(value)))
    assert ("json_object", dict) in found and len(found) >= 4


def test_blanks_between_the_elements_of_json_are_few() -> None:
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 3, "maxItems": 3}
    blanks = {BYTE_IDS[ord(blank)]: 100 for blank in " \n\t\r"}
    text, result = answer({"json_schema": schema, "logit_bias": blanks})
    assert (json.loads(text), result.finish_reason) == ([1, 1, 1], "stop")
    assert " " in text or "\n" in text
    assert not re.search(r"\s{18}|\n\s*\n|[\t\r]", text)


def test_a_stop_text_ends_what_would_otherwise_be_valid() -> None:
    from topkapi.model.decoding.stopping import Stopper

    schema = {"type": "array", "items": {"enum": ["stop", "go"]}, "minItems": 1, "maxItems": 4}
    seen = set()
    for seed in range(40):
        stopper = Stopper(BYTES.token_bytes, ["stop"])
        text, result = answer({"json_schema": schema, "seed": seed}, stopper=stopper)
        assert result.finish_reason == "stop"
        seen.add(result.stop_reason == "stop")
        if result.stop_reason == "stop":
            assert text.endswith("stop") and text.count("stop") == 1
        else:
            assert set(json.loads(text)) == {"go"}
    assert seen == {True, False}


# The mask itself.


def test_end_tokens_are_allowed_exactly_where_the_answer_may_stop() -> None:
    constraint = compiled({"choice": ["yes", "yes!", "no"]})
    end = BYTES.control_tokens[END]
    assert constraint.mask().shape == (BYTES.vocab_size + PADDING,)
    assert allowed(constraint) == sorted([BYTE_IDS[ord("y")], BYTE_IDS[ord("n")]])
    spell(constraint, "yes")
    assert allowed(constraint) == sorted([BYTE_IDS[ord("!")], end])
    assert not constraint.finished
    other = constraint.copy()
    other.advance(end)
    assert other.finished and allowed(other) == [end]
    assert spell(constraint, "!").finished
    assert allowed(constraint) == [end]


@pytest.mark.parametrize("ends", [(), (3, 9)])
def test_any_number_of_end_tokens(ends: tuple[int, ...]) -> None:
    constraint = compiled({"regex": "a{2,3}"}, ends)
    assert set(allowed(constraint)) == {BYTE_IDS[ord("a")]}
    spell(constraint, "aa")
    assert set(allowed(constraint)) == {BYTE_IDS[ord("a")], *ends}
    assert spell(constraint, "a").finished


def test_without_an_end_token_the_answer_ends_when_it_is_complete() -> None:
    for options in ({"ignore_end_token": True}, {}):
        model = MODELS["bytes"] if options else tiny_model(vocab_size=300, end_token_ids=(), context_length=64)
        result = generate(model, PROMPT, {"regex": "[ab]{4,6}", "seed": 3, **options}, tokenizer=BYTES)
        assert (len(result.token_ids), result.finish_reason, result.stop_reason) == (6, "stop", None)
        longer = {"regex": "[ab]+", "seed": 3, "max_tokens": 40, **options}
        result = generate(model, PROMPT, longer, tokenizer=BYTES)
        assert (len(result.token_ids), result.finish_reason) == (40, "length")


def test_a_control_token_among_the_stop_tokens_is_an_end_token() -> None:
    turn_end = BYTES.control_tokens["<|im_end|>"]
    parameters = {"regex": "[ab]+", "stop_token_ids": [turn_end], "logit_bias": {turn_end: 100}}
    _, result = answer(parameters)
    assert (len(result.token_ids), result.stop_reason) == (2, turn_end)


def test_control_tokens_and_padding_are_never_text() -> None:
    constraint = compiled({"regex": r"(?s:.)*"})
    beyond = set(range(BYTES.vocab_size, BYTES.vocab_size + PADDING))
    forbidden = beyond | {BYTES.control_tokens[name] for name in CONTROL[1:]}
    assert not forbidden & set(allowed(constraint))
    text, result = answer({"choice": ["<|im_end|>"]}, "merged")
    assert text == MERGED.decode(result.token_ids) == "<|im_end|>"
    assert result.token_ids == MERGED.encode("<|im_end|>")


def test_forced_text_is_written_as_the_tokenizer_would() -> None:
    for name in ("merged", "sentencepiece"):
        tokenizer = TOKENIZERS[name]
        for text in ('{"name": "Ada"}', "yes naïve 😀", "The name"):
            _, result = answer({"choice": [text]}, name)
            assert result.token_ids == tokenizer.encode_parts([["."], [text]])[1]


def test_a_normalising_tokenizer_still_spells_what_it_would_change() -> None:
    definition = json.loads(json.dumps(MERGED._definition)) | {"normalizer": {"type": "NFC"}}
    tokenizer = Tokenizer(definition, {"eos_token": END})
    decomposed = "cafe\u0301"
    assert tokenizer.decode(tokenizer.encode(decomposed)) != decomposed
    result = generate(MODELS["merged"], PROMPT, {"choice": [decomposed]}, tokenizer=tokenizer)
    assert (tokenizer.decode(result.token_ids), result.finish_reason) == (decomposed, "stop")


def test_a_network_smaller_than_its_tokenizer() -> None:
    model = tiny_model(vocab_size=MERGED.vocab_size - 20, end_token_ids=(), context_length=128)
    for seed in range(5):
        result = generate(model, PROMPT, {"json_schema": {"enum": ["name Ada"]}, "seed": seed}, tokenizer=MERGED)
        assert MERGED.decode(result.token_ids) == '"name Ada"'


def test_a_copy_goes_its_own_way_and_wrong_tokens_are_refused() -> None:
    constraint = spell(compiled({"json_schema": {"type": "integer", "minimum": 0, "maximum": 99}}), "4")
    other = constraint.copy()
    before = allowed(constraint)
    assert spell(other, "2").finished
    assert allowed(constraint) == before
    for wrong in (BYTE_IDS[ord("x")], BYTES.vocab_size + 1):
        with pytest.raises(EngineError, match="not allow"):
            constraint.advance(wrong)
    assert spell(constraint, "7").finished
    with pytest.raises(EngineError):
        constraint.advance(BYTE_IDS[ord("7")])


def test_the_vocabulary_is_prepared_once_per_checkpoint() -> None:
    grammar._trie.cache_clear()
    for _ in range(3):
        compiled({"choice": ["a"]})
        compiled({"json_object": True})
    assert grammar._trie.cache_info().misses == 1


# What can't be followed is refused before anything runs.

REFUSED = [
    ({"regex": "(a"}, "regex", "unclosed group"),
    ({"regex": r"(a)\1"}, "regex", "backreferences are not supported"),
    ({"regex": "a(?=b)"}, "regex", "look-around"),
    ({"regex": ""}, "regex", "empty"),
    ({"regex": "(a){0}"}, "regex", "empty text"),
    ({"regex": 5}, "regex", "text"),
    ({"regex": "\ud800"}, "regex", "surrogate"),
    ({"choice": []}, "choice", "empty"),
    ({"choice": ["a", ""]}, "choice", "empty"),
    ({"choice": [3]}, "choice", "text"),
    ({"choice": ["\udc00"]}, "choice", "escape"),
    ({"json_schema": False}, "json_schema", "schema is false"),
    ({"json_schema": "{}"}, "json_schema", "object, or true"),
    ({"json_schema": {"type": "text"}}, "json_schema", "Invalid type: text"),
    ({"json_schema": {"not": {"type": "string"}}}, "json_schema", "Unimplemented keys"),
    ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "json_schema", "minimum (3) is greater"),
    ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "json_schema", "Unsatisfiable"),
    ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema", "does not fetch"),
    ({"json_schema": {"$ref": "#"}}, "json_schema", "no text can fulfil it"),
    ({"json_schema": {"type": "string", "pattern": "(a"}}, "json_schema", "unclosed group"),
    ({"json_schema": {"minimum": float("inf")}}, "json_schema", "JSON compliant"),
    ({"json_schema": {"enum": ["x" * 70_000]}}, "json_schema", "65,536"),
    ({"json_object": 1}, "json_object", "true or false"),
    ({"grammar": "start: thing"}, "grammar", 'unknown name: "thing"'),
    ({"grammar": 'begin: "a"'}, "grammar", "no start rule"),
    ({"grammar": 'start: "a'}, "grammar", "lexer error"),
    ({"grammar": "start: start"}, "grammar", "no text can fulfil it"),
    ({"grammar": 'A: /a+/ & /[0-9]+/\nstart: A'}, "grammar", "no text can fulfil it"),
    ({"grammar": f'start: "a" {END}'}, "grammar", f"names the end token {re.escape(END)}"),
    ({"grammar": 'start: a\na[temperature=0.5]: /a+/'}, "grammar", "temperature"),
    ({"regex": "a", "choice": ["a"]}, "choice", "can't be combined with regex"),
    ({"json_object": True, "json_schema": {}}, "json_object", "can't be combined with json_schema"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "field", "says"), REFUSED, ids=[str(case[0])[:60] for case in REFUSED])
def test_what_cannot_be_followed_is_refused_by_name(parameters: dict, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(parameters)
    assert caught.value.field == field
    assert re.search(says if says.startswith("names") else re.escape(says), caught.value.message), caught.value.message
    assert "\n" not in caught.value.message


def test_texts_that_look_like_what_is_refused_are_fine() -> None:
    text, _ = answer({"grammar": f'// {END} [temperature=1]\nstart: "{END} [temperature=1]"'})
    assert text == f"{END} [temperature=1]"


def test_chains_of_definitions_do_not_end_the_process() -> None:
    """llguidance recurses along them; on an ordinary thread's stack 3,000 are a segmentation fault."""
    rules = "\n".join(f"a{index}: a{index + 1}" for index in range(4_500))
    constraint = compiled({"grammar": f'start: a0\n{rules}\na4500: "x"'})
    assert spell(constraint, "x").finished
    definitions = {f"a{index}": {"$ref": f"#/$defs/a{index + 1}"} for index in range(1_500)}
    schema = {"$ref": "#/$defs/a0", "$defs": definitions | {"a1500": {"enum": [1]}}}
    assert spell(compiled({"json_schema": schema}), "1").finished


def test_what_takes_too_long_to_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.05)
    patterns = [{"type": "string", "pattern": f"[a-c]*a[a-c]{{{index}}}"} for index in range(12)]
    with pytest.raises(InvalidRequest, match="longer than 0.05 s") as caught:
        compiled({"json_schema": {"allOf": patterns}})
    assert caught.value.field == "json_schema"


def test_only_so_many_compile_at_once_even_past_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that can't be interrupted are bounded; whoever comes when all are busy is told to come again."""
    monkeypatch.setattr(grammar, "_COMPILING", threading.BoundedSemaphore(grammar.MOST_COMPILING))
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.01)
    monkeypatch.setattr(grammar, "WAIT_SECONDS", 0.05)
    go_on = threading.Event()
    compile_one = grammar._trie

    def never(*arguments: Any) -> Any:
        go_on.wait(20)
        return compile_one(*arguments)

    monkeypatch.setattr(grammar, "_trie", never)
    before = threading.active_count()
    for _ in range(grammar.MOST_COMPILING):
        with pytest.raises(InvalidRequest, match=r"longer than 0.01 s"):
            compiled({"regex": "a+"})
    for _ in range(20):
        with pytest.raises(Overloaded, match="other grammars are being compiled"):
            compiled({"regex": "a+"})
    assert threading.active_count() <= before + grammar.MOST_COMPILING
    go_on.set()
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 20)
    monkeypatch.setattr(grammar, "WAIT_SECONDS", 20)
    assert spell(compiled({"regex": "a+"}), "aa")


def test_a_dead_end_that_shows_late_fails_by_name() -> None:
    constraint = compiled({"grammar": 'A: /a+/ & /[0-9]+/\nstart: "b" ("c" | A "d")'})
    assert allowed(spell(constraint, "b")) == [BYTE_IDS[ord("c")]]
    constraint = compiled({"grammar": 'start: "b" <[0-2]> "c"'}, ends=(0, 1, 2))
    with pytest.raises(InvalidRequest, match="nothing can follow") as caught:
        spell(constraint, "b")
    assert caught.value.field == "grammar"


def test_a_structure_is_never_ignored() -> None:
    with pytest.raises(InvalidRequest, match="tokenizer") as caught:
        generate(MODELS["bytes"], PROMPT, {"choice": ["a"]})
    assert caught.value.field == "choice"
    with pytest.raises(InvalidRequest, match="constraint"):
        Engine(MODELS["bytes"], name="tiny").submit(GenerateJob(PROMPT, resolve({"regex": "a"})), lambda events: None)


# In the engine and over HTTP.


def run(engine: Engine, jobs: list[GenerateJob]) -> list[list[Event]]:
    """The events of each job, all running together."""
    collected: list[list[Event]] = [[] for _ in jobs]
    done = [threading.Event() for _ in jobs]

    def receiver(number: int) -> Callable[[list[Event]], None]:
        def deliver(events: list[Event]) -> None:
            collected[number].extend(events)
            if isinstance(events[-1], Completed | Failed):
                done[number].set()

        return deliver

    for number, each in enumerate(jobs):
        engine.submit(each, receiver(number))
    assert all(event.wait(30) for event in done)
    return collected


def test_in_the_engine_each_sequence_follows_its_own_structure() -> None:
    """Twelve jobs of three sequences over four slots, some without structure: the tokens each would have alone."""
    model = MODELS["merged"]
    wanted = [
        {"json_schema": {"type": "array", "items": {"enum": ["a", "b", 7]}, "maxItems": 3}},
        {"regex": "[a-f]{3,9}( [0-9]{2}){0,2}"},
        {"choice": ["yes", "no", "yes, please"], "temperature": 0},
        {"max_tokens": 9, "ignore_end_token": True},
        {"grammar": SUMS, "top_k": 4},
        {"json_object": True, "max_tokens": 30, "temperature": 2.0},
    ] * 2
    requests = [{"seed": seed, "n": 3, **parameters} for seed, parameters in enumerate(wanted)]
    jobs = []
    for request in requests:
        effective = resolve(request)
        constraint = compile_constraint(effective, MERGED, model.config.vocab_size, model.config.end_token_ids)
        jobs.append(GenerateJob(PROMPT, effective, constraint=constraint))
    engine = Engine(model, name="tiny", max_running=4)
    engine.start()
    collected = run(engine, jobs)
    engine.close()
    for request, events in zip(requests, collected, strict=True):
        assert not any(isinstance(event, Failed) for event in events)
        for index in range(3):
            alone = generate(model, PROMPT, request, sequence=0 if request.get("temperature") == 0 else index,
                             tokenizer=MERGED)  # fmt: skip
            mine = [event.token_id for event in events if isinstance(event, Token) and event.index == index]
            (end,) = [event for event in events if isinstance(event, Finished) and event.index == index]
            assert (mine, end.reason, end.stop_reason) == (alone.token_ids, alone.finish_reason, alone.stop_reason)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_answers_over_http_are_structured(served) -> None:
    ask = {"prompt": ["Describe:", "Who?"], "model": "base", "n": 2}
    for seed, sampler in enumerate(({"temperature": 0}, {}, {"top_k": 7, "temperature": 2.0}, {"top_p": 0.5})):
        given = served.answer("/generate", json_schema=PERSON, seed=seed, **ask, **sampler)
        assert given["parameters"]["json_schema"] == PERSON
        assert "grammar" in given["order"]
        for output in given["outputs"]:
            assert output["finish_reason"] == "stop"
            assert fulfils(json.loads(output["text"]), PERSON), output["text"]
    given = served.answer("/generate", choice=["red", "green"], messages=[{"role": "user", "content": "?"}], n=5)
    assert {output["text"] for output in given["outputs"]} <= {"red", "green"}
    given = served.answer("/generate", regex="[0-9]{4}-[0-9]{2}", stop=["-"], **ask)
    assert all(re.fullmatch("[0-9]{4}", output["text"]) for output in given["outputs"])
    assert {output["stop_reason"] for output in given["outputs"]} == {"-"}
    endless = {"grammar": 'start: "(" start ")" | "x"', "max_tokens": 20, "logit_bias": paid(served, "("), **ask}
    given = served.answer("/generate", **endless)
    assert {(output["finish_reason"], len(output["token_ids"])) for output in given["outputs"]} == {("length", 20)}


def paid(served, text: str) -> dict[str, float]:
    """A bias that makes these characters' tokens win."""
    tokenizer = served.models.get("base").checkpoint.tokenizer
    pieces = {token_id: tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in range(512)}
    return {str(token_id): 100.0 for token_id, piece in pieces.items() if set(piece) == set(text)}


def test_a_structured_answer_streams(served) -> None:
    body = {"prompt": "Describe:", "json_schema": PERSON, "seed": 4, "model": "base"}
    whole = served.answer("/generate", **body)["outputs"][0]["text"]
    pieces = []
    with served.client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and "outputs" not in (data := json.loads(line.removeprefix("data: "))):
                pieces.append(data["text"])
    assert "".join(pieces) == whole
    assert len(pieces) > 3


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in REFUSED
        if "surrogate" not in case[2] and "\\u" not in ascii(case[0]) and "inf" not in str(case[0])
    ],
    ids=lambda case: str(case[0])[:60],
)
def test_over_http_the_field_is_named(served, case) -> None:
    parameters, field, _ = case
    response = served.post("/generate", prompt="x", **parameters)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["field"] == field
    assert response.json()["error"]["type"] == "invalid_request"
