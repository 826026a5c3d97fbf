"""When runs save, what they keep, and that a save in another thread is of the moment at which it was asked for."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from topkapi.model.errors import CheckpointError, SettingsError
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.transformer import Decoder
from topkapi.service.commands.cli import main
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.saving import Saver, Snapshot
from topkapi.training.run.state import TrainerState

RHYME = "Jack and Jill went up the hill to fetch a pail of water. Jack fell down and broke his crown. "


@pytest.fixture
def pretrain(tmp_path: Path) -> Callable[..., Path]:
    source = tmp_path / "source.txt"
    source.write_text(RHYME * 60, encoding="utf-8")
    flags = "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --num-heads 2 --num-kv-heads 1"
    flags += " --head-dim 16 --context-length 32 --batch-size 4 --vocab-size 300 --threads 1 --max-steps 30"
    flags += " --evaluate-every 5 --learning-rate 0.01 --sample-every never"

    def run(*more: str) -> Path:
        out = tmp_path / "run"
        data = ["--data", str(source), "--cache", str(tmp_path / "cache")]
        assert main(["pretrain", *data, *flags.split(), *more, "--out", str(out)]) == 0
        return out

    return run


def test_the_best_and_the_latest_are_kept(pretrain: Callable[..., Path]) -> None:
    out = pretrain("--keep", "2", "--keep-best", "3", "--save-every", "3", "--best-metric", "train_loss")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "train_loss" in record and record["step"]]
    best = sorted(evaluations, key=lambda record: record["train_loss"])[:3]
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {f"step-{record['step']}" for record in best} | {"step-27", "step-30"}
    assert load_checkpoint(out / "best").details["step"] == best[0]["step"]


def test_ranking_takes_the_earlier_of_equals_and_never_the_untrained_model() -> None:
    state = TrainerState()
    assert not state.rank("validation_loss", 2, {"loss": 0.5})
    for step, loss, ranked in ((1, 3.0, True), (2, 2.0, True), (3, 2.0, True), (4, 2.5, False)):
        state.step = step
        assert state.rank("validation_loss", 2, {"loss": loss}) == ranked
    assert state.best_steps() == [2, 3]


def test_of_an_accuracy_the_highest_is_best_and_what_is_not_measured_is_refused() -> None:
    state = TrainerState()
    for state.step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7)):
        state.rank("validation_accuracy", 2, {"loss": 1.0, "accuracy": accuracy})
    assert state.best_steps() == [2, 3]
    with pytest.raises(SettingsError, match="does not measure copied_from_training") as caught:
        state.rank("copied_from_training", 1, {"loss": 1.0})
    assert caught.value.hint == "it measures validation_loss"


def test_saves_by_the_clock(pretrain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = iter(range(10_000))
    monkeypatch.setattr("topkapi.training.run.saving.time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    written: list[int] = []
    original = RunDirectory.save_state

    def save_state(self: RunDirectory, step: int, *arguments: Any) -> None:
        written.append(step)
        original(self, step, *arguments)

    monkeypatch.setattr(RunDirectory, "save_state", save_state)
    # The clock moves by a minute whenever a save looks at it: once at a step, once more when it has saved.
    pretrain("--save-minutes", "7")
    assert written == [7, 14, 21, 28, 30]


def test_a_thread_writes_what_was_there_when_it_was_asked(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    model = load_checkpoint(tiny_checkpoint("saved")).model.requires_grad_(True)
    begun, go_on = threading.Event(), threading.Event()
    saved: list[torch.Tensor] = []

    def save(path: Path, network: Decoder, details: Mapping[str, Any]) -> None:
        begun.set()
        assert go_on.wait(10)
        saved.append(network.embed_tokens.weight.detach().clone())

    saver = Saver(RunDirectory(tmp_path), save, every=1, minutes=None, keep=1, asynchronous=True)
    before = model.embed_tokens.weight.detach().clone()
    momentum = torch.ones(3)
    twin, tensors = saver.copied(model, {"model:embed_tokens.weight": before, "optimizer:momentum": momentum})
    saver.write(Snapshot(1, twin, {}, [], tensors, {}, {"metrics.jsonl": 0, "samples.jsonl": 0}))
    assert begun.wait(10)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
        momentum.zero_()
    go_on.set()
    saver.wait()
    assert torch.equal(saved[0], before) and not torch.equal(model.embed_tokens.weight, before)
    loaded = RunDirectory(tmp_path).load_state()
    assert loaded is not None
    assert torch.equal(loaded[0]["optimizer:momentum"], torch.ones(3))
    assert torch.equal(loaded[0]["model:embed_tokens.weight"], before)


def test_a_state_of_an_earlier_version_is_read() -> None:
    """What was called leaps are spikes, and there was one kind of best."""
    spike = {"event": "spike", "step": 7, "returned_to": 5}
    state = TrainerState.saved({"step": 9, "leaps": [spike], "best_step": 6, "best_loss": 2.5})
    assert state.spikes == [spike] and state.ranking == [[2.5, 6]] and state.best_steps() == [6]
    assert TrainerState.saved(asdict(state)) == state


def test_what_goes_wrong_in_the_thread_is_raised_and_one_save_waits_for_another(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    model = load_checkpoint(tiny_checkpoint("saved")).model
    running = most = 0

    def save(path: Path, network: Decoder, details: Mapping[str, Any]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.05)
        running -= 1
        if path.name == "step-3":
            raise CheckpointError("could not write")

    saver = Saver(RunDirectory(tmp_path), save, every=1, minutes=None, keep=1, asynchronous=True)
    for step in (1, 2, 3):
        saver.write(Snapshot(step, model, {}, [], None, {}, {}))
    with pytest.raises(CheckpointError):
        saver.write(Snapshot(4, model, {}, [], None, {}, {}))
    assert most == 1
    saver.wait()


def test_frozen_parameters_are_not_copied(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = load_checkpoint(tiny_checkpoint("saved")).model
    model.embed_tokens.weight.requires_grad_(True)
    saver = Saver(RunDirectory(tmp_path), lambda *_: None, every=1, minutes=None, keep=1, asynchronous=True)
    twin, _ = saver.copied(model, {})
    same = {name for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True) if one is two}
    assert same == {name for name, _ in model.named_parameters()} - {"embed_tokens.weight"}
