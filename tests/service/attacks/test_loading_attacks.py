"""A real server that lets requests load checkpoints, and everything that a stranger may put into its directory."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.driver import serving
from tests.model.conversation.test_template_bounds import ENDLESS
from tests.model.storage.test_untrusted_checkpoints import DAMAGED, OUTSIDE, edit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LONGEST_WAIT = 0.5
IN_ACCESS, IN_OPEN = 0x1, 0x20


@contextmanager
def untouched(directory: Path) -> Iterator[None]:
    """Fails where any file of the directory is opened or read within the block, by whatever process."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(directory), IN_ACCESS | IN_OPEN) >= 0
    try:
        yield
        with pytest.raises(BlockingIOError):
            os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


class Pulse:
    """Asks `/health` all the time and keeps the longest wait."""

    def __init__(self, url: str) -> None:
        self.longest = 0.0
        self._url, self._over = url, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _beat(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._over.wait(0.02):
                began = time.monotonic()
                assert client.get("/health").status_code == 200
                self.longest = max(self.longest, time.monotonic() - began)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """`room` with one good checkpoint, and `outside`, which is none of the server's business."""
    place = tmp_path_factory.mktemp("place")
    (place / "room").mkdir()
    for copy in ("room/good", "outside"):
        shutil.copytree(tiny_checkpoint("good"), place / copy)
        (place / copy / "topkapi.json").unlink()
    return place


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[httpx.Client]:
    room = place / "room"
    with serving(room / "good", "--model-directory", room, "--no-studio") as client:
        yield client


def test_nothing_freezes_and_nothing_outside_is_read(client: httpx.Client, place: Path) -> None:
    room = place / "room"
    templates = {
        f"template: {name}": edit("tokenizer_config.json", chat_template=source) for name, source in ENDLESS.items()
    }
    changes = OUTSIDE | DAMAGED | templates
    waits: dict[str, float] = {}
    with untouched(place / "outside"):
        for number, (name, change) in enumerate(changes.items()):
            bad = room / f"bad-{number}"
            shutil.copytree(room / "good", bad)
            change(bad)
            with Pulse(str(client.base_url)) as pulse:
                refused = client.post("/models", json={"path": bad.name})
            waits[name] = pulse.longest
            assert 400 <= refused.status_code < 500 and refused.status_code != 409, (name, refused.text)
            told = refused.json()["error"]
            assert told["message"] and str(place) not in json.dumps(told), (name, told)
            shutil.rmtree(bad)
    assert client.get("/models").json()["loading"] is None
    loaded = client.post("/models", json={"path": "good", "name": "again"})
    assert loaded.status_code == 201, loaded.text
    answer = client.post("/generate", json={"model": "again", "prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert {name: wait for name, wait in waits.items() if wait > LONGEST_WAIT} == {}


def test_a_template_that_is_slow_for_some_messages_freezes_nobody(client: httpx.Client, place: Path) -> None:
    slow = place / "room" / "slow"
    shutil.copytree(place / "room" / "good", slow)
    source = (
        "{% if messages|length > 3 %}{% for a in range(100000) %}{% for b in range(100000) %}{{ loop.index }}"
        "{% endfor %}{% endfor %}{% endif %}{{ messages[-1].content }}"
    )
    edit("tokenizer_config.json", chat_template=source)(slow)
    loaded = client.post("/models", json={"path": "slow"})
    assert loaded.status_code == 201, loaded.text
    message = {"role": "user", "content": "Hello"}
    with Pulse(str(client.base_url)) as pulse:
        for count, status in ((2, 200), (4, 422), (2, 200)):
            answer = client.post("/generate", json={"model": "slow", "messages": [message] * count, "max_tokens": 1})
            assert answer.status_code == status, answer.text
    assert pulse.longest < LONGEST_WAIT
