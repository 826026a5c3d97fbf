"""A plan without data is the arithmetic that courses teach, and that makers published."""

import argparse
import json
from pathlib import Path

import pytest

from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import main
from topkapi.training.optimisation.throughput import GPU_TFLOPS
from topkapi.training.planning.estimating import PUBLISHED, WATTS, amount, estimate


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkapi.training.optimisation.throughput.peak_flops", lambda device, dtype: 1e12)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main(["plan", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_llama_2_7b_is_its_published_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    """Touvron et al. 2023, table 2: 184,320 hours of A100 of 400 W; 8 of them at $30 an hour."""
    assert main(["plan", "--published", "llama-2-7b", "--gpus", "8", "--price-per-hour", "30"]) == 0
    said = capsys.readouterr().out
    assert "184,320 A100 hours (MFU 39%)" in said and "691,200 at 30 an hour of 8" in said and "73,728 kWh" in said
    assert "2 trillion tokens: 297 for each" in said and "8.09e+22 FLOPs" in said
    assert "this work best trains 26 billion parameters on 519 billion tokens" in said
    # At Llama 3's 40 % of an H100's 989 TFLOPS: 8.09e22 / (0.4 * 989e12) / 3600.
    assert "56,775 H100 hours (MFU 40%)" in said
    found = planned(capsys, "--published", "llama-2-7b", "--gpus", "8", "--price-per-hour", "30")
    as_it_was, today, here = found["courses"]
    assert as_it_was["cost"] == 691_200 and as_it_was["hours"] == 23_040
    assert today["cost"] == pytest.approx(56_775 / 8 * 30, abs=2)
    assert here["hours"] == pytest.approx(found["flops"] / 0.4e12 / 3600)


def test_the_same_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--parameters", "6.738B", "--tokens", "2T", "--gpu", "A100", "--gpus", "8", "--price-per-hour", "30"]
    own, *_ = planned(capsys, *given, "--mfu", "0.39")["courses"]
    assert own["gpu_hours"] == pytest.approx(6 * 6.738e9 * 2e12 / (0.39 * 312e12) / 3600)
    assert own["cost"] == pytest.approx(own["gpu_hours"] / 8 * 30) and own["name"] == "at 39%"
    took, *_ = planned(capsys, *given, "--gpu-hours", "184,320")["courses"]
    assert took["cost"] == 691_200 and took["mfu"] == pytest.approx(0.39, abs=0.002)


def test_every_published_run_reached_a_part_of_its_gpus() -> None:
    for name, run in PUBLISHED.items():
        part = 6 * run.parameters * run.tokens / (run.gpu_hours * 3600 * GPU_TFLOPS[run.gpu] * 1e12)
        # Llama 3's hours count more than the one run, and its contexts add attention.
        assert 0.1 < part < 0.6, name
    assert WATTS.keys() == GPU_TFLOPS.keys()


def test_a_run_of_ones_own_is_a_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "topkapi.json").write_text(json.dumps({"parameters": 1_000_000}))
    (tmp_path / "run" / "timings.jsonl").write_text('{"tokens_per_s": 1}\n{"step": 9, "tokens_per_s": 5000}\n')
    given = ["--parameters", "10M", "--tokens", "200M", "--measured", str(tmp_path / "run"), "--price-per-hour", "2"]
    here = planned(capsys, *given)["courses"][-1]
    assert here["name"] == "as run" and here["hours"] == pytest.approx(200e6 / 500 / 3600)
    assert here["cost"] == pytest.approx(2 * here["hours"])


@pytest.mark.parametrize(
    ("text", "value"), [("7B", 7e9), ("135m", 135e6), ("2T", 2e12), ("1,000", 1e3), ("1.5e9", 1.5e9)]
)
def test_amounts(text: str, value: float) -> None:
    assert amount(text, "tokens") == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--parameters 7B", "a plan without data needs --tokens"),
        ("--tokens 7B", "a plan without data needs --parameters"),
        ("--parameters many --tokens 2T", "--parameters must be a number such as"),
        ("--parameters 7B --tokens 0", "--tokens must be a number such as"),
        ("--parameters 7B --tokens 2T --mfu 40", "--mfu must be above 0 and at most 1"),
        ("--parameters 7B --tokens 2T --gpus 0", "--gpus must be at least 1"),
        ("--parameters 7B --tokens 2T --gpu-hours 9", "9 hours are too few"),
        ("--published llama-2-7b --tokens 2T", "--tokens does not go with --published"),
        ("--published llama-2-7b --data a.txt", "--data does not apply"),
        ("--published llama-2-7b --memory 8", "--memory does not apply"),
        ("the-verdict --published llama-2-7b", "does not apply"),
        ("--parameters 7B --tokens 2T --measured gone", "gone has no checkpoint"),
        ("--parameters 7B --tokens 2T --price-per-hour 0", "--price-per-hour must be greater than 0"),
    ],
)
def test_what_is_missing_or_contradicts_is_refused(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_in_use_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkapi.training.optimisation.throughput.peak_flops", lambda device, dtype: None)
    given = dict.fromkeys(("published", "gpu", "gpus", "gpu_hours", "mfu", "measured", "price_per_hour"))
    found = estimate(argparse.Namespace(**given, parameters="1M", tokens="1M", json=False))
    assert found.courses[-1].hours != found.courses[-1].hours
    with pytest.raises(SettingsError):
        estimate(argparse.Namespace(**given, parameters="1M", tokens=None))
