"""A stream that waits says by comments that it is there; no client minds, and none comes where there is no need."""

import functools
import json
import time
from collections.abc import Callable, Iterator

import openai
import pytest
from anthropic import Anthropic
from text_generation import Client

from tests.service.api.openai.openai_cases import USER
from tests.tiny import run_by
from topkapi.service.api.http.middleware import COMMENT

BODIES = {
    "/generate": {"prompt": "Once"},
    "/v1/chat/completions": {"messages": USER},
    "/completion": {"prompt": "Once"},
    "/score": {"text": "Once upon a time"},
}
SILENCE = 0.7


@pytest.fixture(scope="module")
def lively(serve: Callable, tiny_checkpoint: Callable) -> Iterator:
    """A server whose streams are silent for a tenth of a second at most."""
    with serve(tiny_checkpoint("chat"), stream_keep_alive=0.1) as running:
        yield running


@pytest.fixture
def slow(lively, monkeypatch) -> None:
    """Every request's first step takes a while."""
    engine = lively.models.get().engine
    run = engine.network.run
    waited = False

    @functools.wraps(run)
    def step(*arguments: object, **options: object) -> object:
        nonlocal waited
        if not waited:
            waited = True
            time.sleep(SILENCE)
        return run(*arguments, **options)

    run_by(monkeypatch, engine.network, step)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.one_process("slows the network down")
def test_a_waiting_stream_sends_comments_between_whole_events(lively, slow, path) -> None:
    with lively.client.stream("POST", path, json={**BODIES[path], "stream": True}) as response:
        raw = b"".join(response.iter_bytes())
    parts = raw.split(b"\n\n")
    assert parts[-1] == b"" and parts.count(COMMENT.strip()) >= 3
    for part in parts[:-1]:
        if part != COMMENT.strip():
            (data,) = [line for line in part.splitlines() if line.startswith(b"data: ")]
            assert data == b"data: [DONE]" or json.loads(data.removeprefix(b"data: "))


@pytest.mark.one_process("slows the network down")
def test_the_clients_skip_them(lively, slow) -> None:
    with openai.OpenAI(base_url=f"{lively.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="chat", messages=USER, stream=True, max_tokens=3, seed=1)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")


@pytest.mark.one_process("slows the network down")
def test_the_stricter_clients_skip_them(lively, slow) -> None:
    assert list(Client(lively.url).generate_stream("Once", max_new_tokens=3))[-1].generated_text is not None


@pytest.mark.one_process("slows the network down")
def test_anthropics_client_skips_them(lively, slow) -> None:
    asked = {"model": "chat", "messages": USER, "max_tokens": 3}
    with Anthropic(base_url=lively.url, api_key="none") as client, client.messages.stream(**asked) as stream:
        assert stream.get_final_message().usage.output_tokens


@pytest.mark.one_process("slows the network down")
def test_what_does_not_wait_that_long_gets_none(served, lively, slow) -> None:
    answer = served.client.post("/generate", json={"prompt": "Once", "max_tokens": 30, "stream": True})
    assert COMMENT not in answer.content
    assert lively.answer("/generate", prompt="Once", max_tokens=3)["outputs"], "what is no stream stays JSON"
