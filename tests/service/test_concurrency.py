"""Many clients at once: none waits for another's stream, changes another's tokens or outlives its own connection."""

import asyncio
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.tiny import run_by
from topkapi.engine.engine import Engine

SLOW = {"model": "base", "prompt": "a", "ignore_end_token": True, "temperature": 0}
"""About two thousand tokens: longer than any test waits."""


async def stream_tokens(client: httpx.AsyncClient, log: list, name: str, **body) -> dict:
    """Stream one answer, logging (name, time) for each token; the final event's data."""
    data: dict = {}
    async with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("event: token"):
                log.append((name, time.monotonic()))
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
    return data


def test_streams_take_turns(served) -> None:
    log: list[tuple[str, float]] = []

    async def both() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            body = {"model": "base", "prompt": "a", "max_tokens": 60, "ignore_end_token": True}
            await asyncio.gather(*(stream_tokens(client, log, name, **body) for name in "ab"))

    asyncio.run(both())
    order = "".join(name for name, _ in log)
    assert len(order) >= 120  # a held-back part of a character may come at the end
    middle = order[20:-20]
    assert 0.3 < middle.count("a") / len(middle) < 0.7, order


def test_the_event_loop_answers_while_the_engine_works(served, monkeypatch) -> None:
    """A long text is being tokenised and scored and a long answer written: /health still answers at once."""
    network = served.models.get("base").engine.network
    run_by(monkeypatch, network, network.run)
    text = "Some words of a long text. " * 20_000

    async def busy() -> float:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            work = [
                asyncio.create_task(client.post("/score", json={"text": text, "model": "base"})),
                asyncio.create_task(client.post("/generate", json=SLOW)),
            ]
            while not any(model.engine.running for model in served.models):
                await asyncio.sleep(0.01)
            slowest = 0.0
            for _ in range(20):
                began = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                slowest = max(slowest, time.monotonic() - began)
                await asyncio.sleep(0.02)
            assert not any(task.done() for task in work)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            return slowest

    assert asyncio.run(busy()) < 0.5
    served.wait_until_idle()


def test_sixteen_neighbours_change_nothing(served) -> None:
    """Same request, same seed, same tokens and log-probabilities: alone and in company of every kind."""
    body = {"prompt": "The value of the expression", "max_tokens": 24, "seed": 11, "top_k": 50, "logprobs": 2}
    alone = served.answer("/generate", **body)["outputs"]

    async def crowd() -> list[dict]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            others = [
                client.post("/generate", json={"prompt": "x" * (n + 1), "max_tokens": 40, "seed": n, "n": 1 + n % 3})
                for n in range(12)
            ]
            others += [client.post("/score", json={"text": f"Text {n} " * 20}) for n in range(4)]
            own = [client.post("/generate", json=body) for _ in range(3)]
            mixed = [*others[:8], own[0], *others[8:12], own[1], *others[12:], own[2]]
            answers = await asyncio.gather(*mixed)
            assert all(answer.status_code == 200 for answer in answers)
            return [answers[index].json() for index in (8, 13, 18)]

    for answer in asyncio.run(crowd()):
        assert answer["outputs"] == alone and answer["deterministic"] is True


@pytest.fixture(scope="module")
def hasty(serve, tiny_checkpoint) -> Iterator:
    """A server that keeps no stream for a client that may come back."""
    with serve(tiny_checkpoint("base", chat=False, context=2048), stream_grace=0) as running:
        yield running


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(hasty, stream) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=hasty.url, timeout=60) as client:
            work = stream_tokens(client, [], "a", **SLOW) if stream else client.post("/generate", json=SLOW)
            request = asyncio.ensure_future(work)
            async with asyncio.timeout(30):
                while hasty.models.get("base").engine.running != 1:
                    await asyncio.sleep(0.01)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    hasty.wait_until_idle()
    asyncio.run(leave())
    hasty.wait_until_idle(5.0)


def test_a_waiting_client_that_leaves_is_forgotten(serve, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr("topkapi.service.models.Engine", functools.partial(Engine, max_running=1))
    with serve(tiny_checkpoint("base", context=2048), stream_grace=0) as served:

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
                first = asyncio.create_task(stream_tokens(client, [], "a", **SLOW))
                async with asyncio.timeout(30):
                    while served.models.get().engine.running != 1:
                        await asyncio.sleep(0.01)
                second = asyncio.create_task(stream_tokens(client, [], "b", **SLOW))
                async with asyncio.timeout(30):
                    while served.models.get().engine.waiting != 1:
                        await asyncio.sleep(0.01)
                for request in (second, first):
                    request.cancel()
                await asyncio.gather(first, second, return_exceptions=True)

        asyncio.run(leave())
        served.wait_until_idle(5.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_streams_as_cancelled_and_the_process_cleanly(tiny_checkpoint, number) -> None:
    command = [
        sys.executable,
        "-m",
        "topkapi.service.commands.cli",
        "serve",
        tiny_checkpoint("base", context=131072),
        "--port",
        "0",
        "--drain-seconds",
        "0",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TOPKAPI_STUDIO": "false"}
    )
    assert process.stdout is not None
    said = ""
    while not (ready := re.search(r"http://\S+:\d+", said)):
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        said += line
    assert "base: chat checkpoint, qwen3, 35.0K parameters (float32), context 131072, vocabulary 512" in said
    with httpx.stream("POST", f"{ready[0]}/generate", json={**SLOW, "stream": True}, timeout=30) as response:
        lines = response.iter_lines()
        for _ in range(30):
            next(lines)
        began = time.monotonic()
        process.send_signal(number)
        *_, last = [line for line in lines if line.startswith("data: ")]
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert json.loads(last.removeprefix("data: "))["outputs"][0]["finish_reason"] == "cancelled"
    assert process.returncode == 0
    assert "Traceback" not in errors
