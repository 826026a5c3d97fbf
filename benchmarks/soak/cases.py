"""What the clients of a soak ask for, in every dialect, and what of an answer must be the same under every load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]

VARYING = {
    "id", "created", "created_at", "completed_at", "timings", "item_id", "cached_tokens", "cache_read_input_tokens",
    "prompt_tokens_details", "input_tokens_details", "tokens_cached", "tokens_evaluated", "e2e_latency", "timings_s",
    "prefill_tokens", "seed",
}  # fmt: skip
"""Fields that tell of the request's name, the clock or the prefix cache, and not of the answer."""

WORDS = ("the river", "a letter", "seven hats", "the capital of Japan", "an old song", "7 + 5", "a joke", "the moon")


@dataclass(frozen=True)
class Case:
    """A request, the event that ends its stream (None: it is no stream), and the text that an event adds."""

    dialect: str
    path: str
    body: Body
    ends: Callable[[str, Any], bool] | None = None
    headers: dict[str, str] = field(default_factory=dict)


def cases(model: str, count: int) -> list[Case]:
    """`count` requests for each dialect, half of them streams, all of them different and none by chance."""
    made = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        prompt = f"{number}: tell me about {word}"
        length = 12 + 7 * (number % 8)
        made += [*_openai(model, prompt, length, number), *_others(model, prompt, length, number)]
    return made


def _openai(model: str, prompt: str, length: int, seed: int) -> Iterator[Case]:
    messages = [{"role": "user", "content": prompt}]
    chat = {"model": model, "messages": messages, "max_tokens": length, "seed": seed, "temperature": 0.9}
    if seed % 2:
        chat |= {"logprobs": True, "top_logprobs": 3}
    completion = {
        "model": model,
        "prompt": prompt,
        "max_tokens": length,
        "seed": seed,
        "logprobs": 2,
        "n": 1 + seed % 2,
    }
    response = {"model": model, "input": prompt, "max_output_tokens": length, "temperature": 0}
    for path, body in (("chat/completions", chat), ("completions", completion)):
        yield Case(path, f"/v1/{path}", body)
        yield Case(path, f"/v1/{path}", body | {"stream": True}, lambda _, data: data == "[DONE]")
    yield Case("responses", "/v1/responses", response)
    completed = ("response.completed", "response.incomplete")
    yield Case("responses", "/v1/responses", response | {"stream": True}, lambda name, _: name in completed)


def _others(model: str, prompt: str, length: int, seed: int) -> Iterator[Case]:
    claude = {"model": model, "max_tokens": length, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    tgi = {
        "inputs": prompt,
        "parameters": {"max_new_tokens": length, "do_sample": True, "seed": seed + 1, "details": True},
    }
    llama = {"prompt": prompt, "n_predict": length, "seed": seed, "temperature": 0.8, "n_probs": 2}
    sglang = {
        "text": prompt,
        "sampling_params": {"max_new_tokens": length, "temperature": 0.8, "sampling_seed": seed},
        "return_logprob": True,
    }
    own = {"model": model, "prompt": prompt, "max_tokens": length, "seed": seed, "logprobs": 2}
    own |= ({"min_p": 0.05}, {"num_beams": 2, "temperature": 0}, {"regex": "[a-z ]{5,40}"}, {"n": 2})[seed % 4]
    yield Case("anthropic", "/v1/messages", claude)
    yield Case("anthropic", "/v1/messages", claude | {"stream": True}, lambda name, _: name == "message_stop")
    yield Case("tgi", "/generate", tgi)
    yield Case("tgi", "/generate_stream", tgi, lambda _, data: data.get("generated_text") is not None)
    yield Case("llama.cpp", "/completion", llama)
    yield Case("llama.cpp", "/completion", llama | {"stream": True}, lambda _, data: data.get("stop") is True)
    yield Case("sglang", "/generate", sglang)
    yield Case("sglang", "/generate", sglang | {"stream": True}, lambda _, data: data == "[DONE]")
    yield Case("own", "/generate", own)
    yield Case("own", "/generate", own | {"stream": True}, lambda name, _: name == "done")
    yield Case("own", "/score", {"model": model, "text": f"{prompt} and {prompt}"})


MALFORMED: list[tuple[str, bytes]] = [
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "temprature": 1}'),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}'),
    ("/v1/responses", b'{"input": 7}'),
    ("/v1/messages", b'{"messages": "a"}'),
    ("/generate", b'{"prompt": "a", "json_schema": {"type": "nothing"}}'),
    ("/generate", b'{"inputs": "a", "parameters": {"top_p": 7}}'),
    ("/generate", b'{"prompt": "a"'),
    ("/generate", b'\xff\xfe{"prompt": "a"}'),
    ("/completion", b'{"prompt": "a", "n_predict": "many"}'),
    ("/score", b'{"text": ["a", null]}'),
    ("/generate", b'{"prompt": "a", "regex": "(a"}'),
    ("/nothing/here", b"{}"),
]
"""Bodies that must be refused with 4xx, each by its own dialect."""


def answer_of(case: Case, body: bytes) -> Any:
    """What must be the same: the whole answer, or the joined texts and the end of a stream, without what varies."""
    if case.ends is None:
        return _steady(json.loads(body))
    events = list(events_of(body))
    joined: dict[str, str] = {}
    for _, data in events:
        # SGLang's events say the whole so far; the others what is new.
        for where, text in _texts(data):
            joined[where] = text if case.dialect == "sglang" else joined.get(where, "") + text
    name, last = next(((name, data) for name, data in reversed(events) if data != "[DONE]"), ("", None))
    return joined, name, _steady(last)


def ends(case: Case, body: bytes) -> int:
    """How often a stream says that it is at its end."""
    assert case.ends is not None
    return sum(case.ends(name, data) for name, data in events_of(body))


def failure(body: bytes) -> str | None:
    """The error that a stream ends with, if it ends with one."""
    for name, data in events_of(body):
        if name == "error" or (
            isinstance(data, dict) and (data.get("error") or data.get("type") in ("error", "response.failed"))
        ):
            return json.dumps(data)
    return None


def events_of(body: bytes) -> Iterator[tuple[str, Any]]:
    """(name, data) of each server-sent event; a last one that is cut off is left out."""
    for block in body.decode("utf-8", "replace").split("\n\n")[:-1]:
        name, data = "", ""
        for line in block.splitlines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data += line[5:].strip()
        if data:
            yield name, data if data == "[DONE]" else json.loads(data)


def _texts(data: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        index = data.get("index", "")
        for name, value in data.items():
            if name in ("text", "content", "delta") and isinstance(value, str):
                yield f"{where}/{index}/{name}", value
            elif name not in VARYING and name not in ("logprobs", "top_logprobs", "outputs", "response"):
                yield from _texts(value, f"{where}/{index}/{name}")
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value, where)


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        steady = {name: _steady(each) for name, each in value.items() if name not in VARYING}
        if "cache_read_input_tokens" in value:
            # Anthropic counts what comes from the cache apart.
            steady["input_tokens"] += value["cache_read_input_tokens"]
        return steady
    if isinstance(value, list):
        return [_steady(each) for each in value]
    return value
