"""TGI's routes, through its own client over a real socket: text-generation, sync and async, and raw HTTP."""

import asyncio
import functools
import json
import time
from collections.abc import Callable

import pytest
from huggingface_hub import InferenceClient
from text_generation import AsyncClient, Client
from text_generation.errors import GenerationError, OverloadedError, ValidationError
from text_generation.types import FinishReason, Grammar, GrammarType

from tests.service.api.test_errors import LONG
from tests.tiny import run_by
from topkapi.engine.engine import Engine
from topkapi.model.errors import Overloaded

PROMPT = "The value of the expression is"


@pytest.fixture(scope="module")
def client(served) -> Client:
    return Client(served.url, timeout=60)


def test_the_client_gets_what_the_network_says(served, client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=12)
    native = served.answer("/generate", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=0)
    (output,) = native["outputs"]
    assert answer.generated_text == output["text"]
    details = answer.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == (FinishReason.Length, 12, None)
    assert [token.id for token in details.tokens] == output["token_ids"]
    assert [token.logprob for token in details.tokens] == [entry["raw_logprob"] for entry in output["logprobs"]]
    assert details.prefill == []
    control = served.models.get().control_ids
    assert [token.special for token in details.tokens] == [token.id in control for token in details.tokens]


def test_sampling_is_reported_with_its_seed_and_can_be_had_again(client) -> None:
    first = client.generate(PROMPT, do_sample=True, temperature=0.9, top_k=50, top_p=0.9, typical_p=0.9)
    assert first.details.seed is not None
    again = client.generate(
        PROMPT, do_sample=True, temperature=0.9, top_k=50, top_p=0.9, typical_p=0.9, seed=first.details.seed
    )
    assert again.generated_text == first.generated_text


def test_penalties_act(client) -> None:
    plain = client.generate(PROMPT, max_new_tokens=40)
    for penalty in ({"repetition_penalty": 1.9}, {"frequency_penalty": 2.0}):
        assert client.generate(PROMPT, max_new_tokens=40, **penalty).generated_text != plain.generated_text


def test_a_stop_sequence_ends_the_answer_and_stays_in_it(client) -> None:
    text = client.generate(PROMPT, max_new_tokens=20).generated_text
    stop = text[8:11]
    answer = client.generate(PROMPT, max_new_tokens=20, stop_sequences=[stop])
    assert answer.details.finish_reason == FinishReason.StopSequence
    assert answer.generated_text == text[: text.index(stop) + len(stop)]


def test_an_answer_that_ends_by_itself_says_so(client) -> None:
    answer = client.generate(PROMPT, grammar=Grammar(type=GrammarType.Regex, value="ab"))
    assert (answer.generated_text, answer.details.finish_reason) == ("ab", FinishReason.EndOfSequenceToken)


def test_prompt_details_are_the_scores_of_the_prompt(served, client) -> None:
    prefill = client.generate(PROMPT, max_new_tokens=1, decoder_input_details=True).details.prefill
    (scored,) = served.answer("/score", text=PROMPT)["results"]
    assert [(token.id, token.logprob) for token in prefill] == [
        (token["token_id"], token["logprob"]) for token in scored["per_token"]
    ]


def test_top_tokens_and_the_full_text(client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=3, top_n_tokens=4, return_full_text=True)
    assert answer.generated_text.startswith(PROMPT)
    assert answer.details.top_tokens is not None
    for token, top in zip(answer.details.tokens, answer.details.top_tokens, strict=True):
        assert [each.logprob for each in top] == sorted((each.logprob for each in top), reverse=True)
        assert (len(top), top[0].id) == (4, token.id)


def test_the_likeliest_of_several_comes_first(served) -> None:
    parameters = {"best_of": 4, "do_sample": True, "details": True, "max_new_tokens": 8, "seed": 5}
    details = served.answer("/generate", inputs=PROMPT, parameters=parameters)["details"]
    others = details["best_of_sequences"]

    def mean(sequence: dict) -> float:
        return sum(token["logprob"] for token in sequence["tokens"]) / len(sequence["tokens"])

    means = [mean(sequence) for sequence in (details, *others)]
    assert len(means) == 4 and means == sorted(means, reverse=True) and len(set(means)) == 4


def test_truncate_keeps_the_end(served, client) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    prefill = client.generate(PROMPT, max_new_tokens=1, truncate=3, decoder_input_details=True).details.prefill
    assert [token.id for token in prefill] == tokenizer.encode(PROMPT)[-3:]


def test_grammars(client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    structured = client.generate(PROMPT, grammar=Grammar(type=GrammarType.Json, value=json.dumps(schema)))
    assert json.loads(structured.generated_text)["a"] in (1, 2)
    digits = client.generate(PROMPT, grammar=Grammar(type=GrammarType.Regex, value="[0-9]{3}"))
    assert len(digits.generated_text) == 3 and digits.generated_text.isdigit()


def test_a_stream_adds_up_to_the_whole_answer(client) -> None:
    whole = client.generate(PROMPT, max_new_tokens=30, do_sample=True, seed=4, top_n_tokens=2)
    events = list(client.generate_stream(PROMPT, max_new_tokens=30, do_sample=True, seed=4, top_n_tokens=2))
    assert "".join(event.token.text for event in events) == whole.generated_text == events[-1].generated_text
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert all(event.details is None and event.generated_text is None for event in events[:-1])
    assert [len(event.top_tokens or []) for event in events] == [2] * len(events)
    details = events[-1].details
    assert details is not None and (details.finish_reason, details.generated_tokens, details.seed) == ("length", 30, 4)


def test_a_stop_sequence_never_leaks_in_halves_into_a_stream(client) -> None:
    text = client.generate(PROMPT, max_new_tokens=20).generated_text
    stop = text[5:12]
    events = list(client.generate_stream(PROMPT, max_new_tokens=20, stop_sequences=[stop]))
    assert "".join(event.token.text for event in events) == events[-1].generated_text
    assert events[-1].generated_text == text[: text.index(stop) + len(stop)]


def test_both_stream_routes_send_tgis_events(served) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
    for path, more in (("/generate_stream", {}), ("/generate", {"stream": True}), ("/", {"stream": True})):
        response = served.post(path, **body, **more)
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n") if line]
        assert len(lines) == 3 and all(line.startswith("data:{") for line in lines)
        last = json.loads(lines[-1].removeprefix("data:"))
        assert (last["index"], last["details"]["input_length"]) == (
            3, served.answer("/tokenize", text=PROMPT)["count"]
        )  # fmt: skip


def test_the_asynchronous_client(served) -> None:
    async def both() -> None:
        client = AsyncClient(served.url, timeout=60)
        whole = await client.generate(PROMPT, max_new_tokens=10)
        events = [event async for event in client.generate_stream(PROMPT, max_new_tokens=10)]
        assert events[-1].generated_text == whole.generated_text

    asyncio.run(both())


def test_hugging_faces_client(served, client) -> None:
    other = InferenceClient(served.url, timeout=60)
    whole = client.generate(PROMPT, max_new_tokens=10)
    answer = other.text_generation(PROMPT, max_new_tokens=10, details=True)
    assert (answer.generated_text, answer.details.finish_reason) == (whole.generated_text, "length")
    streamed = list(other.text_generation(PROMPT, max_new_tokens=10, stream=True, details=True))
    assert streamed[-1].generated_text == whole.generated_text
    assert whole.generated_text.startswith(other.text_generation(PROMPT, max_new_tokens=3))


def test_each_of_many_clients_gets_its_own_answer(served) -> None:
    async def many() -> list[str]:
        client = AsyncClient(served.url, timeout=60)
        asked = (client.generate(PROMPT, max_new_tokens=8, do_sample=True, seed=seed) for seed in range(6))
        return [answer.generated_text for answer in await asyncio.gather(*asked)]

    client = Client(served.url, timeout=60)
    alone = [client.generate(PROMPT, max_new_tokens=8, do_sample=True, seed=seed).generated_text for seed in range(6)]
    assert asyncio.run(many()) == alone


BAD = [
    ({"inputs": ""}, "inputs"),
    ({"inputs": 5}, "inputs"),
    ({"inputs": LONG}, "context holds 128"),
    ({"inputs": "a", "prompt": "a"}, "prompt"),
    ({"inputs": "a", "max_new_tokens": 3}, "max_new_tokens"),
    ({"inputs": "a", "parameters": {"max_tokens": 3}}, "parameters.max_tokens"),
    ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "max_new_tokens"),
    ({"inputs": "a", "parameters": {"max_new_tokens": 128}}, "leave room for 127"),
    ({"inputs": "a", "parameters": {"temperature": 0}}, "temperature"),
    ({"inputs": "a", "parameters": {"top_p": 1.0}}, "top_p"),
    ({"inputs": "a", "parameters": {"top_k": 0}}, "top_k"),
    ({"inputs": "a", "parameters": {"frequency_penalty": 3}}, "frequency_penalty"),
    ({"inputs": "a", "parameters": {"watermark": True}}, "watermarked"),
    ({"inputs": "a", "parameters": {"adapter_id": "x"}}, "adapter_id"),
    ({"inputs": "a", "parameters": {"best_of": 2}}, "without sampling"),
    ({"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}, "stream": True}, "best_of"),
    ({"inputs": "a", "parameters": {"decoder_input_details": True}, "stream": True}, "decoder_input_details"),
    ({"inputs": "a", "parameters": {"grammar": {"type": "xml", "value": "a"}}}, "grammar.type"),
    ({"inputs": "a", "parameters": {"grammar": {"type": "json", "value": "{"}}}, "not valid JSON"),
    ({"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "("}}}, "regex"),
    ({"inputs": "a", "parameters": {"stop": [""]}}, "stop"),
    ({"parameters": {}}, "inputs is missing"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[json.dumps(body)[:60] for body, _ in BAD])
def test_bad_requests_are_refused_in_tgis_shape(served, body, words) -> None:
    response = served.post("/", **body)
    assert response.status_code == 422, response.text
    content = response.json()
    assert content.keys() == {"error", "error_type"}
    assert content["error_type"] == "validation" and words in content["error"]


def test_other_errors_have_tgis_shape_too(served) -> None:
    for path in ("/", "/generate_stream"):
        response = served.client.post(path, content="{", headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error_type"]) == (400, "validation")
    response = served.client.get("/generate_stream")
    assert (response.status_code, response.json()["error_type"]) == (405, "validation")


def test_an_unknown_field_may_be_left_out(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("lenient"), ignore_unknown_fields=True) as served:
        parameters = {"watermark": True, "adapter_id": "x", "max_new_tokens": 2}
        response = served.post("/generate", inputs="a", parameters=parameters)
        assert response.status_code == 200
        assert response.headers["X-Ignored-Parameters"] == "parameters.watermark, parameters.adapter_id"


def test_the_client_raises_tgis_errors(client) -> None:
    with pytest.raises(ValidationError, match="context holds 128"):
        client.generate(LONG)
    with pytest.raises(ValidationError, match="context holds 128"):
        list(client.generate_stream(LONG))


@pytest.mark.one_process("has the engine refuse")
def test_a_full_queue_is_tgis_overload(client, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Overloaded("the queue is full", retry_after=7)

    monkeypatch.setattr(Engine, "submit", refuse)
    with pytest.raises(OverloadedError, match="the queue is full"):
        client.generate("a")


def fails_after(steps: int, work: Callable) -> Callable:
    """A step of the engine that fails once it has run `steps` times."""
    done = 0

    @functools.wraps(work)
    def step(*arguments: object, **options: object) -> object:
        nonlocal done
        done += 1
        if done > steps:
            raise ZeroDivisionError("made up")
        return work(*arguments, **options)

    return step


@pytest.mark.one_process("has steps of the engine fail")
def test_a_failed_step_is_a_generation_error_even_in_mid_stream(served, client, monkeypatch) -> None:
    run = served.models.get().engine.network.run
    run_by(monkeypatch, served.models.get().engine.network, fails_after(0, run))
    with pytest.raises(GenerationError):
        client.generate(PROMPT)
    assert served.post("/", inputs=PROMPT).status_code == 424
    run_by(monkeypatch, served.models.get().engine.network, fails_after(4, run))
    seen = 0
    with pytest.raises(GenerationError):
        for _ in client.generate_stream(PROMPT, max_new_tokens=50, do_sample=False):
            seen += 1
    assert seen > 0
    served.wait_until_idle()


@pytest.mark.one_process("slows the network down")
def test_a_client_that_leaves_frees_the_engine(served, monkeypatch) -> None:
    engine = served.models.get().engine
    run = engine.network.run

    def slow(*arguments: object) -> object:
        time.sleep(0.02)
        return run(*arguments)

    run_by(monkeypatch, engine.network, slow)
    before = engine.counters.generated_tokens
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 100}, "stream": True}
    with served.client.stream("POST", "/", json=body) as response:
        next(response.iter_lines())
    served.wait_until_idle()
    assert engine.counters.generated_tokens - before < 50


def test_what_is_served(served) -> None:
    info = served.client.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("chat", 128, 127)
    assert served.client.get("/health").status_code == 200


@pytest.mark.one_process("changes the tokenizer")
def test_the_begin_token_that_a_checkpoints_tools_add_is_read(served, client, monkeypatch) -> None:
    tokenizer = served.models.get().checkpoint.tokenizer
    begin = tokenizer.control_tokens["<|endoftext|>"]
    monkeypatch.setattr(tokenizer, "adds_begin_token", True)
    for inputs in (PROMPT, "<|endoftext|>" + PROMPT):
        prefill = client.generate(inputs, max_new_tokens=1, decoder_input_details=True).details.prefill
        assert [token.id for token in prefill] == [begin, *tokenizer.encode(PROMPT)]
