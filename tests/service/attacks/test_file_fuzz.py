"""Damaged files of checkpoints, made at random by their formats' own terms, loaded over HTTP and used.

Whatever they hold: no answer of the server is an error of its own, none takes for ever, and it goes on serving.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings

from tests.driver import serving
from tests.mutations import damaged
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.storage.gguf_export import export_gguf

LONGEST_ANSWER = 60.0
"""Seconds for one answer; a tokenizer's trial alone may take 20."""

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USES = (
    ("/generate", {"prompt": "Hello", "max_tokens": 3}),
    ("/generate", {"prompt": "Hello", "max_tokens": 3, "temperature": 0, "stream": True}),
    ("/generate", {"messages": MESSAGES, "max_tokens": 3, "trace": True}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "tools": [TOOL], "logprobs": True}),
    ("/score", {"text": "Hello"}),
    ("/tokenize", {"text": "Hello <|im_end|>"}),
    ("/v1/embeddings", {"input": "Hello"}),
)
NAMES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "topkapi.json",
    "special_tokens_map.json",
    "model.safetensors",
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A model directory with a good checkpoint, as a directory and as a GGUF file."""
    room = tmp_path_factory.mktemp("room")
    shutil.copytree(tiny_checkpoint("good", generation={"temperature": 0.5, "top_k": 5}), room / "good")
    export_gguf(load_checkpoint(room / "good"), room / "good.gguf", "f32")
    return room


@pytest.fixture(scope="module")
def files(room: Path) -> dict[str, bytes]:
    """What is damaged, by name."""
    read = {name: (room / "good" / name) for name in NAMES}
    return {name: path.read_bytes() if path.exists() else b"{}" for name, path in read.items()} | {
        "good.gguf": (room / "good.gguf").read_bytes()
    }


def damage(room: Path, name: str, content: bytes) -> str:
    """Write a checkpoint with that file in it; where it lies in the model directory."""
    if name.endswith(".gguf"):
        (room / "bad.gguf").write_bytes(content)
        return "bad.gguf"
    shutil.rmtree(room / "bad", ignore_errors=True)
    shutil.copytree(room / "good", room / "bad")
    if name != "topkapi.json":  # its digests would tell
        (room / "bad" / "topkapi.json").unlink()
    (room / "bad" / name).write_bytes(content)
    return "bad"


def refuse_constant(name: str) -> None:
    """`NaN` and its like are no JSON, whatever Python reads."""
    pytest.fail(f"{name} in an answer is no JSON")


def load_and_use(client: httpx.Client, path: str) -> bool:
    """Load what lies at `path`, ask everything of it, and unload it again. Returns whether it could be loaded."""

    def expect(response: httpx.Response) -> httpx.Response:
        assert response.status_code < 500, f"{response.request.url}: {response.status_code} {response.text[:2000]}"
        return response

    loaded = expect(client.post("/models", json={"path": path, "name": "bad"}))
    if loaded.status_code != 201:
        told = loaded.json()["error"]
        assert loaded.status_code == 422 and told["message"], loaded.text
        assert len(loaded.text) < 5000, loaded.text
        return False
    for route, body in USES:
        answer = expect(client.post(route, json={"model": "bad"} | body))
        if body.get("stream"):
            assert "internal" not in answer.text, answer.text
        else:
            json.loads(answer.text, parse_constant=refuse_constant)
    expect(client.get("/models"))
    assert expect(client.delete("/models/bad")).status_code == 204
    return True


def attack(client: httpx.Client, room: Path, files: dict[str, bytes], examples: int, *, same: bool) -> None:
    """Load so many damaged files, with `same` always the same ones."""

    @settings(
        max_examples=examples,
        derandomize=same,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if same else [Phase.generate, Phase.shrink],
    )
    @given(damaged(files))
    def run(file: tuple[str, bytes]) -> None:
        note(f"{file[0]}: {file[1][:5000]!r}")
        load_and_use(client, damage(room, *file))
        assert client.get("/health").status_code == 200

    run()


def test_a_few_damaged_files_are_loaded_or_refused(serve: Callable, room: Path, files: dict[str, bytes]) -> None:
    with serve(room / "good", model_directory=room) as served:
        served.client.timeout = httpx.Timeout(LONGEST_ANSWER)
        attack(served.client, room, files, 20, same=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_files_are_loaded_or_refused(room: Path, files: dict[str, bytes]) -> None:
    arguments = (room / "good", "--model-directory", room, "--no-studio")
    with serving(*arguments, timeout=LONGEST_ANSWER) as client:
        attack(client, room, files, 1500, same=False)
