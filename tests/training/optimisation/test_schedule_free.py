"""The schedule-free optimiser: what is measured, sampled and served is the average of the weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.commands.cli import main
from topkapi.training.data.windows import Batch, WindowLoader
from topkapi.training.optimisation.loss import backward, evaluate
from topkapi.training.optimisation.optimisers import Optimizers


def optimizers(model: torch.nn.Module) -> Optimizers:
    return Optimizers(
        model, name="schedule-free", learning_rate=0.01, muon_learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95),
        decay="matrices",
    )  # fmt: skip


def test_the_average_is_that_of_the_paper_and_the_weights_are_as_before_after_it() -> None:
    """With beta1 b: x is the mean of the z so far (constant learning rate), and y = (1 - b) z + b x."""
    model = tiny_model(scale=1.0).requires_grad_(True)
    made = optimizers(model)
    tokens = torch.randint(0, 120, (4, 17), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for step in range(1, 6):
        backward(model, batch, divisor=batch.weight())
        made.step(1.0)
        state = made.state_tensors()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with made.averaged() as raw:
            assert raw.keys() == before.keys()
            for name, parameter in model.named_parameters():
                z = state[f"{name}/z"]
                sums[name] += z
                torch.testing.assert_close(parameter, sums[name] / step, atol=1e-6, rtol=1e-4)
                torch.testing.assert_close(before[name], 0.1 * z + 0.9 * parameter, atol=1e-6, rtol=1e-4)
                assert raw[name].equal(before[name])
        assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
    assert evaluate(model, [batch]) < math.log(120) - 0.5


def test_others_keep_no_average() -> None:
    model = tiny_model().requires_grad_(True)
    made = Optimizers(
        model, name="adamw", learning_rate=0.01, muon_learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95),
        decay="matrices",
    )  # fmt: skip
    with made.averaged() as raw:
        assert raw == {}


def test_what_is_evaluated_is_what_is_served(tmp_path: Path, english: str) -> None:
    source, out = tmp_path / "source.txt", tmp_path / "run"
    source.write_text(english[:20_000], encoding="utf-8")
    flags = "--hidden-size 32 --intermediate-size 64 --num-layers 2 --num-heads 2 --num-kv-heads 1 --head-dim 16"
    flags += " --context-length 32 --vocab-size 300 --threads 1 --batch-size 4 --sample-tokens 5 --max-steps 30"
    flags += " --evaluate-every 15 --learning-rate 0.01 --optimizer schedule-free --schedule constant --warmup 5"
    before = torch.get_num_threads()
    try:
        assert (
            main(
                [
                    "pretrain",
                    "--data",
                    str(source),
                    "--out",
                    str(out),
                    "--cache",
                    str(tmp_path / "cache"),
                    *flags.split(),
                ]
            )
            == 0
        )
    finally:
        torch.set_num_threads(before)
    checkpoint = load_checkpoint(out / "best")
    (stream,) = tmp_path.glob("cache/**/validation.bin")
    loader = WindowLoader(np.fromfile(stream, "<u2"), context=32, stride=32, batch_size=4, seed=123, validation=True)
    measured = evaluate(checkpoint.model, loader.first(8))
    assert measured == pytest.approx(checkpoint.details["validation_loss"], rel=1e-5)
    assert json.loads((out / "state" / "step-30" / "state.json").read_text())["standing"]["step"] == 30


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_it_has_no_schedule(schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pretrain", "--data", "x.txt", "--optimizer", "schedule-free", "--schedule", schedule]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"--schedule {schedule} does not go with it" in error and "add --schedule constant" in error
