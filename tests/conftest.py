"""Shared fixtures: tiny checkpoints with random weights, and folders of data where the machine has some."""

import os
import pydoc_data.topics
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import hypothesis
import pytest
import torch
import uvicorn

from tests.served_by_replicas import REPLICAS, Ray, serve_by_replicas
from topkapi.engine import steps
from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import BUILT_IN_TEMPLATES, ChatTemplate
from topkapi.model.storage.checkpoint import save_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder, initialise
from topkapi.service.app import create_app
from topkapi.service.commands.launch import bind
from topkapi.service.models import Models
from topkapi.service.server import Server
from topkapi.service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent

# How long one example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("topkapi", deadline=None)
hypothesis.settings.load_profile("topkapi")


@pytest.fixture(autouse=True)
def the_same_seeds_every_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that name no seed get one from the test's name, so that what fails once fails always."""
    drawn = random.Random(request.node.nodeid)
    monkeypatch.setattr("topkapi.model.decoding.parameters.secrets.randbits", drawn.getrandbits)


AHEAD_SECONDS = steps.AHEAD_SECONDS


@pytest.fixture(scope="session", autouse=True)
def hardly_ahead() -> None:
    """The core goes on for one step at a time: a tiny network would be through with thousands of tokens before a test
    could do something meanwhile. (Servers in processes of their own go as far as they do for everybody.)"""
    steps.AHEAD_SECONDS = 0.0


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on for as long as it does for everybody."""
    monkeypatch.setattr(steps, "AHEAD_SECONDS", AHEAD_SECONDS)


@pytest.fixture(scope="session")
def english() -> str:
    """About half a megabyte of English text that every Python carries."""
    return "\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="session")
def tiny_tokenizer(english: str) -> Tokenizer:
    """A byte-level BPE vocabulary of 512 entries with ChatML's control tokens."""
    return Tokenizer.train([english[:50_000]], 512, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Callable[..., Path]:
    """Makes a checkpoint directory with random weights; `generation` are its decoding defaults."""

    def make(
        name: str = "tiny",
        *,
        chat: bool = True,
        seed: int = 0,
        context: int = 128,
        generation: dict[str, object] | None = None,
    ) -> Path:
        config = ModelConfig(
            family="qwen3",
            vocab_size=tiny_tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            context_length=context,
            end_token_ids=(tiny_tokenizer.control_tokens["<|endoftext|>"],),
        )
        model = Decoder(config)
        initialise(model, torch.Generator().manual_seed(seed))
        template = ChatTemplate(BUILT_IN_TEMPLATES["chatml"], "chatml") if chat else None
        directory = tmp_path_factory.mktemp("checkpoints") / name
        details = {"note": "random weights"}
        return save_checkpoint(
            directory,
            model=model,
            tokenizer=tiny_tokenizer,
            chat=template,
            generation=generation or {},
            details=details,
        )

    return make


@dataclass
class Served:
    """A running server: its address, what it has loaded, and a client."""

    url: str
    models: Models
    client: httpx.Client
    stop: Callable[[], None]
    watching: httpx.Client | None = None
    """Reads the metrics of replicas, where they have the engines."""

    def post(self, path: str, /, **body: object) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(path, json=body)

    def answer(self, path: str, /, **body: object) -> dict:
        """POST a JSON body and expect success."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Wait until no engine has anything to do; fails if that takes too long."""
        end = time.monotonic() + seconds
        while self.running or self.waiting:
            assert time.monotonic() < end, "the engine is still busy"
            time.sleep(0.01)

    @property
    def running(self) -> int:
        """Requests that are being computed."""
        return self._number("running")

    @property
    def waiting(self) -> int:
        """Requests in the queues."""
        return self._number("waiting")

    def _number(self, kind: str) -> int:
        if self.watching is None:
            return sum(getattr(model.engine, kind) for model in self.models)
        metrics = self.watching.get("/metrics")
        assert metrics.status_code == 200, metrics.text
        numbers = re.findall(rf"^topkapi_num_requests_{kind}{{.*}} (\S+)$", metrics.text, re.MULTILINE)
        assert len(numbers) == len(self.models) * int(REPLICAS or 1), metrics.text
        return int(sum(map(float, numbers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where replicas serve, what can be tried in one process alone is skipped, and says why."""
    for item in items if REPLICAS is not None else ():
        if (mark := item.get_closest_marker("one_process")) is not None:
            (why,) = mark.args
            item.add_marker(pytest.mark.skip(reason=f"in one process alone: {why}"))


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    """The Ray on which the replicas of all servers run that tests start."""
    started = Ray(tmp_path_factory.mktemp("ray") / "log")
    yield started
    started.end()


@pytest.fixture(scope="session")
def serve(ray: Ray, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """`with serve(checkpoint, …, setting=value) as served`: a server on a free port, in a thread of its own.

    With SERVED_REPLICAS it is one whose replicas have the checkpoints.
    """

    @contextmanager
    def start(*checkpoints: Path, **settings: object) -> Iterator[Served]:
        if REPLICAS is not None and checkpoints:
            log = tmp_path_factory.mktemp("served") / "log"
            with (
                serve_by_replicas(ray, log, *checkpoints, **settings) as (url, copies, watching, stop),
                httpx.Client(base_url=url, timeout=60) as client,
            ):
                yield Served(url, copies, client, stop, watching)
            return
        chosen = Settings.read(port=0, **({"studio": False} | settings))
        models = Models(chosen)
        for checkpoint in checkpoints:
            models.load(str(checkpoint))
        listener = bind("127.0.0.1", 0)
        config = uvicorn.Config(create_app(models, chosen), log_level="warning", timeout_graceful_shutdown=1)
        server = Server(config, models, listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Served(url, models, client, lambda: setattr(server, "should_exit", True))
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"

    return start


@pytest.fixture(scope="session")
def served(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator[Served]:
    """One server for many tests: `chat` (context 128, the default) and `base` (no template, context 2048)."""
    chat = tiny_checkpoint("chat", context=128)
    base = tiny_checkpoint("base", chat=False, seed=1, context=2048)
    with serve(chat, base) as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where a Chromium lies; skips where there is none before a driver starts, which needs libraries, too."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    fetched = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    found = found or next(map(str, sorted(fetched.glob("chromium-*/chrome-*/chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or playwright install chromium")
    return found


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """Where larger texts and weights lie, for the longer checks; skips where they don't."""
    directory = Path(os.environ.get("TOPKAPI_DATA", ROOT / ".." / "shared" / "data"))
    if not directory.is_dir():
        pytest.skip("needs the data folder: set TOPKAPI_DATA")
    return directory
