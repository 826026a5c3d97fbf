"""What remains of runs: reports, lists, comparisons, and the pick of the best checkpoint."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from topkapi.service.commands.cli import main
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.hub import _course
from topkapi.training.run.plots import draw_comparison, draw_losses, draw_machine, smoothed, steps_down
from topkapi.training.run.report import MARKDOWN, PAGE, render, report_facts
from topkapi.training.run.state import TrainerState


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
        (["runs", "{}", "--by", "tokens"], "--by draws what --compare compares"),
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
    assert page.count('src="data:image/png;base64,') == 3 and "http" not in page.replace("https://", "http://")[:200]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;b&gt;if&lt;/b&gt;" in page and "<b>if" not in page
    for step in (0, 4, 8, 12):
        assert f"Step {step}" in text and f"Step {step}" in page


def test_the_tables_of_evaluations_have_the_columns_of_all_of_them(tmp_path: Path) -> None:
    """A number that is null, or that only the first or only the last evaluation has, is blank where it is missing."""
    run = RunDirectory(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    for measured in ({"train_loss": 3.0, "null_at_first": None, "only_at_first": 0.25},
                     {"train_loss": 2.0, "null_at_first": 0.5, "only_later": 4}):  # fmt: skip
        step = len(run.records("metrics.jsonl"))
        run.append("metrics.jsonl", {"step": step, "epoch": step / 2, "tokens": 9 * step, **measured})
    facts = report_facts(run, TrainerState()) | {"plots": {}}
    lines = render(MARKDOWN, facts).partition("## Evaluation\n\n")[2].split("\n\n## ")[0].splitlines()
    assert [re.sub(r"  +", "", line) for line in lines] == [
        "| step | train loss | null at first | only at first | only later |",
        "|---:|---:|---:|---:|---:|",
        "| 0 | 3.000 || 0.250 ||",
        "| 1 | 2.000 | 0.500 || 4.000 |",
    ]
    rows = re.findall(r"<tr>(.*?)</tr>", render(PAGE, facts).partition("<h2>Evaluation</h2>")[2].split("</table>")[0])
    assert [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows] == [
        ["step", "train loss", "null at first", "only at first", "only later"],
        ["0", "3.000", "", "0.250", ""],
        ["1", "2.000", "0.500", "", "4.000"],
    ]
    # The card of what is pushed on the way has a table, too.
    assert [line.strip("| ") for line in _course(tmp_path).splitlines() if line.startswith("| ")] == [
        "step | epoch | tokens | train loss | null at first | only at first | only later",
        "---: | ---: | ---: | ---: | ---: | ---: | ---:",
        "0 | 0 | 0 | 3 |  | 0.25",
        "1 | 0.5 | 9 | 2 | 0.5 |  | 4",
    ]


def test_the_command_in_the_report_repeats_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^topkapi (pretrain .*)$", (runs / "slow" / "report.md").read_text(), re.M)
    assert main(command.split()) == 0
    again = runs / "slow-again"
    assert (again / "metrics.jsonl").read_bytes() == (runs / "slow" / "metrics.jsonl").read_bytes()
    weights = [(path / "best" / "model.safetensors").read_bytes() for path in (runs / "slow", again)]
    assert weights[0] == weights[1]


def test_pick_warns_of_data_that_were_trained_on(
    runs: Path, tmp_path: Path, english: str, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("".join(f"{number}, " for number in range(2000, 4000)))
    for name, said in (("text.txt", "runs of 32 tokens also occur in the run's training data"), ("", "")):
        data = runs / name if name else tmp_path / "other.txt"
        assert main(["pick", str(runs / "fast"), "--data", str(data)]) == 0
        warned = capsys.readouterr().err
        assert said in warned and bool(said) == bool(warned), warned
    rows = [{"question": f"Say {n}.", "answer": "yes " * n} for n in range(1, 12)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "held-out.json").write_text(json.dumps([*rows[:2], {"question": "Other?", "answer": "No."}]))
    out = tmp_path / "tuned"
    flags = ["--batch-size", "4", "--max-steps", "2", "--threads", "1", "--sample-every", "never"]
    given = ["--checkpoint", str(tiny_checkpoint("start")), "--data", str(tmp_path / "data.json"), "--out", str(out)]
    assert main(["finetune", *given, *flags]) == 0
    capsys.readouterr()
    assert main(["pick", str(out), "--data", str(tmp_path / "held-out.json")]) == 0
    assert "2 of 3 prompts also occur in the run's training data" in capsys.readouterr().err
    (tmp_path / "data.json").unlink()
    assert main(["pick", str(out), "--data", str(tmp_path / "held-out.json")]) == 0
    assert "are not there any more" in capsys.readouterr().err


def test_runs_are_compared_by_tokens_and_epochs(runs: Path, tmp_path: Path) -> None:
    records = {
        name: [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("fast", "slow")
    }
    for by, field in (("steps", "step"), ("epochs", "epoch"), ("tokens", "tokens")):
        (axes,) = draw_comparison(records, by).axes
        drawn = axes.get_lines()[0].get_xdata()
        assert list(drawn) == [record[field] for record in records["fast"] if "validation_loss" in record]


def course(down: float, noise: float = 0.02, epochs: int = 3, per_epoch: int = 100) -> list[dict]:
    """A run whose loss falls slowly, and by `down` at the end of every epoch."""
    chance = random.Random(0)
    steps = range(1, epochs * per_epoch + 1)
    updates = [
        {"step": step, "learning_rate": 1.0,
         "loss": 3 - 0.001 * step - down * ((step - 1) // per_epoch) + chance.gauss(0, noise)}
        for step in steps
    ]  # fmt: skip
    return [
        *updates,
        {"step": steps[-1], "epoch": float(epochs), "tokens": 9 * steps[-1], "train_loss": 2.0, "validation_loss": 3.0},
    ]


def test_a_step_down_at_the_end_of_an_epoch_is_memorisation_with_its_size() -> None:
    found = steps_down(course(0.2))
    assert [(each.epoch, each.step) for each in found] == [(1, 100), (2, 200)]
    assert all(each.size == pytest.approx(0.2, abs=0.03) for each in found)
    assert (
        found[0]
        .sentence()
        .startswith("memorising: at the end of epoch 1 (step 100) the training loss stepped down by 0.")
    )
    for quiet in (course(0), course(0.01, noise=0.2), course(0.2, per_epoch=4), course(-0.2), []):
        assert steps_down(quiet) == []
    # Where the loss falls fast on its own, nothing is left of it beyond the trend.
    falling = [record | {"loss": 5 * 0.99 ** record["step"]} if "loss" in record else record for record in course(0)]
    assert steps_down(falling) == []


def test_the_plot_has_epochs_smoothed_losses_perplexity_and_further_scales() -> None:
    records = course(0.2)
    figure = draw_losses(records, TrainerState(step=300, tokens=2700))
    axes = figure.axes[0]
    labels = [line.get_label() for line in axes.get_lines()]
    for label in (
        "each step's batch",
        "smoothed",
        "training",
        "validation",
        "end of an epoch",
        "memorising: a step down",
    ):
        assert label in labels
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_color() == "tab:green"] == [100, 200]
    figure.draw_without_rendering()
    scales = {each.get_xlabel() or each.get_ylabel(): each for each in axes.child_axes}
    assert set(scales) == {"perplexity", "tokens seen", "epochs"}
    low, high = axes.get_xlim()
    assert scales["epochs"].get_xlim() == pytest.approx((low / 100, high / 100))
    assert scales["tokens seen"].get_xlim() == pytest.approx((9 * low, 9 * high))
    assert [text.get_text() for text in scales["perplexity"].get_yticklabels()] == ["10", "20"]
    raw = [record["loss"] for record in records if "loss" in record]
    assert smoothed([1.0, 1.0]) == pytest.approx([1.0, 1.0]) and min(raw) < smoothed(raw)[-1] < max(raw)


def test_the_use_of_processor_and_gpus_is_drawn() -> None:
    gpus = [{"name": "A", "use_percent": 90}, {"name": "B", "use_percent": None}]
    system = [{"time": 60.0 * at, "cpu_percent": 50.0, "gpus": gpus} for at in range(3)]
    timings = [{"step": 3, "tokens_per_s": 100.0}, {"step": 6, "tokens_per_s": 120.0, "model_flops_utilisation": 0.4}]
    upper, lower, right = draw_machine(system, timings).axes
    assert [line.get_label() for line in upper.get_lines()] == ["all processors", "GPU 0", "GPU 1"]
    assert list(upper.get_lines()[1].get_xdata()) == [0, 1, 2] and list(lower.get_lines()[0].get_ydata()) == [100, 120]
    assert list(right.get_lines()[0].get_ydata()) == [40]
    draw_machine([], [])
