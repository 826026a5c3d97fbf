"""What llama.cpp and vLLM add to OpenAI's chat: grammars, schemas, timings, and answers that are begun already."""

import json

import pytest

from tests.service.api.openai.openai_cases import USER, chunks, refused

PATHS = ("/v1/chat/completions", "/chat/completions")
SAID = [*USER, {"role": "assistant", "content": "Well, the"}]


@pytest.mark.parametrize("path", PATHS)
def test_a_gbnf_grammar_is_followed(served, path) -> None:
    grammar = 'root ::= "a"{5,5} end\nend ::= "!"'
    (choice,) = served.answer(path, messages=USER, grammar=grammar, max_tokens=9)["choices"]
    assert choice["message"]["content"] == "aaaaa!"
    lark = {"grammar": 'start: "b"'}
    (choice,) = served.answer(path, messages=USER, structured_outputs=lark, max_tokens=9)["choices"]
    assert choice["message"]["content"] == "b"
    for field in ("grammar", "guided_grammar"):
        error = served.post(path, messages=USER, **{field: "root ::= ("}).json()["error"]
        assert f"{field} is not valid GBNF" in error["message"]
    (choice,) = served.answer("/v1/completions", prompt="a", guided_grammar='root ::= "yes"')["choices"]
    assert choice["text"] == "yes"


def test_the_native_grammar_tells_gbnf_by_its_rules(served) -> None:
    error = served.post("/generate", prompt="a", grammar='root ::= "yes" | "no"').json()["error"]
    assert "GBNF" in error["message"] and "start:" in error["hint"]
    (output,) = served.answer("/generate", prompt="a", grammar='start: "x ::= y"')["outputs"]
    assert output["text"] == "x ::= y"


def test_a_json_object_may_have_a_schema(served) -> None:
    form = {"type": "json_object", "schema": {"const": "42"}}
    (choice,) = served.answer(PATHS[0], messages=USER, response_format=form)["choices"]
    assert json.loads(choice["message"]["content"]) == "42"
    nameless = {"type": "json_schema", "json_schema": {"schema": {"const": 7}}}
    (choice,) = served.answer(PATHS[0], messages=USER, response_format=nameless)["choices"]
    assert json.loads(choice["message"]["content"]) == 7
    for schema in (123, {"type": 123}, {"type": "hiccup"}):
        wrong = {"type": "json_object", "schema": schema}
        assert refused(served.post(PATHS[0], messages=USER, response_format=wrong))


@pytest.mark.parametrize("path", PATHS)
def test_timings_come_with_every_token_if_asked(served, path) -> None:
    body = {"messages": USER, "max_tokens": 6, "ignore_eos": True, "timings_per_token": True, "cache_prompt": True}
    first, *parts, usage, _ = chunks(served, path, stream_options={"include_usage": True}, id_slot=0, **body)
    assert "timings" not in first
    counts = [part["timings"]["predicted_n"] for part in parts]
    assert counts == sorted(counts) and counts[-1] == usage["timings"]["predicted_n"] == 6
    assert usage["timings"]["prompt_n"] + usage["timings"]["cache_n"] == usage["usage"]["prompt_tokens"]
    assert usage["timings"]["predicted_per_second"] > 0
    assert served.answer(path, **body)["timings"]["predicted_n"] == 6
    assert "timings" not in served.answer(path, **body | {"timings_per_token": False})
    list(chunks(served, path, **body | {"max_tokens": 0}))


def test_an_answer_goes_on_with_the_assistants_last_message(served) -> None:
    seen = {"max_tokens": 4, "seed": 1, "return_token_ids": True}
    ids = {path: served.answer(path, messages=SAID, **seen)["prompt_token_ids"] for path in PATHS}
    begun = served.answer(PATHS[0], messages=USER, **seen)["prompt_token_ids"]
    written = served.models.get().checkpoint.tokenizer.encode("Well, the")
    assert ids["/chat/completions"] == begun + written, "as llama.cpp does"
    assert ids["/v1/chat/completions"][: len(begun)] == begun and ids["/v1/chat/completions"][-3:] == begun[-3:]
    asked = {"continue_final_message": True, "add_generation_prompt": False}
    assert served.answer(PATHS[0], messages=SAID, **asked, **seen)["prompt_token_ids"] == begun + written
    new_turn = served.answer(PATHS[1], messages=SAID, add_generation_prompt=True, **seen)
    assert new_turn["prompt_token_ids"] == ids["/v1/chat/completions"]


def test_what_an_answer_cannot_go_on_with_is_refused(served) -> None:
    twice = [*SAID, SAID[-1]]
    assert "last two messages" in served.post(PATHS[1], messages=twice).json()["error"]["message"]
    assert served.answer(PATHS[1], messages=twice, add_generation_prompt=True, max_tokens=1)
    assert served.answer(PATHS[0], messages=twice, max_tokens=1), "a template may take two turns in a row"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refused(served.post(PATHS[0], messages=SAID, **both))["param"] == "add_generation_prompt"
    assert refused(served.post(PATHS[0], messages=USER, continue_final_message=True))["param"] == "messages"
    assert (
        refused(served.post(PATHS[0], messages=USER, add_generation_prompt=False))["param"] == "add_generation_prompt"
    )


def test_the_tokens_of_a_conversation_are_counted(served) -> None:
    counted = served.answer("/chat/completions/input_tokens", messages=SAID)["input_tokens"]
    assert counted == served.answer("/chat/completions", messages=SAID, max_tokens=1)["usage"]["prompt_tokens"]
    assert served.answer("/v1/chat/completions/input_tokens", messages=SAID)["input_tokens"] > counted
    long = [{"role": "user", "content": "hello " * 200}]
    assert served.answer("/v1/chat/completions/input_tokens", messages=long)["input_tokens"] > 200
    refusal = served.post("/v1/chat/completions/input_tokens", messages=USER, trace="x").json()["error"]
    assert "trace" in refusal["message"], "what the chat would refuse is refused here too"
