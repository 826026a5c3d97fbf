"""SGLang's body at /generate: told from ours by its field, answered in its shape, refused where it can't act."""

import json

import pytest

from topkapi.engine.engine import Engine
from topkapi.model.errors import Overloaded

PROMPT = "The value of the expression is"


def ask(served, **body) -> dict | list:
    return served.answer("/generate", **({"text": PROMPT} | body))


def test_the_answer_is_what_the_native_route_gives(served) -> None:
    sampling = {"max_new_tokens": 9, "sampling_seed": 4, "temperature": 0.8, "top_k": -1, "top_p": 0.9, "min_p": 0.01}
    native = served.answer(
        "/generate", prompt=PROMPT, max_tokens=9, seed=4, temperature=0.8, top_p=0.9, min_p=0.01, logprobs=2
    )
    (output,) = native["outputs"]
    answer = ask(served, sampling_params=sampling, return_logprob=True, top_logprobs_num=2, rid="mine")
    assert (answer["text"], answer["output_ids"]) == (output["text"], output["token_ids"])
    about = answer["meta_info"]
    assert (about["id"], about["completion_tokens"]) == ("mine", 9)
    assert about["finish_reason"] == {"type": "length", "length": 9}
    assert about["prompt_tokens"] == native["usage"]["prompt_tokens"]
    entries = output["logprobs"]
    assert about["output_token_logprobs"] == [[each["raw_logprob"], each["token_id"], None] for each in entries]
    assert [[top[:2] for top in each] for each in about["output_top_logprobs"]] == [
        [[top["logprob"], top["token_id"]] for top in each["top"]] for each in entries
    ]


def test_several_prompts_and_token_ids(served) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 5}
    ids = served.answer("/tokenize", text=PROMPT)["token_ids"]
    one = ask(served, sampling_params=greedy)
    by_id = served.answer("/generate", input_ids=ids, sampling_params=greedy)
    listed = served.answer("/generate", input_ids=[ids], sampling_params=greedy)
    several = ask(served, text=[PROMPT, "The sea"], sampling_params=greedy)
    assert one["text"] == by_id["text"] == listed[0]["text"] == several[0]["text"]
    assert len(several) == 2 and len(ask(served, sampling_params={"n": 3})) == 3


def test_a_stream_holds_the_text_so_far(served) -> None:
    body = {"sampling_params": {"max_new_tokens": 7, "sampling_seed": 4}}
    whole = ask(served, **body)
    lines = [line for line in served.post("/generate", text=PROMPT, stream=True, **body).text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    seen = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert seen[-1]["text"] == whole["text"] and seen[-1]["meta_info"]["finish_reason"] == {
        "type": "length",
        "length": 7,
    }
    assert all(whole["text"].startswith(each["text"]) for each in seen)


def test_stops_and_structures(served) -> None:
    text = ask(served, sampling_params={"temperature": 0, "max_new_tokens": 16})["text"]
    stop = text[5:8]
    for trim, expected in ((None, text[: text.index(stop)]), (True, text[: text.index(stop) + len(stop)])):
        sampling = {"temperature": 0, "max_new_tokens": 16, "stop": stop, "no_stop_trim": trim}
        answer = ask(served, sampling_params=sampling)
        assert answer["text"] == expected
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    for structure in ({"regex": "ab"}, {"ebnf": 'root ::= "ab"'}):
        assert ask(served, sampling_params=structure)["text"] == "ab"
    assert ask(served, sampling_params={"json_schema": '{"const": 7}'})["text"] == "7"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": []}, "text is empty"),
        ({"text": "a", "input_ids": [1]}, "exclude each other"),
        ({"input_ids": [512]}, "input_ids[0]"),
        ({"text": "a", "prompt": "a"}, "prompt"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"skip_special_tokens": False}}, "skip_special_tokens"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "json_schema is not valid JSON"),
        ({"text": "a", "sampling_params": {"ebnf": "root ::= ("}}, "ebnf is not valid GBNF"),
        ({"text": "a", "sampling_params": {"stop": [""]}}, "stop"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_in_sglangs_shape(served, body, words) -> None:
    response = served.post("/generate", **body)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert response.json() == {"error": {"message": response.json()["error"]["message"]}}


@pytest.mark.one_process("has the engine refuse")
def test_a_full_queue(served, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Overloaded("the queue is full", retry_after=7)

    monkeypatch.setattr(Engine, "submit", refuse)
    response = served.post("/generate", text="a")
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
