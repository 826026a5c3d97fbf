"""The same request gives the same bits over HTTP, alone and among 32 others at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny import skip_without_int8

REQUESTS = 200
STRATEGIES: list[dict[str, Any]] = [
    {}, {"temperature": 0}, {"temperature": 0.6, "top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05, "temperature": 1.4},
    {"repetition_penalty": 1.3}, {"presence_penalty": 0.7, "frequency_penalty": 0.3}, {"typical_p": 0.7},
    {"xtc_probability": 0.5, "xtc_threshold": 0.02}, {"dry_multiplier": 0.8}, {"mirostat": 2}, {"top_n_sigma": 1.5},
    {"dynamic_temperature_range": 0.4}, {"no_repeat_ngram_size": 2}, {"n": 3}, {"stop": ["e"]},
    {"regex": "[a-z ]{4,12}"}, {"logit_bias": {"5": 4.0}}, {"epsilon_cutoff": 0.002}, {"top_a": 0.2},
    {"num_beams": 3, "n": 2}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "n": 4},
    {"penalty_alpha": 0.6, "top_k": 4}, {"guidance_scale": 1.8, "negative_prompt": "the old world"},
    {"dola_layers": "low", "temperature": 0.8}, {"n": 2, "best_of": 4}, {"prompt_lookup": 6, "temperature": 0.3},
]  # fmt: skip
SENTENCE = "the cat sat on a mat and then it went away to see the wide world of old books"
WORDS = SENTENCE.split()


def mixed_requests() -> list[tuple[str, dict[str, Any]]]:
    """Requests that differ in route, model, length and strategy; many begin alike."""
    choose = random.Random(7)
    shared = " ".join(choose.choices(WORDS, k=12))
    requests: list[tuple[str, dict[str, Any]]] = []
    for index in range(REQUESTS):
        text = " ".join(choose.choices(WORDS, k=choose.randint(1, 10)))
        text = f"{shared} {text}" if index % 3 == 0 else text
        model = ("chat", "base")[index % 5 == 0]
        if index % 9 == 8:
            requests.append(("/score", {"text": text, "model": model, "top": 2}))
            continue
        strategy = STRATEGIES[index % len(STRATEGIES)]
        body = {"model": model, "seed": index, "max_tokens": 1 + index % 16, "logprobs": 2} | strategy
        if model == "chat" and index % 4 == 0:
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        requests.append(("/generate", body))
        if index % 4 == 1:
            # Written by the core alone, where the strategy lets it.
            requests.append(("/generate", {name: value for name, value in body.items() if name != "logprobs"}))
    return requests


def ask(client: httpx.Client, request: tuple[str, dict[str, Any]]) -> Any:
    route, body = request
    answer = client.post(route, json=body)
    assert answer.status_code == 200, (body, answer.text)
    content = answer.json()
    if route == "/score":
        return content["results"]
    assert content["deterministic"] is True
    return content["outputs"]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ahead")
def test_two_hundred_requests_alone_and_under_load(served) -> None:
    compare(served, mixed_requests())


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ahead")
def test_the_same_in_int8(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> None:
    skip_without_int8()
    chat, base = tiny_checkpoint("chat"), tiny_checkpoint("base", chat=False, seed=1, context=2048)
    with serve(chat, base, dtype="int8") as small:
        compare(small, mixed_requests()[::2])


def compare(served: Any, requests: list[tuple[str, dict[str, Any]]]) -> None:
    """Every request gets the same answer alone and among 32 at once."""
    alone = [ask(served.client, request) for request in requests]
    shuffled = list(enumerate(requests))
    random.Random(11).shuffle(shuffled)
    limits = httpx.Limits(max_connections=32)
    with (
        httpx.Client(base_url=served.url, timeout=120, limits=limits) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        together = dict(pool.map(lambda item: (item[0], ask(client, item[1])), shuffled))
    different = [index for index in range(len(requests)) if together[index] != alone[index]]
    assert not different, [(requests[index], alone[index], together[index]) for index in different[:1]]
