"""llama.cpp's routes over a real socket: its shapes, its defaults, and what each of its parameters does here."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.api.test_errors import LONG
from tests.service.api.tgi.test_routes import fails_after
from tests.tiny import run_by
from topkapi.model.generation import generate
from topkapi.service.api.llama import schemas as llama_schemas
from topkapi.service.api.llama.parameters import DEFAULTS, SAMPLERS
from topkapi.service.slots import SlotView, slot_views

PROMPT = "The value of the expression is"


def events(served, **body) -> Iterator[dict]:
    with served.client.stream("POST", "/completion", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield json.loads(line.removeprefix("data: "))


def complete(served, **body) -> dict:
    return served.answer("/completion", **{"prompt": PROMPT, "n_predict": 8, "seed": 3, "return_tokens": True} | body)


def test_an_answer_has_the_documented_shape(served) -> None:
    for path in ("/completion", "/completions"):
        answer = served.answer(path, prompt=PROMPT, n_predict=5, ignore_eos=True)
        assert llama_schemas.LlamaCompletion.model_validate(answer).model_dump(exclude_unset=True) == answer
        assert (answer["stop"], answer["stop_type"], answer["stopping_word"]) == (True, "limit", "")
        assert (answer["tokens"], answer["tokens_predicted"], answer["truncated"]) == ([], 5, False)
        assert answer["prompt"] == PROMPT
        timings = answer["timings"]
        assert timings["prompt_n"] + timings["cache_n"] == answer["tokens_evaluated"]
        assert timings["predicted_n"] == 5


def test_the_defaults_and_the_order_are_llama_cpps(served) -> None:
    """Truncations before the temperature, as in llama.cpp; computed again without a server."""
    checkpoint = served.models.get().checkpoint
    order = ["logit_bias", "repetition_penalty", "count_penalties", "dry", "top_n_sigma", "top_k", "typical_p",
             "top_p", "min_p", "xtc", "temperature"]  # fmt: skip
    same = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "order": order}
    answer = complete(served, n_predict=20)
    prompt = checkpoint.tokenizer.encode(PROMPT)
    expected = generate(checkpoint.model, prompt, {"max_tokens": 20, "seed": 3} | same)
    assert answer["tokens"] == expected.token_ids
    settings = answer["generation_settings"]
    for name in ("temperature", "top_k", "top_p", "min_p", "repeat_last_n", "dry_base", "mirostat_tau"):
        assert settings[name] == DEFAULTS[name]
    assert settings["samplers"] == list(SAMPLERS)
    assert (settings["seed"], settings["n_predict"]) == (3, 20)


@pytest.mark.parametrize(
    ("sent", "ours"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": -1}, {"temperature": 0}),
        ({"top_k": -1, "top_p": 2, "min_p": -1}, {"top_k": 0, "top_p": 1, "min_p": 0}),
        ({"typical_p": 0.5}, {"typical_p": 0.5}),
        ({"top_n_sigma": 0.5}, {"top_n_sigma": 0.5}),
        ({"repeat_penalty": 1.8}, {"repetition_penalty": 1.8, "repetition_range": 64}),
        ({"repeat_penalty": 1.8, "repeat_last_n": 2}, {"repetition_penalty": 1.8, "repetition_range": 2}),
        ({"repeat_penalty": 1.8, "repeat_last_n": 0}, {}),
        ({"presence_penalty": 1.9}, {"presence_penalty": 1.9}),
        ({"frequency_penalty": 1.9}, {"frequency_penalty": 1.9}),
        ({"dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
         {"dynamic_temperature_range": 0.5, "dynamic_temperature_exponent": 2.0}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.01}, {"xtc_probability": 1.0, "xtc_threshold": 0.01}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.6}, {}),
        ({"dry_multiplier": 4.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["x"]},
         {"dry_multiplier": 4.0, "dry_allowed_length": 1, "dry_breakers": ["x"]}),
        ({"dry_multiplier": 4.0, "dry_penalty_last_n": 0}, {}),
        ({"mirostat": 2, "mirostat_tau": 3.0},
         {"mirostat": 2, "mirostat_tau": 3.0, "top_k": None, "top_p": None, "min_p": None, "order": None}),
        ({"ignore_eos": True}, {"banned_token_ids": [509, 511]}),
        ({"logit_bias": [[70, 50.0]]}, {"logit_bias": {"70": 50.0}}),
        ({"logit_bias": {"70": 50}}, {"logit_bias": {"70": 50.0}}),
        ({"logit_bias": [[70, 50.0], [70, -20]]}, {"logit_bias": {"70": 30.0}}),
        ({"logit_bias": [[70, False]]}, {"banned_token_ids": [70]}),
        ({"seed": -1, "samplers": ["top_k"], "top_k": 1}, {"top_k": 1}),
        ({"samplers": "kt", "top_k": 3}, {"top_p": 1.0, "min_p": 0.0, "top_k": 3, "order": "drop"}),
        ({"json_schema": {"enum": [12, 34]}}, {"json_schema": {"enum": [12, 34]}}),
        ({"grammar": 'root ::= "ab" [c-d]{2}'}, {"regex": "ab[c-d]{2}"}),
        ({"stop": "e"}, {"stop": ["e"]}),
    ],
    ids=str,
)  # fmt: skip
def test_each_parameter_means_what_it_does_in_llama_cpp(served, sent, ours) -> None:
    order = ["logit_bias", "repetition_penalty", "count_penalties", "dry", "top_n_sigma", "top_k", "typical_p",
             "top_p", "min_p", "xtc", "temperature"]  # fmt: skip
    native = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "order": order, "max_tokens": 16,
              "seed": 3, "dry_breakers": None} | ours  # fmt: skip
    if native["order"] == "drop":
        native["order"] = ["top_k", "temperature"]
    (output,) = served.answer("/generate", prompt=PROMPT, **native)["outputs"]
    assert complete(served, n_predict=16, **sent)["tokens"] == output["token_ids"]


def test_texts_with_a_bias_count_for_each_of_their_tokens(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    plain = complete(served, temperature=0)
    word = tokenizer.decode(plain["tokens"][:2])
    for bias in ([[word, False]], {word: -100}):
        answer = complete(served, temperature=0, logit_bias=bias)
        assert not set(tokenizer.encode(word)) & set(answer["tokens"])


def test_digits_that_are_no_json_are_a_text(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    biases = complete(served, logit_bias={"٣": 5, "7": 5})["generation_settings"]["logit_bias"]
    assert {each["token"] for each in biases} == {7, *tokenizer.encode("٣")}


def test_ignore_eos_is_shown_as_a_bias_of_null(served) -> None:
    shown = complete(served, ignore_eos=True)["generation_settings"]["logit_bias"]
    assert shown == [{"token": end, "bias": None} for end in served.models.get().checkpoint.config.end_token_ids]
    assert complete(served)["generation_settings"]["logit_bias"] == []


def test_why_it_stopped(served) -> None:
    text = complete(served, temperature=0, n_predict=20)["content"]
    word = complete(served, temperature=0, n_predict=20, stop=[text[6:9]])
    assert (word["stop_type"], word["stopping_word"]) == ("word", text[6:9])
    assert word["content"] == text[: text.index(text[6:9])]
    end = complete(served, grammar='root ::= "ab"')
    assert (end["content"], end["stop_type"]) == ("ab", "eos")
    full = complete(served, n_predict=-1, ignore_eos=True)
    assert (full["stop_type"], full["truncated"]) == ("limit", True)
    assert full["tokens_evaluated"] + full["tokens_predicted"] == 128
    nothing = complete(served, n_predict=0)
    assert (nothing["content"], nothing["stop_type"], nothing["timings"]["predicted_per_second"]) == ("", "limit", None)


@pytest.mark.one_process("slows the network down")
def test_a_deadline_ends_the_answer_as_it_stands(served, monkeypatch) -> None:
    run = served.models.get().engine.network.run

    def slow(*arguments: object) -> object:
        time.sleep(0.03)
        return run(*arguments)

    run_by(monkeypatch, served.models.get().engine.network, slow)
    answer = complete(served, n_predict=100, t_max_predict_ms=200)
    assert answer["stop_type"] == "limit" and 0 < answer["tokens_predicted"] < 50


def test_prompts_in_every_form(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    ids = tokenizer.encode(PROMPT)
    whole = complete(served, temperature=0)
    for prompt in (ids, {"prompt_string": PROMPT}, [PROMPT], [ids], [*ids[:2], tokenizer.decode(ids[2:])]):
        answer = complete(served, temperature=0, prompt=prompt)
        assert (answer["prompt"], answer["tokens"]) == (PROMPT, whole["tokens"])
    several = complete(served, temperature=0, prompt=[PROMPT, ids, "The sea"])
    assert [answer["index"] for answer in several] == [0, 1, 2]
    assert several[0]["tokens"] == several[1]["tokens"] == whole["tokens"]
    assert [answer["tokens_evaluated"] for answer in several] == [len(ids), len(ids), len(tokenizer.encode("The sea"))]
    assert len(complete(served, n_cmpl=3)) == 3
    assert complete(served, prompt="<|im_start|>user")["tokens_evaluated"] == len(tokenizer.encode("user")) + 1


def test_a_stream_adds_up_to_the_whole_answer(served) -> None:
    text = complete(served, n_predict=30)["content"]
    stop = text[9:13]
    whole = complete(served, n_predict=30, n_probs=2, stop=[stop])
    *chunks, last = events(served, prompt=PROMPT, n_predict=30, seed=3, n_probs=2, stop=[stop], timings_per_token=True)
    assert all(chunk["stop"] is False and len(chunk["tokens"]) == 1 and "timings" in chunk for chunk in chunks)
    assert [chunk["tokens"][0] for chunk in chunks] == whole["tokens"]
    assert "".join(chunk["content"] for chunk in [*chunks, last]) == whole["content"]
    assert [chunk["completion_probabilities"][0] for chunk in chunks] == whole["completion_probabilities"]
    assert last["stop"] is True and last["stopping_word"] == stop
    same = ("generation_settings", "stop_type", "tokens_predicted", "tokens_evaluated", "prompt", "truncated")
    assert {name: last[name] for name in same} == {name: whole[name] for name in same} | {
        "generation_settings": whole["generation_settings"]
        | {"timings_per_token": True, "stream": True, "return_tokens": False}
    }


def test_several_prompts_in_one_stream(served) -> None:
    whole = complete(served, prompt=[PROMPT, "The sea"])
    seen = list(events(served, prompt=[PROMPT, "The sea"], n_predict=8, seed=3))
    for index, answer in enumerate(whole):
        own = [chunk for chunk in seen if chunk["index"] == index]
        assert "".join(chunk["content"] for chunk in own) == answer["content"]
        assert [chunk["stop"] for chunk in own] == [False] * (len(own) - 1) + [True]


def test_probabilities(served) -> None:
    (output,) = served.answer("/generate", prompt=PROMPT, temperature=0, max_tokens=5, logprobs=4)["outputs"]
    tokens = complete(served, temperature=0, n_predict=5, n_probs=4)["completion_probabilities"]
    for token, entry in zip(tokens, output["logprobs"], strict=True):
        assert (token["id"], token["logprob"]) == (entry["token_id"], entry["raw_logprob"])
        assert [(each["id"], each["logprob"]) for each in token["top_logprobs"]] == [
            (each["token_id"], each["logprob"]) for each in entry["top"]
        ]
        assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"]


def test_probabilities_after_the_samplers(served) -> None:
    tokens = complete(served, n_probs=8, top_k=8, top_p=1.0, min_p=0.0, post_sampling_probs=True)
    for token in tokens["completion_probabilities"]:
        assert token["id"] in [each["id"] for each in token["top_probs"]]
        assert len(token["top_probs"]) == 8
        assert math.isclose(sum(each["prob"] for each in token["top_probs"]), 1, rel_tol=1e-6)
    greedy = complete(served, n_probs=8, temperature=0, post_sampling_probs=True)["completion_probabilities"]
    assert all([each["prob"] for each in token["top_probs"]] == [1.0] for token in greedy)


def test_every_parameter_is_documented() -> None:
    document = (Path(__file__).resolve().parents[4] / "docs" / "llama-cpp.md").read_text()
    families = ("xtc_", "dry_", "mirostat")
    names = [name for name in llama_schemas.LlamaRequest.model_fields if not name.startswith(families)]
    assert [name for name in names if f"`{name}`" not in document] == []


def test_only_the_named_fields(served) -> None:
    answer = complete(served, response_fields=["content", "generation_settings/n_predict", "nothing/here"])
    assert answer.keys() == {"content", "generation_settings/n_predict"}
    assert answer["generation_settings/n_predict"] == 8


BAD = [
    ({}, "prompt is missing"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": None}, "prompt must be"),
    ({"prompt": [1, 2, 512]}, "prompt[2]"),
    ({"prompt": [1, "a", 512]}, "prompt[2] is 512"),
    ({"prompt": ["a", {"prompt_string": 5}]}, "prompt[1].prompt_string"),
    ({"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, "prompt.multimodal_data"),
    ({"prompt": LONG}, "exceeds the available context size (128 tokens)"),
    ({"prompt": "a", "n_predict": -2}, "n_predict"),
    ({"prompt": "a", "n_predict": 1, "max_tokens": 1}, "two names"),
    ({"prompt": "a", "temprature": 1}, "temprature"),
    ({"prompt": "a", "mirostat": 1}, "mirostat"),
    ({"prompt": "a", "mirostat": 2, "top_k": 5}, "mirostat"),
    ({"prompt": "a", "mirostat": 2, "temperature": 0}, "mirostat"),
    ({"prompt": "a", "samplers": ["top_q"]}, "top_q"),
    ({"prompt": "a", "samplers": ["top_k", "top-k"]}, "twice"),
    ({"prompt": "a", "samplers": "kz"}, "'z'"),
    ({"prompt": "a", "logit_bias": [[70]]}, "logit_bias"),
    ({"prompt": "a", "logit_bias": [[70, True]]}, "logit_bias"),
    ({"prompt": "a", "logit_bias": [["", 5]]}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"": 5}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": [[70, 60], [70, 60]]}, "logit_bias"),
    ({"prompt": "a", "logit_bias": [[70, 0.5], [70, 10**400]]}, "beyond float64"),
    ({"prompt": "a", "logit_bias": [[512, 1.0]]}, "512"),
    ({"prompt": "a", "logit_bias": {"70": 101}}, "logit_bias"),
    ({"prompt": "a", "grammar": "root ::= ("}, "GBNF"),
    ({"prompt": "a", "grammar": "root ::= " + "(" * 5000}, "nested too deeply"),
    ({"prompt": "a", "grammar": 'root ::= "a"', "json_schema": {}}, "grammar"),
    ({"prompt": "a", "repeat_penalty": 0}, "repeat_penalty"),
    ({"prompt": "a", "min_keep": 3}, "min_keep"),
    ({"prompt": "a", "n_indent": 3}, "n_indent"),
    ({"prompt": "a", "lora": [{"id": 0, "scale": 1.0}]}, "lora"),
    ({"prompt": "a", "backend_sampling": True}, "backend_sampling"),
    ({"prompt": "a", "n_indent": False}, "n_indent"),
    ({"prompt": "a", "id_slot": 10_000}, "id_slot"),
    ({"prompt": "a", "stop": [""]}, "stop"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[json.dumps(body)[:60] for body, _ in BAD])
def test_bad_requests_are_refused_in_llama_cpps_shape(served, body, words) -> None:
    response = served.post("/completion", **body)
    assert response.status_code == 400, response.text
    error = llama_schemas.LlamaError.model_validate(response.json()).error
    assert error.code == 400 and words in error.message and "\n" not in error.message
    assert error.type == ("exceed_context_size_error" if "exceeds" in words else "invalid_request_error")


def test_what_asks_for_nothing_is_accepted(served) -> None:
    nothing = {"min_keep": 0, "n_indent": 0, "n_discard": 0, "n_cache_reuse": 0, "return_progress": False, "lora": []}
    indifferent = {"cache_prompt": False, "id_slot": 0, "n_keep": 5, "grammar": "", "xtc_threshold": 0.2, "stop": []}
    answer = complete(served, **nothing, **indifferent)
    assert answer["tokens"] == complete(served)["tokens"]
    assert answer["generation_settings"]["n_keep"] == 5


@pytest.mark.one_process("has steps of the engine fail")
def test_other_errors(served, monkeypatch) -> None:
    def refused(response) -> tuple[int, str]:
        error = response.json()["error"]
        assert error["code"] == response.status_code
        return response.status_code, error["type"]

    assert refused(served.post("/completion", prompt="a", model="nowhere")) == (404, "not_found_error")
    assert refused(served.client.get("/completion")) == (405, "invalid_request_error")
    run = served.models.get().engine.network.run
    run_by(monkeypatch, served.models.get().engine.network, fails_after(0, run))
    assert refused(served.post("/completion", prompt="a")) == (500, "server_error")
    run_by(monkeypatch, served.models.get().engine.network, fails_after(5, run))
    *chunks, last = events(served, prompt=PROMPT, n_predict=50, ignore_eos=True)
    assert chunks and last["error"]["code"] == 500
    served.wait_until_idle()


@pytest.mark.one_process("slows the network down, and looks at the slots of its replica")
def test_a_client_that_leaves_frees_its_slot(served, monkeypatch) -> None:
    engine = served.models.get().engine
    run = engine.network.run

    def slow(*arguments: object) -> object:
        time.sleep(0.02)
        return run(*arguments)

    run_by(monkeypatch, engine.network, slow)
    stream = events(served, prompt=PROMPT, n_predict=100, ignore_eos=True)
    next(stream)
    assert sum(slot["is_processing"] for slot in served.client.get("/slots").json()) == 1
    (busy,) = (slot for slot in served.client.get("/slots").json() if slot["is_processing"])
    assert 0 < busy["next_token"]["n_decoded"] < 100
    assert busy["next_token"]["n_decoded"] + busy["next_token"]["n_remain"] == 100
    stream.close()
    served.wait_until_idle()
    assert not any(slot["is_processing"] for slot in served.client.get("/slots").json())


def test_slots_and_props(served) -> None:
    slots, props = served.client.get("/slots").json(), served.client.get("/props").json()
    assert len(slots) == props["total_slots"] and [slot["id"] for slot in slots] == list(range(len(slots)))
    assert all(llama_schemas.LlamaSlot.model_validate(slot).n_ctx == 128 for slot in slots)
    assert llama_schemas.LlamaProps.model_validate(props).model_dump() == props
    assert props["default_generation_settings"]["params"]["top_k"] == 40
    assert (props["model_alias"], props["model_path"].endswith("chat")) == ("chat", True)
    assert "<|im_start|>" in props["chat_template"]
    assert served.client.get("/props?model=base").json()["chat_template"] == ""
    assert served.client.get("/props?model=none").status_code == 404
    assert served.client.get("/slots?fail_on_no_slot=1").status_code == 200
    assert served.client.get("/slots?fail_on_no_slot=x").status_code == 400


@pytest.mark.one_process("has every slot taken")
def test_no_free_slot_can_be_told_by_the_status(served, monkeypatch) -> None:
    views = [SlotView(slot.slot, job=object()) for slot in slot_views(served.models.get().engine)]
    monkeypatch.setattr("topkapi.service.api.llama.state.slot_views", lambda engine: views)
    response = served.client.get("/slots?fail_on_no_slot=1")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable_error")


def test_models_are_listed_without_a_version_too(served) -> None:
    listed = served.client.get("/models").json()
    assert listed["object"] == "list"
    assert (
        [entry["id"] for entry in listed["data"]] == [model["name"] for model in listed["models"]] == ["chat", "base"]
    )


def test_tokens_under_every_name(served) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    text = "What is 媽 🤗<|im_end|>"
    ids = tokenizer.encode_with_control(text)
    assert served.answer("/tokenize", content=text)["tokens"] == ids
    assert served.answer("/tokenize", prompt=text, add_special_tokens=False)["tokens"] == ids
    assert served.answer("/tokenize", content=text, parse_special=False)["tokens"] == tokenizer.encode(text)
    assert served.answer("/tokenize", text=text)["token_ids"] == tokenizer.encode(text)
    assert served.answer("/tokenize", content="")["tokens"] == []
    pieces = served.answer("/tokenize", content=text, with_pieces=True)["tokens"]
    raw = [each["piece"].encode() if isinstance(each["piece"], str) else bytes(each["piece"]) for each in pieces]
    assert b"".join(raw).decode() == text and any(isinstance(each["piece"], list) for each in pieces)
    back = served.answer("/detokenize", tokens=ids)
    assert back["content"] == back["prompt"] == text
    assert served.answer("/detokenize", token_ids=ids)["text"] == text
    assert served.answer("/detokenize", tokens=[])["content"] == ""
    assert served.post("/tokenize", content="a", prompt="a").status_code in (400, 422)
    assert served.post("/detokenize", tokens=[512]).status_code in (400, 422)


@pytest.mark.one_process("changes the tokenizer")
def test_the_begin_token_comes_first_where_the_checkpoints_tools_put_one(served, monkeypatch) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    begin = tokenizer.control_tokens["<|endoftext|>"]
    assert served.answer("/tokenize", content="a", add_special=True)["tokens"] == tokenizer.encode("a")
    monkeypatch.setattr(tokenizer, "adds_begin_token", True)
    ids = [begin, *tokenizer.encode("a")]
    assert served.answer("/tokenize", content="a", add_special=True)["tokens"] == ids
    assert served.answer("/completion", prompt="a", n_predict=1)["prompt"] == "<|endoftext|>a"
    assert served.answer("/completion", prompt=tokenizer.encode("a"), n_predict=1)["prompt"] == "a"


def test_the_template_applied(served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = served.answer("/apply-template", messages=messages)["prompt"]
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    open_ended = served.answer("/apply-template", messages=messages, add_generation_prompt=False)["prompt"]
    assert open_ended == "<|im_start|>user\nhi<|im_end|>\n"
    chat = served.answer("/generate", messages=messages, max_tokens=8, seed=1, temperature=0)["outputs"][0]
    answer = served.answer("/completion", prompt=prompt, n_predict=8, temperature=0, return_tokens=True)
    assert answer["tokens"] == chat["token_ids"]
    assert served.post("/apply-template", messages=messages, model="base").status_code == 400


def test_tools_in_the_template(served) -> None:
    messages, tool = [{"role": "user", "content": "hi"}], {"type": "function", "function": {"name": "now"}}
    assert served.answer("/apply-template", messages=messages, tools=[])["prompt"]
    response = served.post("/apply-template", messages=messages, tools=[tool])
    assert response.status_code == 400 and "takes no tools" in response.json()["error"]["message"]


def test_vectors(served) -> None:
    openai = served.answer("/v1/embeddings", input=[PROMPT, "The sea"])["data"]
    for path, name in (("/embedding", "content"), ("/embeddings", "input")):
        vectors = served.answer(path, **{name: [PROMPT, "The sea"]})
        assert [vector["embedding"] for vector in vectors] == [[each["embedding"]] for each in openai]
        assert served.answer(path, **{name: PROMPT}) == vectors[:1]
    for body in ({}, {"content": LONG}, {"content": []}, {"content": "a", "embd_normalize": 0}):
        assert served.post("/embedding", **body).json()["error"]["code"] == 400


def test_openais_chat_without_its_version(served) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    same, other = served.answer("/v1/chat/completions", **body), served.answer("/chat/completions", **body)
    assert other["choices"] == same["choices"]
    long = served.post("/chat/completions", messages=[{"role": "user", "content": LONG}]).json()["error"]
    assert (long["type"], long["n_ctx"]) == ("exceed_context_size_error", 128) and long["n_prompt_tokens"] > 128
    assert served.post("/chat/completions", messages=5).json()["error"]["type"] == "invalid_request_error"


def test_health(served, serve) -> None:
    assert served.client.get("/v1/health").json() == {"status": "ok"}
    with serve() as empty:
        response = empty.client.get("/v1/health")
        assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable_error")
