"""What `--dtype auto` takes follows measurements, loses nothing, and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from topkapi.model import native, serving, speed
from topkapi.model.errors import CheckpointError
from topkapi.service.loading import load
from topkapi.service.models import Models
from topkapi.service.settings import Settings


@pytest.fixture
def pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function: there is no core, and bfloat16 takes so many times as long as float32."""

    def measured(longer: float) -> None:
        monkeypatch.setattr(native, "levels", lambda: ())
        monkeypatch.setattr(native, "can_hold", lambda model: False)
        for module in (serving, speed):
            monkeypatch.setattr(module, "pytorch_bfloat16", lambda: longer)

    return measured


def test_auto_is_as_stored_where_that_is_not_slow(pytorch_alone: Callable[[float], None]) -> None:
    pytorch_alone(0.8)
    assert serving.stored_dtype("auto") is None
    assert serving.stored_dtype("bfloat16") == torch.bfloat16


def test_auto_is_float32_where_bfloat16_is_slower(
    pytorch_alone: Callable[[float], None], tiny_checkpoint: Callable[..., Path]
) -> None:
    pytorch_alone(4.4)
    assert serving.stored_dtype("auto") == torch.float32
    with pytest.raises(CheckpointError, match="bfloat16 takes 4.4 times as long as float32 on this machine"):
        serving.stored_dtype("bfloat16")
    assert serving.stored_dtype("float32") == torch.float32
    models = Models(Settings.read())
    try:
        loaded = models.load(str(tiny_checkpoint("stored")))
        assert loaded.dtype == "float32"
        assert loaded.why == "exact, and PyTorch takes 4.4 times as long with bfloat16 on this machine"
    finally:
        models.close()


@pytest.mark.skipif(not native.levels(), reason="needs the native core")
@pytest.mark.parametrize(("ratio", "told"), [(2.1, True), (1.05, False)])
def test_a_faster_precision_is_named_but_not_taken(
    ratio: float, told: bool, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "native_speed_up", lambda held, other: ratio)
    models = Models(Settings.read())
    try:
        loaded = models.load(str(tiny_checkpoint("stored")))
        assert loaded.dtype in ("float32", "bfloat16")
        assert loaded.why.startswith("as stored, without loss")
        assert ("--dtype int8 would be about 2.1 times as fast on this machine" in loaded.why) == told
    finally:
        models.close()


def test_what_was_asked_for_needs_no_measurement(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("native_speed_up", "pytorch_bfloat16"):
        monkeypatch.setattr(speed, name, lambda *_: pytest.fail("it was measured"))
    models = Models(Settings.read(dtype="float32"))
    try:
        assert models.load(str(tiny_checkpoint("stored"))).why == "as asked for"
    finally:
        models.close()


def test_the_measurements_measure() -> None:
    assert speed.pytorch_bfloat16() > 0
    if native.levels():
        assert speed.native_speed_up("float32", "int8") > 0


def test_start_up_says_once_what_was_taken_and_why(
    served, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = Models(Settings.read())
    try:
        load(models, [str(tiny_checkpoint("first")), str(tiny_checkpoint("second"))])
        told = capsys.readouterr().out.splitlines()
        held, why = models.get().dtype, models.get().why
        assert sum(line == f"  {held}: {why}" for line in told) == 1
    finally:
        models.close()
    details = served.client.get("/models").json()["models"][0]
    props = served.client.get("/props").json()
    assert details["dtype_why"] == props["dtype_why"] != "" and details["dtype"] == props["dtype"]
