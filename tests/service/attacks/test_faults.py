"""Faults of what a server stands on, injected into `topkapi serve`: what its clients see, and that it goes on.

docs/operations.md has the table. Engines that break or hang are in test_server_attacks.py, SIGTERM in test_draining.py.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.service.attacks.test_server_attacks import SOON, Process, serving, streaming

__all__ = ["serving"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ASKED = {"prompt": "a b c", "max_tokens": 12, "seed": 3, "logprobs": 2, "ignore_end_token": True}


def answer(server: Process, model: str | None = None) -> list[object]:
    """What must be the same before and after."""
    response = httpx.post(
        f"{server.url}/generate", json=ASKED | ({} if model is None else {"model": model}), timeout=60
    )
    assert response.status_code == 200, response.text
    outputs: list[object] = response.json()["outputs"]
    return outputs


def load(server: Process, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/models", json=body, timeout=120)


@pytest.fixture
def room(tmp_path, tiny_checkpoint) -> Path:
    """A model directory with one checkpoint, `served`."""
    room = tmp_path / "room"
    shutil.copytree(tiny_checkpoint("served", context=2048), room / "served")
    return room


def test_a_step_without_memory_ends_its_requests_and_nothing_else(serving) -> None:
    server = serving()
    before = answer(server)
    (server.sabotage / "memory").touch()
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, timeout=30)
    assert refused.status_code == 500 and "MemoryError" in refused.text
    assert server.ready() == 200
    (server.sabotage / "memory").unlink()
    assert answer(server) == before
    server.end(signal.SIGTERM, 5)


def test_a_killed_process_cuts_its_streams_off_and_another_takes_its_place(serving) -> None:
    server = serving()
    before = answer(server)
    body = ASKED | {"max_tokens": 2000, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        server.process.kill()
        # Cut off, and not ended as if that were all.
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    server.process.wait()
    assert server.ready() is None
    again = serving(port=server.port)
    assert answer(again) == before
    again.end(signal.SIGTERM, 5)


def test_a_full_disk_of_logs_costs_nothing_but_the_logs(serving) -> None:
    with open("/dev/full", "w") as full:
        server = serving("--access-log", stderr=full)
        before = answer(server)
        assert httpx.post(f"{server.url}/generate", json={"prompt": 7}, timeout=30).status_code == 422
        (server.sabotage / "once").touch()
        assert httpx.post(f"{server.url}/generate", json=ASKED, timeout=30).status_code == 503
        server.wait_for(lambda: server.ready() == 200, SOON)
        assert answer(server) == before
        server.end(signal.SIGTERM, 5)


def test_a_server_that_can_write_no_file_loads_and_answers(serving, room) -> None:
    (room.parent / "full").touch()
    server = serving("--model-directory", str(room), checkpoint=room / "served")
    before = answer(server)
    assert load(server, path="served", name="again").status_code == 201
    assert answer(server, "again") == before and server.ready() == 200
    server.end(signal.SIGTERM, 5)


def test_a_checkpoint_that_is_damaged_when_it_is_loaded_anew_leaves_the_old_one_serving(serving, room) -> None:
    server = serving("--model-directory", str(room), checkpoint=room / "served")
    before = answer(server)
    shutil.copytree(room / "served", room / "next")
    for name, content in (("model.safetensors", b"\0" * 100), ("config.json", b"{"), ("tokenizer.json", b"[]")):
        whole = (room / "next" / name).read_bytes()
        (room / "next" / name).write_bytes(content)
        with streaming(server, 2) as texts:
            refused = load(server, path="next", name="served", replace=True)
            assert refused.status_code == 422 and refused.json()["error"]["message"], refused.text
            assert server.ready() == 200 and answer(server) == before
        assert all("event: done" in text for text in texts)
        (room / "next" / name).write_bytes(whole)
    assert load(server, path="next", name="served", replace=True).status_code == 201
    assert answer(server) == before
    server.end(signal.SIGTERM, 5)


@pytest.mark.parametrize("native", ["", "0"], ids=["native core", "PyTorch"])
@pytest.mark.parametrize("how", ["deleted", "truncated", "overwritten"])
def test_a_checkpoint_whose_files_go_while_it_is_served_goes_on_being_served(
    serving, room, how, native, monkeypatch
) -> None:
    if native:
        monkeypatch.setenv("TOPKAPI_NATIVE", native)
    server = serving("--model-directory", str(room), checkpoint=room / "served")
    before = answer(server)
    if how == "deleted":
        shutil.rmtree(room / "served")
    for file in (room / "served").glob("*"):
        # In place: whoever has mapped the file into memory would see it, or be killed for it.
        size = file.stat().st_size
        with file.open("r+b") as opened:
            if how == "truncated":
                opened.truncate(0)
            else:
                opened.write(b"\xff" * size)
    assert answer(server) == before and server.ready() == 200
    assert load(server, path="served", name="again").status_code == 422
    assert answer(server) == before
    server.end(signal.SIGTERM, 5)


@pytest.mark.parametrize("seconds", [86_400, -86_400])
def test_a_clock_that_jumps_changes_no_wait_and_ends_nothing(serving, seconds) -> None:
    server = serving("--max-queue-seconds", "30", "--step-timeout", "10", "--idle-timeout", "5")
    before = answer(server)
    with streaming(server, 2) as texts, httpx.Client(base_url=server.url, timeout=60) as kept:
        assert kept.get("/health").status_code == 200
        (server.sabotage / "jump").write_text(str(seconds))
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert kept.get("/ready").status_code == 200
            time.sleep(0.1)
        deadline = httpx.post(f"{server.url}/generate", json=ASKED, headers={"X-Request-Timeout": "30"}, timeout=60)
        assert deadline.status_code == 200 and abs(deadline.json()["created"] - time.time() - seconds) < 60
    assert all("event: done" in text and "cancelled" not in text for text in texts)
    assert answer(server) == before
    server.end(signal.SIGTERM, 5)
