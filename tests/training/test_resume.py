"""A run that is killed at any instant and resumed ends with the same bytes as one that never was."""

import functools
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.driver import Run, driver
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.commands.cli import main
from topkapi.training.trainer import Training

# Each test runs the command a dozen times: half a minute on an idle machine, but not on one that is busy.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a `topkapi` command in a child that may be killed; see kill_driver.py."""
    with driver(tmp_path_factory.mktemp("driver")) as ask:
        yield ask


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "manual.txt"
    path.write_text(english[:30_000], encoding="utf-8")
    return path


# Runs that take a second: with dropout, evaluations, samples and saves at different steps.
SCHEDULE = "--dropout 0.1 --threads 1 --sample-tokens 5 --batch-size 4 --max-steps 12 --evaluate-every 4 --save-every 3"
SHAPE = "--family gpt2 --hidden-size 32 --intermediate-size 64 --num-layers 2 --num-heads 2 --context-length 32"
SHAPE += " --vocab-size 300 --micro-batch-size 2 --evaluation-batches 2"


@pytest.fixture(scope="module")
def pretraining(text_file: Path) -> list[object]:
    return ["pretrain", "--data", text_file, *SCHEDULE.split(), *SHAPE.split(), "--cache", text_file.parent / "cache"]


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> list[object]:
    data = tmp_path_factory.mktemp("instructions") / "data.json"
    rows = [{"instruction": f"Say {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 30)]
    data.write_text(json.dumps(rows))
    return ["finetune", "--checkpoint", tiny_checkpoint("parent"), "--data", data, *SCHEDULE.split()]


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a run but those that tell the time or the place, and where the pointers point."""
    files = {
        str(path.relative_to(directory)): path.read_bytes()
        for folder in ("checkpoints", "state", "tokenizer")
        for path in (directory / folder).rglob("*")
        if path.is_file()
    }
    files |= {name: (directory / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    return files | {name: bytes((directory / name).readlink()) for name in ("best", "last")}


def assert_same(directory: Path, expected: dict[str, bytes]) -> None:
    found = content(directory)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are ended by Ctrl-C in their sixth update."""
    update = Training._update

    def ended(training: Training, *arguments: Any) -> Any:
        if training.state.step == 5:
            raise KeyboardInterrupt
        return update(training, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_update", ended)
        yield


def assert_resumes_to_the_same(command: list[str], out: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of `command`, ended in the middle and resumed in `out`, leaves what the `whole` one did.

    What the checkpoint gave before training is not computed anew.
    """
    with interrupted(monkeypatch):
        assert main(command) == 130
    with monkeypatch.context() as patched:
        patched.setattr("topkapi.training.optimisation.log_probabilities.write_directory", None)
        assert main([command[0], "--resume", str(out)]) == 0
    assert_same(out, content(whole))


@dataclass
class Whole:
    """A command, what an uninterrupted run of it leaves, the file operations a kill can hit, and how long it took."""

    command: list[object]
    content: dict[str, bytes]
    calls: list[str]
    seconds: float

    def calls_of_saves(self, first: int, last: int) -> range:
        """The numbers of all operations of the saves at the steps `first` to `last`, and of the pruning after them."""
        touched = [
            number
            for number, call in enumerate(self.calls, start=1)
            if any(f"step-{step}." in call or f"step-{step}/" in call for step in range(first, last + 1))
        ]
        return range(touched[0], touched[-1] + 1)


def uninterrupted(run: Run, command: list[object], folder: Path) -> Whole:
    # The first run fills the token cache, so that the second makes the calls that every later one makes.
    for name in ("first", "whole"):
        result = run(*command, "--out", folder / name)
        assert result["status"] == 0, result["output"]
    expected = content(folder / "whole")
    assert content(folder / "first") == expected
    records = [json.loads(line) for line in expected["metrics.jsonl"].decode().splitlines()]
    assert len({record["loss"] for record in records if "loss" in record}) >= 10, "something must be learned"
    return Whole(command, expected, result["calls"], result["seconds"])


@pytest.fixture(scope="module")
def wholes(
    run: Run, pretraining: list[object], finetuning: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Whole]:
    commands = {"pretrain": pretraining, "finetune": finetuning}

    @functools.cache
    def whole(command: str, optimizer: str) -> Whole:
        flags = [*commands[command], "--optimizer", optimizer]
        if optimizer == "schedule-free":
            flags += ["--schedule", "constant"]
        return uninterrupted(run, flags, tmp_path_factory.mktemp(f"{command}-{optimizer}"))

    return whole


@pytest.fixture(scope="module")
def pretrained(wholes: Callable[[str, str], Whole]) -> Whole:
    return wholes("pretrain", "muon")


def assert_readable(out: Path) -> None:
    """Whatever a kill left under a checkpoint's name can be loaded, and its digests agree; so can `best` and `last`."""
    names = [path for path in out.glob("checkpoints/*") if not path.name.startswith(".")]
    for path in [*names, *(out / name for name in ("best", "last") if (out / name).is_symlink())]:
        load_checkpoint(path)


def assert_killed_it_ends_the_same(run: Run, whole: Whole, out: Path, **kill: Any) -> None:
    killed = run(*whole.command, "--out", out, **kill)
    while killed["status"] == 0 and "kill_after" in kill:
        # It was faster than the uninterrupted one.
        shutil.rmtree(out)
        kill["kill_after"] /= 2
        killed = run(*whole.command, "--out", out, **kill)
    assert killed["status"] in (-signal.SIGKILL, -signal.SIGXFSZ), f"{kill}: {killed['output']}"
    assert_readable(out)
    resumed = run(*whole.command, "--out", out, "--resume")
    assert resumed["status"] == 0, f"{kill}: {resumed['output']}"
    assert_same(out, whole.content)
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("command", "optimizer"), [pytest.param("pretrain", "muon", marks=pytest.mark.slow), ("finetune", "adamw")]
)
def test_killed_at_any_instant_it_resumes_to_the_same_bytes(
    command: str, optimizer: str, run: Run, tmp_path: Path, wholes: Callable[[str, str], Whole]
) -> None:
    whole, chance = wholes(command, optimizer), random.Random(command)
    for point in sorted(chance.sample(range(1, len(whole.calls)), 1)):
        assert_killed_it_ends_the_same(run, whole, tmp_path / "killed", kill_at=point)
    # In the middle of writing a file of the second save, by a thread: what is left must be what the others leave.
    whole = replace(whole, command=[*whole.command, "--asynchronous-saves"])
    torn = {"kill_at": whole.calls_of_saves(6, 6)[0], "torn": chance.randrange(10_000, 40_000)}
    assert_killed_it_ends_the_same(run, whole, tmp_path / "torn", **torn)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_killed_at_many_random_instants(
    command: str, optimizer: str, run: Run, tmp_path: Path, wholes: Callable[[str, str], Whole]
) -> None:
    whole, chance = wholes(command, optimizer), random.Random(command + optimizer)
    for number in range(13):
        if number == 7:
            whole = replace(whole, command=[*whole.command, "--asynchronous-saves"])
        # Anywhere from before the first step to the report; a moment of the clock, so that no two runs are hit alike.
        after = chance.uniform(0, 0.8) * whole.seconds
        assert_killed_it_ends_the_same(run, whole, tmp_path / f"killed-{number}", kill_after=after)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_killed_at_every_file_operation_of_a_save(
    command: str, optimizer: str, run: Run, tmp_path: Path, wholes: Callable[[str, str], Whole]
) -> None:
    whole, chance = wholes(command, optimizer), random.Random(command + optimizer)
    # A state with a checkpoint, the pruning after it, and a checkpoint that becomes the best.
    calls = whole.calls_of_saves(6, 8)
    assert len(calls) > 40
    for point in calls:
        assert_killed_it_ends_the_same(run, whole, tmp_path / f"killed-{point}", kill_at=point)
    for number in range(4):
        torn = {"kill_at": calls[0], "torn": chance.randrange(1, 40_000)}
        assert_killed_it_ends_the_same(run, whole, tmp_path / f"torn-{number}", **torn)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_while_it_takes_another_runs_place(every: bool, run: Run, tmp_path: Path, pretrained: Whole) -> None:
    """The old run is whole until nothing of the new one can be refused; what comes after never stands in the way."""
    out, old = tmp_path / "run", tmp_path / "old"
    assert run(*pretrained.command, "--out", old, "--seed", "7")["status"] == 0
    shutil.copytree(old, out, symlinks=True)
    calls = run(*pretrained.command, "--out", out, "--overwrite")["calls"]
    assert_same(out, pretrained.content)
    told = next(number for number, call in enumerate(calls, start=1) if "config.yaml" in call)
    ready = max(number for number in range(1, told) if "/.prepared" in calls[number - 1])
    begun = next(number for number in range(told, len(calls)) if "/metrics.jsonl" in calls[number - 1])
    for point in range(1, begun + 1) if every else [random.Random(0).randrange(ready + 1, begun)]:
        shutil.rmtree(out)
        shutil.copytree(old, out, symlinks=True)
        assert run(*pretrained.command, "--out", out, "--overwrite", kill_at=point)["status"] == -signal.SIGKILL
        if point <= ready:
            assert_same(out, content(old))
        again = run(*pretrained.command, "--out", out, "--overwrite")
        assert again["status"] == 0, f"{calls[point - 1]}: {again['output']}"
        assert_same(out, pretrained.content)


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends_the_same(run: Run, tmp_path: Path, pretrained: Whole) -> None:
    out = tmp_path / "killed"
    run(*pretrained.command, "--out", out, kill_at=30)
    for call in range(40, len(pretrained.calls), 30):
        result = run(*pretrained.command, "--out", out, "--resume", kill_at=call)
        if result["status"] == 0:
            break
        assert result["status"] == -9, result["output"]
    assert result["status"] == 0
    assert_same(out, pretrained.content)


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    signal_name: str, run: Run, tmp_path: Path, pretrained: Whole
) -> None:
    out = tmp_path / "stopped"
    stopped = run(*pretrained.command, "--out", out, signal_at=2 * len(pretrained.calls) // 3, signal=signal_name)
    assert stopped["status"] == 2, stopped["output"]
    assert f"continue with: topkapi pretrain --resume {out}" in stopped["output"]
    # The printed command alone, without the recipe's flags, is enough.
    resumed = run("pretrain", "--resume", out)
    assert resumed["status"] == 0, resumed["output"]
    assert_same(out, pretrained.content)


@pytest.mark.slow
def test_averaged_weights_are_served_and_the_raw_ones_are_what_a_resumed_run_goes_on_with(
    run: Run, tmp_path: Path, wholes: Callable[[str, str], Whole]
) -> None:
    whole, out = wholes("pretrain", "schedule-free"), tmp_path / "stopped"
    # A save out of turn, by a thread, must not disturb the weights either.
    at = {"signal": "SIGTERM", "signal_at": whole.calls_of_saves(6, 6)[0]}
    stopped = run(*whole.command, "--out", out, "--asynchronous-saves", **at)
    assert stopped["status"] == 2, stopped["output"]
    (state,) = (out / "state").glob("step-*/tensors.safetensors")
    served, kept = load_file(out / "last" / "model.safetensors"), load_file(state)
    raw, latest = kept["raw:embed_tokens.weight"], kept["optimizer:embed_tokens.weight/z"]
    assert torch.equal(served["transformer.wte.weight"], raw.lerp(latest, 1 - 1 / 0.9))
    assert not any(name.startswith("model:") for name in kept)
    assert run("pretrain", "--resume", out)["status"] == 0
    assert_same(out, whole.content)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_averaged_weights_survive_kills(
    command: str, run: Run, tmp_path: Path, wholes: Callable[[str, str], Whole]
) -> None:
    whole, chance = wholes(command, "schedule-free"), random.Random(command)
    for point in sorted(chance.sample(range(1, len(whole.calls)), 4)):
        assert_killed_it_ends_the_same(run, whole, tmp_path / "killed", kill_at=point)
    whole = replace(whole, command=[*whole.command, "--asynchronous-saves"])
    torn = {"kill_at": whole.calls_of_saves(6, 6)[0], "torn": chance.randrange(10_000, 40_000)}
    assert_killed_it_ends_the_same(run, whole, tmp_path / "torn", **torn)


@pytest.mark.parametrize("flags", [[], ["--asynchronous-saves"]])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    flags: list[object], run: Run, tmp_path: Path, pretrained: Whole
) -> None:
    out = tmp_path / "full"
    assert run(*pretrained.command, "--out", out, kill_at=2 * len(pretrained.calls) // 3)["status"] == -9
    (state,) = sorted((out / "state").glob("step-*"))[-1:]
    before = load_checkpoint(out / "checkpoints" / state.name)
    failed = run(*pretrained.command, "--out", out, "--resume", *flags, file_limit=40_000)
    assert failed["status"] == 2
    assert "could not write" in failed["output"] and "hint: free disk space" in failed["output"]
    assert "Traceback" not in failed["output"]
    after = load_checkpoint(out / "last")
    assert after.details["step"] == int(state.name.removeprefix("step-"))
    pairs = zip(before.model.parameters(), after.model.parameters(), strict=True)
    assert all(one.equal(other) for one, other in pairs)
    assert run(*pretrained.command, "--out", out, "--resume")["status"] == 0
    assert_same(out, pretrained.content)


def test_a_run_of_no_set_end_goes_on_longer(run: Run, pretraining: list[object], tmp_path: Path) -> None:
    command = [*pretraining, "--schedule", "constant", "--warmup", 2]
    for out, steps in (("whole", 12), ("longer", 4)):
        assert run(*command, "--max-steps", steps, "--out", tmp_path / out)["status"] == 0
    assert run("pretrain", "--resume", tmp_path / "longer", "--max-steps", 8)["status"] == 0
    # From here on it is the run's own length.
    assert "max_steps: 8\n" in (tmp_path / "longer" / "config.yaml").read_text("utf-8")
    assert run("pretrain", "--resume", tmp_path / "longer", "--max-steps", 12)["status"] == 0
    whole, longer = content(tmp_path / "whole"), content(tmp_path / "longer")
    weights = [name for name in whole if name.endswith(".safetensors") and "step-12" in name]
    assert len(weights) >= 2 and all(whole[name] == longer[name] for name in weights)
    assert whole["metrics.jsonl"] == longer["metrics.jsonl"]
    # A warm-up that is part of the run would have been longer.
    assert run(*command, "--warmup", 0.1, "--max-steps", 4, "--out", tmp_path / "part")["status"] == 0
    result = run("pretrain", "--resume", tmp_path / "part", "--max-steps", 8)
    assert result["status"] == 2 and "was started with --max-steps = 4, not 8" in result["output"]


def test_resuming_with_another_recipe_or_other_data_is_refused(
    run: Run, tmp_path: Path, pretrained: Whole, text_file: Path
) -> None:
    out = tmp_path / "run"
    run(*pretrained.command, "--out", out, kill_at=len(pretrained.calls) // 2)
    refused = run(*pretrained.command, "--out", out, "--resume", "--learning-rate", "0.5")
    assert refused["status"] == 2
    assert "--learning-rate = 0.001, not 0.5" in refused["output"]
    again = run(*pretrained.command, "--out", out)
    assert again["status"] == 2 and "--resume" in again["output"] and "--overwrite" in again["output"]
    original = text_file.read_text("utf-8")
    try:
        text_file.write_text(original + "more", "utf-8")
        changed = run(*pretrained.command, "--out", out, "--resume")
    finally:
        text_file.write_text(original, "utf-8")
    assert changed["status"] == 2 and "data changed" in changed["output"]
