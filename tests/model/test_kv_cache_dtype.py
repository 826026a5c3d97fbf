"""What keys and values are held in: chosen for serving, refused where it cannot be had, counted in memory, told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import tiny_model
from topkapi.engine.steps import DecoderNetwork
from topkapi.model import native
from topkapi.model.cache import SlotCache
from topkapi.model.errors import CheckpointError
from topkapi.model.serving import prepare
from topkapi.service.commands.cli import main
from topkapi.service.settings import CacheDtypeName

needs_core = pytest.mark.skipif(not native.levels(), reason="the native core was not built: there was no compiler")


@needs_core
@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [
        ("int8", "auto", "float16"),
        ("int4", "auto", "float16"),
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "float32"),
        ("int8", "float32", "float32"),
        ("float32", "int8", "int8"),
    ],
)
def test_what_is_asked_for_or_loses_nothing(dtype: str, asked: str, expected: CacheDtypeName) -> None:
    model = tiny_model("llama")
    prepare(model, dtype, asked)
    assert model.cache_dtype == expected
    config = model.config
    numbers = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    scales = config.num_layers * 2 * config.num_kv_heads * 4 if expected == "int8" else 0
    assert SlotCache.token_bytes(model) == numbers * {"float32": 4, "float16": 2, "int8": 1}[expected] + scales


@needs_core
def test_a_smaller_cache_has_more_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SlotCache.token_bytes(tiny_model("llama")) * 64
    monkeypatch.setattr("topkapi.engine.steps.memory_bytes", lambda device: 2 * 3 * one)
    slots = []
    for asked in ("float32", "float16"):
        model = tiny_model("llama")
        prepare(model, "float32", asked)
        slots.append(DecoderNetwork(model, 100, 64).slots)
    assert slots == [3, 6]


@pytest.mark.parametrize("asked", ["float16", "int8"])
def test_pytorch_refuses_what_it_cannot_do(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkapi.model.native.levels", lambda: ())
    monkeypatch.setattr("topkapi.model.native.why_not", lambda: "the native core was not built")
    with pytest.raises(CheckpointError, match=f"keys and values in {asked} need the native core, and .* not built"):
        prepare(tiny_model("llama"), cache_dtype=asked)
    for fine in ("auto", "float32"):
        model = tiny_model("llama")
        prepare(model, cache_dtype=fine)
        assert model.cache_dtype == "float32"


@needs_core
def test_every_command_that_computes_takes_it(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path, text = str(tiny_checkpoint()), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a fox.")
    assert main(["generate", "a", "-c", path, "--max-tokens", "2", "--kv-cache-dtype", "int8"]) == 0
    assert main(["score", str(text), "-c", path, "--kv-cache-dtype", "float16"]) == 0
    with pytest.raises(SystemExit):
        main(["generate", "a", "-c", path, "--kv-cache-dtype", "fp8"])


@needs_core
def test_models_says_it(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> None:
    for settings, expected in (({"dtype": "int8"}, "float16"), ({"kv_cache_dtype": "int8"}, "int8")):
        with serve(tiny_checkpoint(), **settings) as served:
            (model,) = served.client.get("/models").json()["models"]
            assert model["kv_cache_dtype"] == expected
