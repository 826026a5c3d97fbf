"""A loss that spikes or is no number: named with what caused it, and left out where that is wished."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import topkapi.training.optimisation.loss
from topkapi.service.commands.cli import main
from topkapi.training.monitoring.divergence import observe
from topkapi.training.run.state import TrainerState

RHYME = "Jack and Jill went up the hill to fetch a pail of water. Jack fell down and broke his crown. "
NOISE = "".join(chr(33 + (index * index * 7 + index) % 90) for index in range(90))
Pretrain = Callable[..., tuple[int, Path]]


@pytest.fixture
def pretrain(tmp_path: Path) -> Pretrain:
    """Train on 120 rhymes, one of which is noise, as document 61."""
    texts = [RHYME * 3] * 60 + [NOISE] + [RHYME * 3] * 60
    source = tmp_path / "rhymes.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(RHYME * 20, encoding="utf-8")
    flags = "--model tiny --hidden-size 48 --intermediate-size 96 --num-layers 2 --num-heads 2 --num-kv-heads 1"
    flags += " --head-dim 24 --context-length 64 --batch-size 4 --vocab-size 300 --threads 1 --max-steps 52 --seed 89"
    flags += " --evaluate-every 26 --save-every 10 --learning-rate 0.01 --sample-every never"
    data = ["--data", str(source), "--validation-data", str(held_out), "--cache", str(tmp_path / "cache")]

    def run(*more: str, out: str = "run") -> tuple[int, Path]:
        return main(["pretrain", *data, *flags.split(), *more, "--out", str(tmp_path / out)]), tmp_path / out

    return run


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_spike_is_named_with_its_step_batch_and_document(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = pretrain()
    assert code == 0
    (spike,) = [record for record in records(out) if "event" in record]
    assert spike["event"] == "spike" and spike["loss"] > 1.25 * spike["level"]
    assert re.search(r"\b61\b", spike["rows"][0]["origin"])
    assert spike["rows"][0]["loss"] > 1 > spike["rows"][-1]["loss"]
    printed = capsys.readouterr().out
    assert f"step {spike['step']}: the loss spiked to {spike['loss']:.3f}" in printed
    assert f"on batch {spike['batch']}" in printed
    assert spike["rows"][0]["text"][:10] in printed
    # Its loss stands among the others, too: the run went on with it.
    steps = [record["step"] for record in records(out) if "loss" in record and "event" not in record]
    assert steps == list(range(1, 53))


def test_on_return_the_run_goes_back_and_leaves_the_batch_out(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = pretrain("--on-divergence", "return")
    assert code == 0
    spikes = [record for record in records(out) if "event" in record]
    assert spikes, "the noise must be met"
    printed = capsys.readouterr().out
    for spike in spikes:
        assert spike["returned_to"] == (spike["step"] - 1) // 10 * 10
        assert f"returned to step {spike['returned_to']}; batch {spike['batch']} is left out from now on" in printed
    updates = [record for record in records(out) if "loss" in record and "event" not in record]
    assert [record["step"] for record in updates] == list(range(1, 53))
    assert all(record["loss"] < spike["loss"] for record in updates[25:] for spike in spikes)
    state = json.loads(next((out / "state").glob("*/state.json")).read_text())
    assert state["standing"]["skipped"] == [spike["batch"] for spike in spikes]


def test_a_gradient_that_is_no_number_is_left_out_as_well(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = topkapi.training.optimisation.loss.backward, 0

    def broken_once(*arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        loss = original(*arguments, **options)
        return float("nan") if calls == 15 else loss

    monkeypatch.setattr(topkapi.training.optimisation.loss, "backward", broken_once)
    code, out = pretrain("--on-divergence", "return", "--max-steps", "20")
    assert code == 0
    (spike,) = [record for record in records(out) if "event" in record]
    assert (spike["event"], spike["step"], spike["batch"], spike["returned_to"]) == ("not a number", 15, 14, 10)
    assert spike["loss"] is None
    assert "step 15: the loss became no number on batch 14" in capsys.readouterr().out


def test_when_every_batch_diverges_the_run_ends(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = topkapi.training.optimisation.loss.backward, 0

    def broken(*arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        return original(*arguments, **options) if calls <= 12 else float("inf")

    monkeypatch.setattr(topkapi.training.optimisation.loss, "backward", broken)
    code, out = pretrain("--on-divergence", "return", "--max-steps", "20")
    assert code == 2
    error = capsys.readouterr().err
    assert "after 3 returns to step 10" in error and "lower --learning-rate" in error
    assert len([record for record in records(out) if "event" in record]) == 3

    calls = 100
    code, out = pretrain("--on-divergence", "return", "--max-steps", "20", out="other")
    assert code == 2 and "nothing was saved before it" in capsys.readouterr().err


def test_a_loss_that_rises_slowly_is_named_once_and_stands_in_the_report(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No step spikes, and none is no number: all that tells is that the model was better before it was trained."""
    calls = 0

    def rising(*arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        return 5.0 + 0.2 * calls

    monkeypatch.setattr(topkapi.training.optimisation.loss, "backward", rising)
    code, out = pretrain()
    assert code == 0
    assert not [record for record in records(out) if "event" in record]
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "diverging" in line]
    found = re.fullmatch(
        r"warning: step (\d+): diverging: the smoothed loss has risen to ([\d.]+), from ([\d.]+) "
        "before the first step; lower --learning-rate or lengthen --warmup",
        line,
    )
    assert found and int(found[1]) >= 20 and float(found[2]) > 1.25 * float(found[3]) > 5
    assert f"Diverging: at step {found[1]} the smoothed loss stood far above" in (out / "report.md").read_text()
    # Nothing was learned, for there were no gradients.
    assert f"no better than before the first step ({found[3][:3]}" in printed


def test_a_loss_that_rises_at_first_and_then_falls_is_no_divergence() -> None:
    state = TrainerState()
    state.note(5.7, 5.7)
    losses = [5.7 + rise for rise in (0.5, 1.0, 1.2, 1.0, 0.5)] + [5.5] * 40
    for state.step, loss in enumerate(losses):
        assert observe(state, loss) == []
    # Where losses are small, chance alone may double them.
    small = TrainerState()
    small.note(0.02, 0.02)
    assert all(observe(small, loss) == [] for loss in [0.02, 0.1] * 30)


def test_returning_needs_saves_at_fixed_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "text.txt"
    source.write_text(RHYME * 60)
    flags = ["--model", "tiny", "--context-length", "16", "--vocab-size", "300", "--cache", str(tmp_path / "cache")]
    out = ["--out", str(tmp_path / "run"), "--on-divergence", "return", "--save-minutes", "5"]
    assert main(["pretrain", "--data", str(source), *flags, *out]) == 2
    assert "hint: give --save-every, too" in capsys.readouterr().err


class Killed(BaseException):
    """Ends a run as abruptly as a test can without ending its own process."""


@pytest.mark.parametrize("how", ["killed", pytest.param("asked to stop", marks=pytest.mark.slow)])
def test_a_run_that_returned_resumes_to_the_same_bytes(
    how: str, pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--on-divergence", "return"]
    _, whole = pretrain(*flags, out="whole")
    (spike, *_) = [record for record in records(whole) if "event" in record]
    original = topkapi.training.optimisation.loss.backward
    # First before the spike, where a run that is asked to stop saves out of turn; then after it has returned.
    for flag, steps in (([], spike["step"] - 2), (["--resume"], 8)):
        left = iter(range(steps, -1, -1))

        def ending(*arguments: Any, left: Iterator[int] = left, **options: Any) -> float:
            if next(left) == 0:
                if how == "killed":
                    raise Killed
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        monkeypatch.setattr(topkapi.training.optimisation.loss, "backward", ending)
        try:
            code, _ = pretrain(*flags, *flag, out="ended")
            assert code == 2 and how == "asked to stop"
        except Killed:
            assert how == "killed"
    monkeypatch.setattr(topkapi.training.optimisation.loss, "backward", original)
    code, out = pretrain(*flags, "--resume", out="ended")
    assert code == 0
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("tensors.safetensors", "state.json"):
        assert (out / "state" / "step-52" / name).read_bytes() == (whole / "state" / "step-52" / name).read_bytes()
