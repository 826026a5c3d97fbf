"""An answer that is gone on with by its tokens: what comes is what would have come in one go."""

from __future__ import annotations

import pytest

from tests.service.api.native.test_generate import events

PROMPT = "The value of the expression is"
LENGTH = 32
ASKED = {
    "as it is": {},
    "greedy": {"temperature": 0},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.9, "repetition_penalty": 1.3, "dry_multiplier": 1.0},
    "truncations": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.001},
    "guidance": {"guidance_scale": 1.5},
    "guidance away from a text": {"guidance_scale": 1.5, "negative_prompt": "Not a long one"},
    "guesses": {"prompt_lookup": 4, "temperature": 0.2},
    "a structure": {"regex": "[a-z ]{60,80}", "ignore_end_token": False},
    "a least length": {"min_tokens": 24, "ignore_end_token": False},
    "log-probabilities": {"logprobs": 2, "trace": True},
}


@pytest.fixture(scope="module")
def asked(served):
    """`asked(**fields)`: the one output of a request that goes on to its limit."""

    def ask(**fields) -> dict:
        body = {"prompt": PROMPT, "seed": 4, "max_tokens": LENGTH, "ignore_end_token": True} | fields
        return served.answer("/generate", **body)["outputs"][0]

    return ask


@pytest.mark.parametrize("name", ASKED)
def test_the_rest_is_that_of_an_answer_in_one_go(asked, name) -> None:
    whole = asked(**ASKED[name])
    count = len(whole["token_ids"])
    assert count > 20
    for cut in (1, 13, count - 1):
        rest = asked(**ASKED[name], answer_prefix=whole["token_ids"][:cut])
        assert rest["token_ids"] == whole["token_ids"][cut:], cut
        assert rest["finish_reason"] == whole["finish_reason"]
        for told in ("logprobs", "trace"):
            assert rest.get(told) == (whole[told][cut:] if told in whole else None)


def test_so_is_the_answer_of_a_conversation(asked) -> None:
    talk = {"messages": [{"role": "user", "content": "Hello"}], "prompt": None}
    whole = asked(**talk)["token_ids"]
    assert asked(**talk, answer_prefix=whole[:9])["token_ids"] == whole[9:]
    assert asked(**talk, answer_prefix=[])["token_ids"] == whole, "nothing is there yet"


def test_texts_add_up_wherever_an_answer_is_cut(served, asked) -> None:
    """A character of two bytes, and what could have become a stop text, come with the rest."""
    tokenizer = served.models.get().checkpoint.tokenizer
    text = "Ça 0\u0301 é x"
    wanted = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([token_id]) for token_id in wanted)
    fields = {"regex": text, "stop": ["x!"], "ignore_end_token": False}
    told = [data for name, data in events(served, prompt=PROMPT, seed=4, **fields) if name == "token"]
    assert "".join(each["text"] for each in told) == text
    ids = [token_id for each in told for token_id in each["token_ids"]]
    for cut in range(1, len(ids)):
        before = "".join(each["text"] for each in told[:cut])
        assert before + asked(**fields, answer_prefix=ids[:cut])["text"] == text, cut


def test_a_stop_text_may_begin_before_the_cut(served, asked) -> None:
    ids = served.models.get().checkpoint.tokenizer.encode("ab cd")
    fields = {"regex": "ab cd ef.*", "stop": ["b c", "zzz"], "ignore_end_token": False}
    assert asked(**fields)["text"] == "a"
    rest = asked(**fields, answer_prefix=ids[:1])
    assert (rest["text"], rest["stop_reason"]) == ("", "b c")


def test_what_is_read_is_counted_with_the_prompt(served, asked) -> None:
    body = {"prompt": PROMPT, "seed": 4, "max_tokens": 12, "ignore_end_token": True}
    first = served.answer("/generate", **body)
    ids = first["outputs"][0]["token_ids"]
    usage = served.answer("/generate", **body, answer_prefix=ids[:5])["usage"]
    assert usage["prompt_tokens"] == first["usage"]["prompt_tokens"] + 5
    assert usage["completion_tokens"] == 7
    told = list(events(served, **body, answer_prefix=ids[:5], progress=True))
    assert told[0][0] == "progress" and told[0][1]["total"] == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"answer_prefix": [1, 10**6]}, "answer_prefix[1]", "token ids 0 to"),
        ({"answer_prefix": [1, "a"]}, "answer_prefix[1]", "must be a token id"),
        ({"answer_prefix": "a"}, "answer_prefix", "list"),
        ({"answer_prefix": [5] * 3, "n": 2}, "answer_prefix", "several are asked for"),
        ({"answer_prefix": [5] * 3, "best_of": 2}, "answer_prefix", "several are asked for"),
        ({"answer_prefix": [5], "prompt": ["a", "b"]}, "answer_prefix", "several are asked for"),
        ({"answer_prefix": [5], "num_beams": 2}, "num_beams", "can't be combined with answer_prefix"),
        ({"answer_prefix": [5], "penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha", "with answer_prefix"),
        ({"answer_prefix": [5], "mirostat": 2}, "mirostat", "with answer_prefix"),
        ({"answer_prefix": [5] * 40}, "max_tokens", "counts them"),
        ({"answer_prefix": [5] * 500, "max_tokens": None}, "answer_prefix", "context"),
        ({"answer_prefix": [100] * 3, "regex": "zzzzz"}, "answer_prefix[0]", "does not allow there"),
        ({"answer_prefix": "zz", "regex": "zz"}, "answer_prefix", "nothing can follow"),
        ({"answer_prefix": "a stop", "stop": ["st"]}, "answer_prefix", "which ends the answer"),
    ],
)  # fmt: skip
def test_what_can_not_be_gone_on_with_is_refused(served, fields, field, words) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    if fields["answer_prefix"] in ("zz", "a stop"):
        fields = fields | {"answer_prefix": tokenizer.encode(fields["answer_prefix"])}
    body = {"prompt": PROMPT, "seed": 4, "max_tokens": LENGTH} | fields
    refused = served.post("/generate", **body)
    error = refused.json()["error"]
    assert refused.status_code in (400, 422) and error["field"] == field and words in error["message"], error


def test_other_routes_know_no_such_field(served) -> None:
    for path, body in (
        ("/score", {"text": "a b"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/completion", {"prompt": "a"}),
    ):
        refused = served.post(path, **body, answer_prefix=[1])
        assert refused.status_code in (400, 422) and "answer_prefix" in refused.text, path
