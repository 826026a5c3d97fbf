"""POST /generate through a real socket: what comes back, streamed or whole, is what the engine chose."""

import asyncio
import functools
import json
import re
from collections.abc import Iterator

import httpx
import pytest

from topkapi.engine.engine import Engine
from topkapi.model.decoding.parameters import PARAMETERS
from topkapi.model.generation import generate
from topkapi.service.api.native.schemas import GenerateResponse

NAMES = ("chat", "base")
PROMPT = "The value of the expression is"

pytestmark = pytest.mark.usefixtures("ahead")


def events(served, **body) -> Iterator[tuple[str, dict]]:
    """The server-sent events of a stream, as (name, data)."""
    with served.client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))
            else:
                assert line == "" or line.startswith("id: ")


def test_an_answer_has_the_documented_shape(served) -> None:
    answer = served.answer("/generate", prompt=PROMPT, max_tokens=4, logprobs=2, seed=1)
    assert GenerateResponse.model_validate(answer).model_dump(exclude_unset=True) == answer
    (output,) = answer["outputs"]
    assert (output["index"], output["prompt_index"], output["finish_reason"]) == (0, 0, "length")
    assert answer["usage"] == {
        "prompt_tokens": len(served.models.get().checkpoint.tokenizer.encode(PROMPT)),
        "cached_tokens": answer["usage"]["cached_tokens"],
        "guessed_tokens": 0,
        "accepted_tokens": 0,
        "completion_tokens": 4,
        "total_tokens": answer["usage"]["prompt_tokens"] + 4,
    }
    assert answer["parameters"].keys() == {parameter.name for parameter in PARAMETERS}
    assert answer["deterministic"] is True


def test_the_tokens_are_those_of_the_network(served) -> None:
    """The same as model.generate, which knows no server."""
    checkpoint = served.models.get().checkpoint
    prompt = checkpoint.tokenizer.encode(PROMPT)
    for settings in ({"temperature": 0}, {"seed": 5}, {"seed": 5, "top_k": 20, "temperature": 0.7}):
        (output,) = served.answer("/generate", prompt=PROMPT, max_tokens=12, **settings)["outputs"]
        expected = generate(checkpoint.model, prompt, settings | {"max_tokens": 12})
        assert output["token_ids"] == expected.token_ids


def test_log_probabilities_are_keyed_by_token_id_with_bytes_beside_text(served) -> None:
    answer = served.answer("/generate", prompt=PROMPT, max_tokens=6, logprobs=3, temperature=0)
    (output,) = answer["outputs"]
    tokenizer = served.models.get().checkpoint.tokenizer
    assert [entry["token_id"] for entry in output["logprobs"]] == output["token_ids"]
    for entry in output["logprobs"]:
        assert bytes(entry["bytes"]) == tokenizer.token_bytes(entry["token_id"])
        assert entry["rank"] == 1
        assert entry["top"][0]["token_id"] == entry["token_id"]
        assert entry["top"][0]["logprob"] == pytest.approx(entry["raw_logprob"])
        assert [each["logprob"] for each in entry["top"]] == sorted((e["logprob"] for e in entry["top"]), reverse=True)


def test_a_stream_adds_up_to_the_whole_answer(served) -> None:
    body = {"prompt": [PROMPT, "Names are"], "n": 2, "max_tokens": 20, "seed": 3}
    whole = served.answer("/generate", **body)
    *tokens, (last, done) = events(served, **body)
    assert last == "done" and {name for name, _ in tokens} == {"token"}
    assert [o["token_ids"] for o in done["outputs"]] == [o["token_ids"] for o in whole["outputs"]]
    for output in done["outputs"]:
        own = [data for _, data in tokens if data["index"] == output["index"]]
        assert {data["prompt_index"] for data in own} == {output["prompt_index"]}
        assert "".join(data["text"] for data in own) == output["text"]
        assert [token_id for data in own for token_id in data["token_ids"]] == output["token_ids"]
    assert done["parameters"] == whole["parameters"]


def test_several_prompts_and_n_keep_their_order(served) -> None:
    ids = served.models.get().checkpoint.tokenizer.encode("Names are")
    answer = served.answer("/generate", prompt=[PROMPT, ids], n=2, max_tokens=5, seed=9)
    assert [(o["index"], o["prompt_index"]) for o in answer["outputs"]] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    first, second = (served.answer("/generate", prompt=p, n=2, max_tokens=5, seed=9)["outputs"] for p in (PROMPT, ids))
    assert [o["token_ids"] for o in answer["outputs"]] == [o["token_ids"] for o in (*first, *second)]
    assert first[0]["token_ids"] != first[1]["token_ids"]


def test_messages_go_through_the_checkpoints_own_template(served) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
    chat = served.models.get().checkpoint
    prompt = chat.chat.encode(messages, chat.tokenizer).token_ids
    by_messages = served.answer("/generate", messages=messages, max_tokens=8, seed=1)
    by_ids = served.answer("/generate", prompt=prompt, max_tokens=8, seed=1)
    assert by_messages["outputs"][0]["token_ids"] == by_ids["outputs"][0]["token_ids"]


def test_control_tokens_end_an_answer_without_showing_in_it(served) -> None:
    end = served.models.get().checkpoint.tokenizer.control_tokens["<|im_end|>"]
    answer = served.answer("/generate", prompt=PROMPT, logit_bias={str(end): 100}, temperature=0)
    (output,) = answer["outputs"]
    assert (output["text"], output["token_ids"]) == ("", [end])
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", end)


def test_a_stop_text_never_leaks_in_halves(served) -> None:
    free = served.answer("/generate", prompt=PROMPT, max_tokens=40, seed=2, ignore_end_token=True)["outputs"][0]
    stop = re.search(r"[ -~]{5}", free["text"][10:])[0]
    at = free["text"].index(stop)
    *tokens, (_, done) = events(served, prompt=PROMPT, max_tokens=40, seed=2, ignore_end_token=True, stop=stop)
    (output,) = done["outputs"]
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
    assert output["text"] == "".join(data["text"] for _, data in tokens) == free["text"][:at]
    assert output["token_ids"] == free["token_ids"][: len(output["token_ids"])]


def test_a_character_of_several_tokens_arrives_whole(served) -> None:
    """A bias makes the network write the four bytes of a fox, one token each, a penalty keeps it from repeating one."""
    tokenizer = served.models.get().checkpoint.tokenizer
    ids = [next(i for i in range(512) if tokenizer.token_bytes(i) == bytes([byte])) for byte in "🦊".encode()]
    bias = {str(token_id): 100 - position for position, token_id in enumerate(ids)}
    penalties = {"presence_penalty": 2, "frequency_penalty": 2}
    *tokens, _ = events(served, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias=bias, **penalties)
    assert [data["token_ids"] for _, data in tokens] == [[token_id] for token_id in ids]
    assert [data["text"] for _, data in tokens] == ["", "", "", "🦊"]


def test_line_breaks_do_not_break_the_stream(served) -> None:
    newline = next(i for i in range(512) if served.models.get().checkpoint.tokenizer.token_bytes(i) == b"\n")
    *_, (name, done) = events(served, prompt=PROMPT, max_tokens=3, logit_bias={str(newline): 100}, temperature=0)
    assert (name, done["outputs"][0]["text"]) == ("done", "\n\n\n")


def test_without_max_tokens_the_context_is_the_limit(served) -> None:
    answer = served.answer("/generate", prompt=PROMPT, ignore_end_token=True, temperature=0)
    assert answer["usage"]["total_tokens"] == 128
    assert answer["parameters"]["max_tokens"] == answer["usage"]["completion_tokens"]
    assert answer["outputs"][0]["finish_reason"] == "length"
    more = served.answer("/generate", prompt=PROMPT, ignore_end_token=True, temperature=0, max_tokens=10_000)
    assert more["parameters"]["max_tokens"] == answer["parameters"]["max_tokens"]


def test_no_tokens_may_be_asked_for(served) -> None:
    (output,) = served.answer("/generate", prompt=PROMPT, max_tokens=0)["outputs"]
    assert (output["token_ids"], output["text"], output["finish_reason"]) == ([], "", "length")


def test_what_a_request_leaves_out_comes_from_the_checkpoint_then_the_table(serve, tiny_checkpoint) -> None:
    own = {"temperature": 0.6, "top_k": 7, "do_sample": True, "max_new_tokens": 3}
    with serve(tiny_checkpoint("tuned", generation=own)) as served:
        parameters = served.answer("/generate", prompt="a")["parameters"]
        assert (parameters["temperature"], parameters["top_k"], parameters["max_tokens"]) == (0.6, 7, 3)
        assert parameters["top_p"] == 1.0
        overridden = served.answer("/generate", prompt="a", top_k=0, temperature=None)["parameters"]
        assert (overridden["temperature"], overridden["top_k"]) == (0.6, 0)
        assert served.client.get("/models").json()["models"][0]["defaults"]["top_k"] == 7


def test_a_drawn_seed_is_reported_and_repeats_the_answer(served) -> None:
    first = served.answer("/generate", prompt=PROMPT, max_tokens=10)
    again = served.answer("/generate", prompt=PROMPT, max_tokens=10, seed=first["parameters"]["seed"])
    assert again["outputs"] == first["outputs"]
    assert served.answer("/generate", prompt=PROMPT, max_tokens=10)["parameters"]["seed"] != again["parameters"]["seed"]


def test_model_chooses_the_checkpoint(served) -> None:
    answers = {name: served.answer("/generate", prompt=PROMPT, max_tokens=30, seed=1, model=name) for name in NAMES}
    assert [answer["model"] for answer in answers.values()] == list(NAMES)
    assert answers["chat"]["outputs"][0]["token_ids"] != answers["base"]["outputs"][0]["token_ids"]
    assert served.answer("/generate", prompt=PROMPT, max_tokens=1)["model"] == "chat"


def test_timings_cover_the_way_to_the_first_token_and_between_tokens(served) -> None:
    for body in ({"prompt": PROMPT}, {"prompt": [PROMPT, "Names are"], "n": 2}):
        answer = served.answer("/generate", max_tokens=90, ignore_end_token=True, seed=1, **body)
        timings = answer["timings"]
        assert all(len(output["token_ids"]) == 90 for output in answer["outputs"])
        between = timings["token_s"]
        assert 0 < timings["first_token_s"] <= timings["queue_s"] + timings["prefill_s"] + 0.5
        assert 0 < between["p50"] <= between["p95"] <= between["max"]
        assert 0 < between["mean"] <= between["max"]
        assert 89 * between["mean"] == pytest.approx(timings["decode_s"], rel=0.5)
    single = served.answer("/generate", prompt=PROMPT, max_tokens=1)["timings"]
    assert single["first_token_s"] > 0 and single["token_s"] is None
    assert served.answer("/generate", prompt=PROMPT, max_tokens=0)["timings"]["first_token_s"] is None


@pytest.mark.one_process("its engine runs one request at a time")
def test_a_request_of_higher_priority_goes_first_and_changes_no_other(serve, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr("topkapi.service.models.Engine", functools.partial(Engine, max_running=1))
    # Or the long one would be through before the others come.
    monkeypatch.setattr("topkapi.engine.steps.AHEAD_SECONDS", 0.0)
    long = {"prompt": "a", "seed": 1, "max_tokens": 600, "ignore_end_token": True}
    with serve(tiny_checkpoint("urgent", context=2048)) as served:

        async def race() -> list[str]:
            order = []
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:

                async def ask(name: str, **body: object) -> dict:
                    answer = await client.post("/generate", json=body)
                    order.append(name)
                    return answer.json()

                first = asyncio.create_task(ask("long", **long))
                while not served.models.get().engine.running:
                    await asyncio.sleep(0.01)
                later = asyncio.create_task(ask("later", prompt="b", max_tokens=200, ignore_end_token=True))
                while not served.models.get().engine.waiting:
                    await asyncio.sleep(0.01)
                await ask("urgent", prompt="c", max_tokens=2, priority=1)
                await later
                assert (await first)["outputs"] == served.answer("/generate", **long)["outputs"]
            return order

        assert asyncio.run(race()) == ["urgent", "long", "later"]
