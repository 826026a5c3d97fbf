"""Pretraining that goes on from a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from topkapi.model.storage.checkpoint import load_checkpoint, weights_digest
from topkapi.service.commands.cli import main

FLAGS = "--batch-size 2 --threads 1 --max-steps 4 --evaluate-every 2 --evaluation-batches 1 --sample-tokens 3"


@pytest.fixture
def pretrain(tmp_path: Path, english: str) -> Callable[..., tuple[int, Path]]:
    (tmp_path / "text.txt").write_text(english[:30_000], encoding="utf-8")

    def run(*more: object, out: str = "run") -> tuple[int, Path]:
        data = ["--data", tmp_path / "text.txt", "--cache", tmp_path / "cache", "--out", tmp_path / out]
        return main(["pretrain", *map(str, data), *FLAGS.split(), *map(str, more)]), tmp_path / out

    return run


def first_losses(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text("utf-8").partition("\n")[0])


def test_it_begins_where_the_checkpoint_ended_and_keeps_what_belongs_to_it(pretrain, tiny_checkpoint) -> None:
    parent = tiny_checkpoint("parent", context=64)
    before = load_checkpoint(parent)
    status, once = pretrain("--checkpoint", parent, "--learning-rate", "3e-3", "--context-length", 32)
    assert status == 0
    after = load_checkpoint(once / "last")
    assert after.config == before.config
    assert after.tokenizer.definition == before.tokenizer.definition
    assert after.chat is not None and before.chat is not None and after.chat.source == before.chat.source
    assert after.details["parent"] == {"name": "parent", "sha256": weights_digest(parent)}
    # On from there: what is measured before the first update is what was measured after the last one.
    status, twice = pretrain("--checkpoint", once / "last", "--context-length", 32, out="again")
    assert status == 0
    last = [
        json.loads(line) for line in (once / "metrics.jsonl").read_text("utf-8").split("\n") if "train_loss" in line
    ]
    assert first_losses(twice)["validation_loss"] == pytest.approx(last[-1]["validation_loss"], rel=1e-6)
    assert last[-1]["validation_loss"] < first_losses(once)["validation_loss"]


def test_it_resumes_and_refuses_another_parent(pretrain, tiny_checkpoint, capsys) -> None:
    parent = tiny_checkpoint("parent", context=64)
    _, run = pretrain("--checkpoint", parent)
    assert main(["pretrain", "--resume", str(run)]) == 0
    (parent / "model.safetensors").write_bytes(
        (tiny_checkpoint("other", context=64, seed=5) / "model.safetensors").read_bytes()
    )
    (parent / "topkapi.json").unlink()
    assert main(["pretrain", "--resume", str(run)]) == 2
    assert "the parent changed" in capsys.readouterr().err


def test_the_context_grows_where_positions_are_rotary(pretrain, tiny_checkpoint, capsys) -> None:
    status, run = pretrain("--checkpoint", tiny_checkpoint("parent", context=64), "--context-length", 96)
    assert (status, load_checkpoint(run / "last").config.context_length) == (0, 96)
    _, learned = pretrain("--family", "gpt2", "--model", "tiny", "--context-length", 64, out="learned")
    assert pretrain("--checkpoint", learned / "last", "--context-length", 96, out="refused")[0] == 2
    assert "has learned 64 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--hidden-size", 32], ["--family", "llama"], ["--tokenizer", "gpt2"], ["--model", "tiny"]]
)
def test_another_shape_is_refused(pretrain, tiny_checkpoint, capsys, flags) -> None:
    status, run = pretrain("--checkpoint", tiny_checkpoint("parent"), *flags)
    assert status == 2 and not run.exists()
    assert "is the checkpoint's own" in capsys.readouterr().err
