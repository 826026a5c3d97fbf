"""Whole runs: they learn, stop when they should, say what happened, and leave what the design promises."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from topkapi.model.generation import generate
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.commands.cli import main
from topkapi.training.run.state import TrainerState

TINY = ["--model", "tiny", "--hidden-size", "48", "--intermediate-size", "96", "--num-layers", "2", "--num-heads", "2"]
TINY += ["--num-kv-heads", "1", "--head-dim", "24", "--context-length", "32", "--batch-size", "8"]
TINY += ["--vocab-size", "300", "--threads", "1", "--sample-tokens", "8"]
RHYME = "Jack and Jill went up the hill to fetch a pail of water. Jack fell down and broke his crown. "


@pytest.fixture
def pretrain(tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    def run(text: str, *flags: str) -> tuple[int, Path]:
        source, out = tmp_path / "source.txt", tmp_path / "run"
        source.write_text(text, encoding="utf-8")
        cache = str(tmp_path / "cache")
        return main(["pretrain", "--data", str(source), "--out", str(out), "--cache", cache, *TINY, *flags]), out

    return run


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--precision", "bf16"], marks=pytest.mark.slow),  # without hardware for it
        ["--optimizer", "muon"],
        ["--dropout", "0.1"],
    ],
)
def test_it_learns_a_rhyme_and_leaves_what_the_design_promises(
    flags: list[str], pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--max-steps", "60", "--evaluate-every", "20", "--learning-rate", "0.01", "--sample-temperature", "0"]
    code, out = pretrain(RHYME * 60, *few, *flags)
    printed = capsys.readouterr().out
    assert code == 0
    names = {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "timings.jsonl",
        "system.jsonl",
        "report.md",
        "best",
        "last",
        "plots",
    }
    assert names | {"checkpoints", "report.html", "state", "tokenizer"} == {path.name for path in out.iterdir()}
    assert (out / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    serve = f"topkapi serve {out / 'best'}"
    assert serve in printed and serve in (out / "report.md").read_text()

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 20, 40, 60]
    assert len(records) == 60 + 2 * 4
    assert evaluations[0]["validation_loss"] > 5 and evaluations[-1]["validation_loss"] < 0.5

    checkpoint = load_checkpoint(out / "best")
    tokenizer, details = checkpoint.tokenizer, checkpoint.details
    result = generate(checkpoint.model, tokenizer.encode("Jack and Jill went"), {"temperature": 0, "max_tokens": 10})
    assert tokenizer.decode(result.token_ids).startswith(" up the hill")
    assert details["validation_loss"] == evaluations[-1]["validation_loss"]
    assert details["tokens_seen"] == 60 * 8 * 32
    assert details["recipe"]["batch_size"] == 8 and "source.txt" in details["data"]["sources"]


def test_overfitting_is_named_and_patience_ends_the_run_with_the_best_kept(
    pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str], english: str
) -> None:
    flags = ["--epochs", "500", "--evaluate-every", "10", "--learning-rate", "0.01", "--schedule", "constant"]
    code, out = pretrain(english[:4000], *flags, "--patience", "4", "--batch-size", "4", "--sample-every", "never")
    printed = capsys.readouterr().out
    assert code == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "validation_loss" in record]
    best = min(evaluations[1:], key=lambda record: record["validation_loss"])
    assert evaluations[-1]["step"] == best["step"] + 4 * 10
    assert f"best validation {best['validation_loss']:.3f} at step {best['step']}; overfitting since" in printed
    assert "no better validation loss in 4 evaluations" in printed
    assert load_checkpoint(out / "best").details["step"] == best["step"]
    assert load_checkpoint(out / "last").details["step"] == evaluations[-1]["step"]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(
        {f"step-{best['step']}", f"step-{evaluations[-1]['step']}"}
    )


def test_overfitting_needs_a_falling_training_loss() -> None:
    state = TrainerState(step=10)
    assert state.note(3.0, 3.0)
    for step, train, validation in ((20, 3.1, 3.1), (30, 3.2, 3.2), (40, 3.3, 3.3)):
        state.step = step
        assert not state.note(train, validation)
    assert not state.overfitting and state.verdict() == "best validation 3.000 at step 10"
    state.step = 50
    state.note(2.5, 3.4)
    assert state.verdict() == ("best validation 3.000 at step 10; overfitting since (validation 3.400, training 2.500)")


def test_a_loss_that_is_no_number_ends_the_run_naming_the_step(
    pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--max-steps",
        "20",
        "--evaluate-every",
        "20",
        "--learning-rate",
        "1e30",
        "--warmup",
        "0",
        "--clip",
        "none",
    ]
    code, out = pretrain(RHYME * 60, *flags)
    error = capsys.readouterr().err
    assert code == 2
    assert "error: step 2: the loss became" in error and "lower --learning-rate" in error
    assert not (out / "checkpoints").exists()


def test_the_default_recipe_suits_a_small_text(
    tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("manual.txt").write_text(english[:30_000], encoding="utf-8")
    assert (
        main(["pretrain", "--data", "manual.txt", "--model", "tiny", "--max-steps", "1", "--sample-tokens", "2"]) == 0
    )
    checkpoint = load_checkpoint("runs/manual/best")
    # The vocabulary shrinks until the text fills it.
    assert checkpoint.config.family == "qwen3" and 256 < checkpoint.config.vocab_size <= 1024
    assert "runs/manual/report.md" in capsys.readouterr().out


def test_a_short_run_prints_a_line_per_evaluation_and_the_last_samples(
    pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = pretrain(RHYME * 60, "--max-steps", "6")
    assert code == 0
    printed = capsys.readouterr().out.splitlines()
    evaluations = [at for at, line in enumerate(printed) if line.startswith("step ")]
    assert len(evaluations) == 7 and evaluations == list(range(evaluations[0], evaluations[0] + 7))
    assert printed[evaluations[-1] + 1].startswith("  sample: ")
    assert len((out / "samples.jsonl").read_text().splitlines()) == 7


def test_control_characters_of_samples_reach_neither_the_terminal_nor_the_reports(
    pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = pretrain(RHYME * 60, "--max-steps", "2", "--sample-prompts", "a\x1b[31m\x07b\nc")
    assert code == 0
    for shown in (capsys.readouterr().out, *((out / name).read_text() for name in ("report.md", "report.html"))):
        assert r"a\x1b[31m\x07b" in shown
        assert not set(map(chr, (*range(9), *range(11, 32), *range(127, 160)))) & set(shown)
    assert json.loads((out / "samples.jsonl").read_text().splitlines()[0])["prompt"] == "a\x1b[31m\x07b\nc"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_verdict_overfits_as_in_the_book(tmp_path: Path, data_directory: Path) -> None:
    """Two of the ten epochs of the book's run: by step 20 its losses are 5.7 (training) and 6.6 (validation)."""
    out = tmp_path / "run"
    text = str(data_directory / "small" / "the-verdict.txt")
    assert main(["pretrain", "the-verdict", "--data", text, "--out", str(out), "--max-steps", "20"]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = {record["step"]: record for record in records if "validation_loss" in record}
    assert evaluations[0]["train_loss"] == pytest.approx(10.99, abs=0.1)
    assert evaluations[20]["train_loss"] < 6.3 and evaluations[20]["validation_loss"] < 6.9


@pytest.fixture(autouse=True)
def threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
