"""What takes a checkpoint takes a model of the hub by its name, and fetches it; here from a hub on this machine."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.hub import Hub, connect, running_hub
from topkapi.model.config import ModelConfig
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.storage.gguf_export import export_gguf
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder, initialise
from topkapi.service.commands.cli import main
from topkapi.service.commands.launch import bind

NAME = "somebody/large"
PIECE = 10 << 20
"""Bytes that the library reads before it writes them."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, and a clean cache, for this process and for those that it starts."""
    with running_hub() as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        yield hub


@pytest.fixture
def large(hub: Hub, tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A checkpoint of 28 MB, which the hub has as somebody/large."""
    config = ModelConfig(
        family="qwen3", vocab_size=tiny_tokenizer.vocab_size, hidden_size=768, intermediate_size=2048, num_layers=1,
        num_heads=12, num_kv_heads=4, head_dim=64, context_length=64,
    )  # fmt: skip
    model = Decoder(config)
    initialise(model, torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "large", model=model, tokenizer=tiny_tokenizer, chat=None, generation={}, details={})
    hub.add(NAME, tmp_path / "large")
    return tmp_path / "large"


@contextmanager
def serving(*names: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`topkapi serve` in a process of its own."""
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "topkapi.service.commands.cli",
        "serve",
        *names,
        "--port",
        str(port),
        "--no-studio",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def wait_for(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end and process.poll() is None, process.communicate(timeout=5)[0]
        time.sleep(0.02)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_serve_fetches_a_directory_and_a_gguf_file_and_goes_on_after_a_kill(
    hub: Hub, large: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, serve: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    export_gguf(load_checkpoint(tiny_checkpoint("small"), dtype=torch.float32), tmp_path / "small-Q8_0.gguf", "q8_0")
    hub.add("somebody/small-GGUF", tmp_path / "small-Q8_0.gguf")
    hub.stall_after = 2 * PIECE + 1000

    def come() -> int:
        return sum(
            file.stat().st_size for file in (tmp_path / "cache").glob("models--somebody--large/blobs/*.incomplete")
        )

    with serving(NAME) as (process, _):
        wait_for(lambda: come() >= PIECE, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = come()
    hub.go_on.set()
    with serving(NAME, "somebody/small-GGUF:q8_0") as (process, client):
        wait_for(lambda: is_ready(client), process)
        for model in (NAME, "large", "small-Q8_0", "somebody/small-GGUF"):
            answer = client.post("/generate", json={"model": model, "prompt": "Hello", "max_tokens": 3})
            assert answer.status_code == 200, answer.text
    files = [(file, ranges) for file, ranges in hub.fetched if file == "model.safetensors"]
    assert files == [("model.safetensors", None), ("model.safetensors", f"bytes={kept}-")] and kept >= PIECE

    # Without the hub, what is here serves.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    from topkapi.service.locations import all_at_hand
    from topkapi.service.settings import Settings

    (place,), _ = all_at_hand([NAME], Settings.read())
    with serve(Path(place)) as served:
        assert served.answer("/generate", model=NAME, prompt="Hello", max_tokens=3)["model"] == "large"
    assert len(hub.asked) == before


@pytest.mark.parametrize(
    "command",
    [
        "generate hello --max-tokens 2 -c NAME",
        "generate hello --max-tokens 2 -c OTHER --draft NAME",
        "score text.txt -c NAME",
        "bench NAME --streams 1 --tokens 8 --prompt-tokens 8 --repeats 1",
        "evaluate NAME --perplexity text.txt",
        "export gguf NAME out.gguf",
        "finetune --checkpoint NAME --data rows.json --max-steps 1 --batch-size 2 --threads 1 --out run",
    ],
)
def test_commands_take_names(
    command: str, hub: Hub, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Some words, and some more words, to be scored.\n")
    Path("rows.json").write_text(json.dumps([{"instruction": "Greet.", "output": "Hi!"}] * 4))
    hub.add("somebody/model", tiny_checkpoint("known"))
    other = str(tiny_checkpoint("other", seed=3))
    threads = torch.get_num_threads()
    words = [word.replace("NAME", "somebody/model").replace("OTHER", other) for word in command.split()]
    code = main(words)
    torch.set_num_threads(threads)
    assert code == 0, capsys.readouterr().err
    assert [file for file, _ in hub.fetched] == ["model.safetensors"]


def test_a_name_that_is_neither_says_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nowhere", "./no/where", "runs/mine"):
        assert main(["serve", name, "--port", "0"]) == 2
        said = capsys.readouterr().err
        assert "there is no checkpoint at" in said
        assert "a checkpoint directory or a .gguf file" in said and "owner/name" in said


def test_requests_may_load_from_the_hub_where_the_server_lets_them(
    hub: Hub, tiny_checkpoint: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    hub.add("somebody/model", tiny_checkpoint("known"))
    first = tiny_checkpoint("first")
    with serve(first) as served:
        response = served.post("/models", path="somebody/model")
        assert response.status_code == 403 and "TOPKAPI_HUB_MODELS" in response.text and not hub.asked
    with serve(first, model_directory=first.parent) as served:
        assert served.post("/models", path="somebody/model").status_code == 422 and not hub.asked
    with serve(first, hub_models=True) as served:
        loaded = served.post("/models", path="somebody/model", aliases=["it"])
        assert loaded.status_code == 201, loaded.text
        assert (loaded.json()["name"], loaded.json()["aliases"]) == ("model", ["it", "somebody/model"])
        assert served.answer("/generate", model="somebody/model", prompt="Hello", max_tokens=2)["model"] == "model"
        response = served.post("/models", path=str(first))
        assert response.status_code == 403, "paths are another matter"
        response = served.post("/models", path="somebody/nothing")
        assert response.status_code == 422 and "has no model somebody/nothing" in response.text
        assert str(tmp_path) not in response.text
        assert served.client.delete("/models/model").status_code == 204
