"""A run's directory: never lost to a mistake in another run's data or flags, nothing left of one that is refused."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import topkapi.training.run.process
from topkapi.service.commands.cli import main
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.process import present, training_process

SMALL = "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --num-heads 4 --num-kv-heads 2 --threads 1"
SMALL += " --context-length 32 --batch-size 4 --vocab-size 300 --max-steps 4 --sample-every never --cache cache"
PRETRAIN = ["pretrain", *SMALL.split(), "--data"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    """A folder with data and a finished run of `pretrain`, `runs/old`."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text(english[:20_000], encoding="utf-8")
    (folder / "binary.txt").write_bytes(b"good\n\0bad")
    (folder / "one.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}]))
    (folder / "pairs.json").write_text(
        json.dumps([{"prompt": f"Say {n}", "chosen": "yes", "rejected": "no"} for n in range(10)])
    )
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main([*PRETRAIN, "text.txt", "--out", "runs/old"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def parent(tiny_checkpoint: Callable[..., Path]) -> str:
    return str(tiny_checkpoint("parent"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mistakes(parent: str) -> Iterator[tuple[list[str], str]]:
    """Commands that are refused, at the data, the tokenizer, the network, the optimiser and the last moment."""
    yield [*PRETRAIN, "gone.txt"], "no such file"
    yield [*PRETRAIN, "binary.txt"], "a NUL character"
    yield [*PRETRAIN, "text.txt", "--num-kv-heads", "3"], "must be a multiple of"
    yield [*PRETRAIN, "text.txt", "--context-length", "20000"], "too little training text"
    yield [*PRETRAIN, "text.txt", "--on-divergence", "return", "--save-minutes", "5"], "needs them at the same steps"
    yield ["finetune", "--checkpoint", parent, "--data", "one.json"], "do not fill one batch"
    # Here the answers' probabilities have been computed and kept already.
    late = ["--batch-size", "2", "--on-divergence", "return", "--save-minutes", "5"]
    yield ["dpo", "--checkpoint", parent, "--data", "pairs.json", *late], "needs them at the same steps"


def test_a_run_is_replaced_only_once_nothing_can_be_refused_any_more(
    parent: str, capsys: pytest.CaptureFixture
) -> None:
    before = content(Path("runs"))
    for command, message in mistakes(parent):
        assert main([*command, "--out", "runs/old", "--overwrite"]) == 2
        assert message in capsys.readouterr().err
        assert content(Path("runs")) == before


def test_what_is_refused_leaves_no_directory(parent: str, capsys: pytest.CaptureFixture) -> None:
    for command, message in mistakes(parent):
        assert main([*command, "--out", "new/folder/run"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("new").exists()


def test_a_run_that_is_replaced_leaves_nothing_but_what_is_not_its_own(capsys: pytest.CaptureFixture) -> None:
    assert main([*PRETRAIN, "text.txt", "--out", "runs/twice"]) == 0
    (Path("runs/twice") / "notes.md").write_text("mine")
    assert main([*PRETRAIN, "text.txt", "--out", "runs/twice", "--overwrite", "--max-steps", "2"]) == 0
    run = RunDirectory(Path("runs/twice"))
    assert run.steps("checkpoints") == [2] and len(run.records("metrics.jsonl")) == 5 - 2 + 2
    assert run.config()["max_steps"] == 2 and (run.path / "notes.md").read_text() == "mine"
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_a_run_does_not_delete_what_it_starts_from(parent: str, capsys: pytest.CaptureFixture) -> None:
    command = ["finetune", "--checkpoint", "runs/old/best", "--data", "one.json", "--out", "runs/old", "--overwrite"]
    assert main(command) == 2
    assert "the checkpoint runs/old/best is part of the run that --overwrite would delete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "--resume", "runs/old", "--out", "runs/other"],
            "--resume runs/old goes on in runs/old, so --out",
        ),
        (["pretrain", "--resume", "runs/old", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["pretrain", "--resume", "--out", "runs/old", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["finetune", "--resume", "runs/old"], "runs/old is a run of pretrain, not of finetune"),
        (["dpo", "--resume", "runs/old"], "continue it with: topkapi pretrain --resume runs/old"),
    ],
)
def test_flags_that_a_resumed_run_cannot_follow_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    before = content(Path("runs/old"))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert content(Path("runs/old")) == before and not Path("runs/other").exists()


def state_of(name: str, capsys: pytest.CaptureFixture) -> str:
    assert main(["runs", "runs", "--json"]) == 0
    return next(run["state"] for run in json.loads(capsys.readouterr().out) if run["name"] == name)


def test_a_killed_run_is_stopped_at_once_and_a_live_one_is_left_alone(capsys: pytest.CaptureFixture) -> None:
    run = Path("runs/alive")
    run.mkdir()
    (run / "config.yaml").write_text(Path("runs/old/config.yaml").read_text())
    (run / "metrics.jsonl").write_text("")
    assert state_of("alive", capsys) == "stopped" and state_of("old", capsys) == "finished"
    script = "import sys, pathlib, topkapi.training.run.process as p\nwith p.present(pathlib.Path('runs/alive')):"
    script += " print('there', flush=True); sys.stdin.read()"
    root = Path(__file__).resolve().parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"there\n"
    assert state_of("alive", capsys) == "running"
    for more in (["pretrain", "--resume", "runs/alive"], [*PRETRAIN, "text.txt", "--out", "runs/alive", "--overwrite"]):
        assert main(more) == 2
        assert f"runs/alive is being trained by process {child.pid}" in capsys.readouterr().err
    child.kill()
    child.wait()
    assert state_of("alive", capsys) == "stopped"


def test_a_directory_that_another_process_holds_is_refused_until_that_ends(
    parent: str, capsys: pytest.CaptureFixture
) -> None:
    """From its first moment on, before there is anything to see of the other run."""
    held = Path("runs/held")
    held.mkdir()
    script = "import sys, pathlib, topkapi.training.run.process as p\nhold = p.Hold(pathlib.Path('runs/held'))\n"
    script += "print('there', flush=True); sys.stdin.read()"
    root = Path(__file__).resolve().parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"there\n"
    begin = [*PRETRAIN, "text.txt", "--out", "runs/held"]
    tune = ["finetune", "--checkpoint", parent, "--data", "one.json", "--batch-size", "1", "--out", "runs/held"]
    for command in (begin, tune, ["dpo", "--checkpoint", parent, "--data", "pairs.json", "--out", "runs/held"]):
        assert main(command) == 2
        assert "runs/held is being trained by another process" in capsys.readouterr().err
    assert not list(held.iterdir())
    shutil.copytree("runs/old", held, dirs_exist_ok=True, symlinks=True)
    before = content(held)
    for command in (["pretrain", "--resume", "runs/held"], [*begin, "--overwrite"]):
        assert main(command) == 2
        assert "runs/held is being trained by another process" in capsys.readouterr().err
    assert content(held) == before
    child.kill()
    child.wait()
    assert main([*begin, "--overwrite"]) == 0
    assert main(["pretrain", "--resume", "runs/held"]) == 0


def test_a_number_that_another_process_has_since_is_not_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / ".process.json"
    with present(tmp_path):
        assert training_process(tmp_path) == f"process {os.getpid()}"
        told = json.loads(note.read_text())
    assert not note.exists() and training_process(tmp_path) is None
    note.write_text(json.dumps(told | {"started": told["started"] - 3600}))
    assert training_process(tmp_path) is None
    # Of another host nothing is known but when it last wrote.
    note.write_text(json.dumps(told | {"host": f"not-{platform.node()}"}))
    assert training_process(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert training_process(tmp_path) == f"process {os.getpid()} on not-{platform.node()}"
    monkeypatch.setattr(topkapi.training.run.process, "_QUIET_SECONDS", -1.0)
    assert training_process(tmp_path) is None
    note.write_text("not JSON")
    assert training_process(tmp_path) is None
