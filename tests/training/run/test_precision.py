"""`--precision auto` follows a measurement, says so, and is settled for good when a run begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from topkapi.model.storage.checkpoint import weights_digest
from topkapi.service.commands.cli import main
from topkapi.training.run import precision

SMALL = ["--model", "tiny", "--num-layers", "1", "--hidden-size", "32", "--num-heads", "2", "--num-kv-heads", "1",
         "--intermediate-size", "32", "--context-length", "16", "--batch-size", "4", "--vocab-size", "300",
         "--threads", "1", "--sample-every", "never", "--cache", "cache"]  # fmt: skip

Measured = Callable[[float | None], None]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, english: str) -> Measured:
    """A function that sets how many times as fast bf16 is, None: measuring it fails the test."""
    (tmp_path / "text.txt").write_text(english[:20_000])
    monkeypatch.chdir(tmp_path)

    def set_to(ratio: float | None) -> None:
        def speed_up(device: torch.device) -> float:
            assert ratio is not None, "nothing is to be measured"
            return ratio

        monkeypatch.setattr(precision, "speed_up", speed_up)

    return set_to


def pretrain(*flags: str, steps: int = 4) -> None:
    given = ["pretrain", "--data", "text.txt", *SMALL, "--max-steps", str(steps), *flags]
    assert main(given) == 0


def kept(run: str) -> str:
    return str(yaml.safe_load((Path(run) / "config.yaml").read_text())["precision"])


def test_the_faster_is_taken_and_said(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    measured(2.5)
    pretrain("--precision", "auto", "--out", "fast")
    assert "precision bf16: products in bf16 take 0.4 times as long as in fp32" in capsys.readouterr().out
    measured(0.1)
    pretrain("--precision", "auto", "--out", "slow")
    assert "precision fp32: products in bf16 take 10 times as long as in fp32" in capsys.readouterr().out
    assert (kept("fast"), kept("slow")) == ("bf16", "fp32")
    assert precision.choice(1.0) == "fp32", "which loses nothing"


def test_slow_bfloat16_is_honoured_and_warned_of(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    measured(1 / 9.8)
    pretrain("--precision", "bf16", "--out", "asked")
    assert "warning: bf16 takes 9.8 times as long as fp32 on this machine" in capsys.readouterr().out
    assert kept("asked") == "bf16"
    measured(1.9)
    pretrain("--precision", "bf16", "--out", "quick")
    assert "times as long" not in capsys.readouterr().out


def test_float32_is_not_measured(measured: Measured) -> None:
    measured(None)
    pretrain("--precision", "fp32", "--out", "plain")
    pretrain("--out", "unsaid")


def test_a_resumed_run_keeps_its_precision_bit_for_bit_whatever_is_measured(measured: Measured) -> None:
    measured(3.0)
    pretrain("--precision", "auto", "--out", "whole", "--schedule", "constant", "--warmup", "0")
    pretrain("--precision", "auto", "--out", "parts", "--schedule", "constant", "--warmup", "0", steps=2)
    measured(None)
    pretrain("--precision", "auto", "--out", "parts", "--schedule", "constant", "--warmup", "0", "--resume", "parts")
    assert kept("parts") == "bf16"
    assert weights_digest(Path("whole") / "last") == weights_digest(Path("parts") / "last")


def test_a_plan_says_which_it_would_be(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    measured(0.5)
    assert main(["plan", "--data", "text.txt", *SMALL, "--max-steps", "2", "--precision", "auto"]) == 0
    assert "precision fp32" in capsys.readouterr().out


def test_the_measurement_measures() -> None:
    assert precision.speed_up(torch.device("cpu")) > 0
