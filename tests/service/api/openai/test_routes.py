"""The other routes of OpenAI's API: responses, embeddings, models; and what lm-evaluation-harness asks for."""

import base64
import json
import math
import struct

import pytest
import torch

from tests.service.api.openai.openai_cases import USER, refused
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.api.openai.embeddings import EmbeddingsResponse
from topkapi.service.api.openai.responses import ResponsesResponse


def test_a_response_answers_as_chat_does(served) -> None:
    answer = served.answer("/v1/responses", input="hi", max_output_tokens=8, seed=1)
    ResponsesResponse.model_validate(answer)
    (message,) = answer["output"]
    (part,) = message["content"]
    (choice,) = served.answer("/v1/chat/completions", messages=USER, max_tokens=8, seed=1)["choices"]
    assert part["text"] == choice["message"]["content"]
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["usage"]["output_tokens"] == 8 and answer["store"] is False and answer["seed"] == 1


def test_a_response_to_a_conversation_in_a_form(served) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "Hello.", "annotations": []}]},
        {"role": "user", "content": "more"},
    ]  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "thing", "schema": schema}}
    answer = served.answer("/v1/responses", input=items, instructions="Be brief.", text=form, seed=1)
    assert json.loads(answer["output"][0]["content"][0]["text"]) == {"a": 1}
    assert answer["status"] == "completed" and answer["text"] == form
    turns = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "Hello."},
             {"role": "user", "content": "more"}]  # fmt: skip
    assert answer["usage"]["input_tokens"] == served.answer("/tokenize", messages=turns)["count"]


def test_a_responses_stream_tells_its_events_in_order(served) -> None:
    body = {"input": "hi", "max_output_tokens": 12, "seed": 2, "ignore_eos": True}
    whole = served.answer("/v1/responses", **body)
    response = served.post("/v1/responses", stream=True, **body)
    events = [block.split("\n") for block in response.text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [each["type"] for each in data] == names
    assert [each["sequence_number"] for each in data] == list(range(len(data)))
    deltas = [each["delta"] for each in data if each["type"] == "response.output_text.delta"]
    assert names == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas), "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(deltas) == data[-4]["text"] == data[-1]["response"]["output"][0]["content"][0]["text"] == text


BAD_RESPONSES = [
    ({}, "input", "missing"),
    ({"input": ""}, "input", "at least 1"),
    ({"input": []}, "input", "at least 1"),
    ({"input": "a", "store": True}, "store", "nothing is stored"),
    ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
    ({"input": "a", "conversation": "c"}, "conversation", "send the whole conversation"),
    ({"input": "a", "background": True}, "background", "nothing is stored"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools", "/v1/chat/completions"),
    ({"input": "a", "truncation": "auto"}, "truncation", "too long"),
    ({"input": "a", "n": 2}, "n", "unknown field"),
    ({"input": "a", "stream_options": {"include_usage": True}}, "stream_options", "go with stream"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "'message'"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_text"),
    ({"input": [{"role": "user", "content": []}], "instructions": "b"}, "input[0].content", "empty"),
    ({"input": "a", "max_output_tokens": -1}, "max_output_tokens", "at least 0"),
    ({"input": "a", "model": "base"}, "input", "without a chat template"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD_RESPONSES, ids=lambda value: str(value)[:50])
def test_what_is_wrong_with_a_response_is_named(served, body, param, words) -> None:
    error = refused(served.post("/v1/responses", **body))
    assert error["param"] == param and words in error["message"]


def test_an_embedding_is_the_mean_state_of_length_one(served) -> None:
    checkpoint = served.models.get().checkpoint
    ids = checkpoint.tokenizer.encode("The value of a list")
    answer = served.answer("/v1/embeddings", input=["The value of a list", "Names"])
    EmbeddingsResponse.model_validate(answer)
    first, second = (entry["embedding"] for entry in answer["data"])
    with torch.inference_mode():
        model = load_checkpoint(checkpoint.path).model
        states = model.hidden(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))[0]
    mean = states.double().mean(dim=0)
    assert first == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert math.fsum(number**2 for number in first) == pytest.approx(1) and first != second
    count = len(ids) + len(checkpoint.tokenizer.encode("Names"))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_an_embedding_is_the_same_in_every_form_and_in_any_company(served) -> None:
    long = "one two three " * 200
    alone = served.answer("/v1/embeddings", input=long, model="base")["data"][0]["embedding"]
    with served.client.stream(
        "POST", "/generate", json={"prompt": "a", "model": "base", "max_tokens": 400, "stream": True, "seed": 1}
    ):
        answer = served.answer("/v1/embeddings", input=["b", long], model="base", encoding_format="base64")
    raw = base64.b64decode(answer["data"][1]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == alone
    ids = served.models.get("base").checkpoint.tokenizer.encode(long)
    assert served.answer("/v1/embeddings", input=ids, model="base")["data"][0]["embedding"] == alone


BAD_EMBEDDINGS = [
    ({}, "input", "missing"),
    ({"input": ""}, "input", "empty"),
    ({"input": ["a", ""]}, "input[1]", "empty"),
    ({"input": [[1], [600]]}, "input[1][0]", "0 to 511"),
    ({"input": "a", "dimensions": 8}, "dimensions", "wide"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
    ({"input": "a " * 300}, "input", "context holds 128"),
    ({"input": ["a"] * 2049}, "input", "2,048"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD_EMBEDDINGS, ids=lambda value: str(value)[:50])
def test_what_is_wrong_with_an_embedding_is_named(served, body, param, words) -> None:
    error = refused(served.post("/v1/embeddings", **body))
    assert error["param"] == param and words in error["message"]


def test_models(served) -> None:
    listed = served.client.get("/v1/models").json()
    assert listed["object"] == "list" and [entry["id"] for entry in listed["data"]] == ["chat", "base"]
    assert served.client.get("/v1/models/base").json() == listed["data"][1]
    error = refused(served.client.get("/v1/models/gpt-5"), 404)
    assert error["code"] == "model_not_found" and "chat, base" in error["message"]


def test_every_error_under_v1_is_in_openais_shape(served) -> None:
    assert refused(served.client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert refused(served.client.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    assert refused(served.client.post("/v1/completions", content=b"{}"), 415)["code"] == "unsupported_media_type"
    malformed = served.client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert refused(malformed)["code"] == "malformed_body"
    error = refused(served.post("/v1/completions", prompt="a", model="gpt-5"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_what_the_harness_asks_of_a_tokenizer(served) -> None:
    told = served.client.get("/tokenizer_info").json()
    assert told.keys() == {"eos_token", "bos_token", "pad_token", "chat_template"}
    tokenizer = served.models.get().checkpoint.tokenizer

    def encode(text: str) -> list[int]:
        return served.answer("/tokenize", prompt=text, add_special_tokens=False)["tokens"]

    assert encode(told["eos_token"]) == [tokenizer.end_token_id]
    assert encode("Hello, naïve world") == tokenizer.encode("Hello, naïve world")
    assert served.answer("/detokenize", tokens=encode("Hello, naïve"))["prompt"] == "Hello, naïve"
    assert served.client.get("/tokenizer_info", params={"model": "base"}).json()["chat_template"] is None
    assert served.client.get("/tokenizer_info", params={"model": "x"}).status_code == 404
