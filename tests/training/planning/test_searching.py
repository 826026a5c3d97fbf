"""Learning rates found by trying, and settings searched by runs that are ranked."""

import json
import math
import sys
from pathlib import Path

import pytest

from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import main
from topkapi.training.optimisation.optimisers import Rising
from topkapi.training.planning.finding_lr import Point, judged
from topkapi.training.planning.sweeping import Range
from topkapi.training.recipes.recipe import PretrainRecipe

TINY = (
    "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --context-length 32 --batch-size 4 --threads 1"
)


@pytest.fixture
def given(tmp_path: Path, english: str) -> list[str]:
    (tmp_path / "text.txt").write_text(english[:20_000], encoding="utf-8")
    return ["--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache"), *TINY.split()]


def test_the_rate_rises_by_the_same_factor() -> None:
    rates = [Rising("constant", 5, low=1e-4).factor(step) for step in range(5)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_a_rate_is_found_where_the_loss_falls_fastest() -> None:
    """A loss that falls most around 1e-3, is lowest at 1e-2 and rises from there."""
    rates = [10 ** (-6 + at / 10) for at in range(51)]
    losses = [
        5 - 2 / (1 + math.exp(-4 * (math.log10(rate) + 3))) + 2 * max(0, math.log10(rate) + 1.9) ** 2 for rate in rates
    ]
    found = judged([Point(rate, loss, loss) for rate, loss in zip(rates, losses, strict=True)])
    assert 6e-4 < found.steepest < 2e-3
    assert 6e-3 < found.lowest < 4e-2 and found.rises is not None and found.lowest < found.rises < 1e-1
    with pytest.raises(SettingsError, match="the loss fell at none"):
        judged([Point(rate, 1 + rate, 1 + rate) for rate in rates])


def test_find_lr_tries_real_steps_and_keeps_nothing(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--lowest", "1e-4", "--highest", "30", "--steps", "60", "--plot", str(tmp_path / "lr.png")]
    assert main(["find-lr", *given, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1e-3 < found["steepest"] < found["lowest"] < 30
    rates = [point["learning_rate"] for point in found["points"]]
    assert rates[0] == pytest.approx(1e-4) and len(rates) < 60, "it ends where the loss rises"
    assert rates[1] / rates[0] == pytest.approx((30 / 1e-4) ** (1 / 59))
    assert not (tmp_path / "runs").exists() and (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    for more, message in ((["--learning-rate", "1"], "--learning-rate is what is tried"),
                          (["--lowest", "2", "--highest", "1"], "--lowest must be above 0 and below"),
                          (["--steps", "3"], "--steps must be at least 10")):  # fmt: skip
        assert main(["find-lr", *given, *more]) == 2
        assert message in capsys.readouterr().err


def test_ranges_are_read_as_the_field_is() -> None:
    rate = Range.of("learning-rate=1e-4..1e-2", PretrainRecipe)
    assert (rate.name, rate.low, rate.high, rate.whole) == ("learning_rate", 1e-4, 1e-2, False)
    assert Range.of("num_layers=2..4", PretrainRecipe).whole
    assert Range.of("batch_size=8,16", PretrainRecipe).choices == (8, 16)
    assert Range.of("learning_rate=1e-3,2e-3", PretrainRecipe).choices == (1e-3, 2e-3)
    assert Range.of("optimizer=adamw,muon", PretrainRecipe).choices == ("adamw", "muon")
    for entry, message in (
        ("rate=1..2", "varies no field"),
        ("learning_rate", "varies no field"),
        ("keep=1..2", "keep does not change"),
        ("learning_rate=2..1", "must be two numbers"),
        ("learning_rate=a..b", "must be two numbers"),
    ):
        with pytest.raises(SettingsError, match=message):
            Range.of(entry, PretrainRecipe)


def test_without_optuna_a_sweep_says_what_to_install(
    given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", *given, "--vary", "learning_rate=1e-4..1e-2", "--out", str(tmp_path / "s")]) == 2
    assert "pip install 'topkapi[sweep]'" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_a_sweep_ranks_its_runs_and_goes_on_where_it_was(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    out = tmp_path / "sweep"
    flags = [*given, "--max-steps", "6", "--evaluate-every", "3", "--sample-every", "never", "--out", str(out)]
    vary = ["--vary", "learning_rate=1e-5..1e-1", "weight_decay=0.1,0.2"]
    assert main(["sweep", *flags, *vary, "--trials", "2"]) == 0
    first = (out / "trial-0" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["sweep", *flags, *vary, "--trials", "3", "--json"]) == 0
    said = capsys.readouterr().out
    ranking = json.loads(said[said.rindex("\n[") :])
    assert said.count("trial ") == 1 and "trial 2:" in said, "two were there"
    assert (out / "trial-0" / "metrics.jsonl").read_bytes() == first
    losses = [each["validation_loss"] for each in ranking]
    assert losses == sorted(losses) and len(ranking) == 3
    best = [json.loads(line) for line in (Path(ranking[0]["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == min(each["validation_loss"] for each in best if each.get("validation_loss") and each["step"])
    assert (out / "sweep.md").read_text().count("\n| ") == 5
    # The search is a function of the seed: another sweep tries the same first settings.
    assert main(["sweep", *flags[:-1], str(tmp_path / "again"), *vary, "--trials", "1"]) == 0
    for name, message in (
        (vary[:2], "holds another sweep"),
        ([*vary, "--learning-rate", "1"], "--learning-rate is varied"),
    ):
        capsys.readouterr()
        assert main(["sweep", *flags, *name]) == 2
        assert message in capsys.readouterr().err
    configs = [
        (folder / "trial-0" / "config.yaml").read_text().split("learning_rate: ")[1].split()[0]
        for folder in (out, tmp_path / "again")
    ]
    assert configs[0] == configs[1]
    tried = {each["learning_rate"] for each in ranking}
    assert len(tried) == 3, "a sweep that goes on tries new settings"
