"""What remains of runs: reports, lists, comparisons, and the pick of the best checkpoint."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from topkapi.service.commands.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    """A folder with two finished runs, `slow` and `fast`, which kept three checkpoints each."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(english[:30_000], encoding="utf-8")
    (folder / "other.txt").write_text(english[100_000:104_000], encoding="utf-8")
    flags = "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --context-length 32 --keep 3"
    flags += " --batch-size 4 --threads 1 --max-steps 12 --evaluate-every 4 --sample-tokens 4 --schedule constant"
    data = ["--data", str(folder / "text.txt"), "--cache", str(folder / "cache"), "--sample-prompts", "<b>if</b>"]
    for name, rate in (("slow", "0.0001"), ("fast", "0.01")):
        out = ["--out", str(folder / name), "--learning-rate", rate]
        assert main(["pretrain", *data, *flags.split(), *out]) == 0
    return folder


def test_runs_are_listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    heading, fast, slow = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", heading) == [
        "name", "steps", "tokens", "best validation", "at step", "tokens/s", "state"
    ]  # fmt: skip
    assert re.fullmatch(r"fast +12 +1,536 +\d\.\d{3} +12 +[\d,]+ +finished", fast)
    assert slow.startswith("slow")


def test_runs_are_compared_and_drawn(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "both.png"
    assert main(["runs", "--compare", str(runs / "slow"), str(runs / "fast"), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"learning_rate +0\.0001 +0\.01\n", printed)
    assert "batch_size" not in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_pick_names_the_best_checkpoint_and_points_at_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "fast"
    (run / "best").unlink()
    (run / "best").symlink_to("checkpoints/step-4")
    command = ["pick", str(run), "--data", str(runs / "other.txt"), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["losses"]) == ["12", "4", "8"]
    assert found["losses"]["4"] > found["losses"]["8"] > found["losses"]["12"] and found["best"] == 12
    assert (run / "best").readlink() == Path("checkpoints/step-4")
    assert main([*command[:-1], "--set"]) == 0
    assert (run / "best").resolve() == (run / "checkpoints" / "step-12").resolve()
    assert "step-12       loss" in capsys.readouterr().out


def test_pick_measures_a_fine_tune_by_its_answers(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"Say {n}.", "answer": "yes " * n} for n in range(1, 20)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    out = tmp_path / "run"
    flags = (
        "--batch-size 4 --max-steps 6 --evaluate-every 3 --threads 1 --sample-tokens 2 --keep 2 --learning-rate 0.01"
    )
    command = ["finetune", "--checkpoint", str(tiny_checkpoint("start")), "--data", str(data), "--out", str(out)]
    assert main([*command, "--validation-data", str(data), *flags.split()]) == 0
    capsys.readouterr()
    # Without --data it is the run's own validation data, and so its own validation losses.
    assert main(["pick", str(out), "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    recorded = {str(record["step"]): record["validation_loss"] for record in records if "validation_loss" in record}
    assert losses == pytest.approx({step: recorded[step] for step in ("3", "6")}, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "{}/nothing"], "there are no training runs in"),
        (["runs", "--compare", "{}/nothing"], "there is no training run in"),
        (["runs", "{}", "--plot", "x.png"], "--plot draws what --compare compares"),
        (["pick", "{}/nothing"], "there is no training run in"),
        (["pick", "{}/slow"], "no held-out data"),
        (["pick", "{}/slow", "--data", "{}/missing.txt"], "missing.txt"),
        (["pick", "{}/slow", "--data", "{}/text.txt", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("{}", str(runs)) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_report_says_all_of_a_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "fast"
    text, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    for report in (text, page):
        for part in ("12 steps, 1,536 tokens", "Best validation", "sha256", "text.txt", "threads", "tokens/s"):
            assert part in report
        assert f"topkapi serve {run / 'best'}" in report
        assert f"topkapi pretrain {run}/config.yaml --out {run}-again" in report
    assert page.count('src="data:image/png;base64,') == 2 and "http" not in page.replace("https://", "http://")[:200]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;b&gt;if&lt;/b&gt;" in page and "<b>if" not in page
    for step in (0, 4, 8, 12):
        assert f"Step {step}" in text and f"Step {step}" in page


def test_the_command_in_the_report_repeats_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^topkapi (pretrain .*)$", (runs / "slow" / "report.md").read_text(), re.M)
    assert main(command.split()) == 0
    again = runs / "slow-again"
    assert (again / "metrics.jsonl").read_bytes() == (runs / "slow" / "metrics.jsonl").read_bytes()
    weights = [(path / "best" / "model.safetensors").read_bytes() for path in (runs / "slow", again)]
    assert weights[0] == weights[1]
