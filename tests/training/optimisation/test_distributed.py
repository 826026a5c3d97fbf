"""Several processes train what one would have trained: the same windows, the same losses, the same weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.driver import ROOT, Run, driver, free_port
from topkapi.model.storage.checkpoint import load_checkpoint

# Runs of a second, or of three by two processes, on an idle machine.
pytestmark = pytest.mark.timeout(600)

SCHEDULE = "--threads 1 --device cpu --sample-tokens 5 --batch-size 4 --micro-batch-size 1 --evaluation-batches 2"
STEPS = "--max-steps 9 --evaluate-every 4 --save-every 3"
SHAPE = "--hidden-size 32 --intermediate-size 64 --num-layers 2 --num-heads 2 --num-kv-heads 1 --head-dim 16"
SHAPE += " --context-length 32 --vocab-size 300"
# Sums in another order differ in their last bits, and what computes in bfloat16, as Muon does, makes more of that.
EXACT, COARSE = 5e-6, 2e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with driver(tmp_path_factory.mktemp("driver")) as ask:
        yield ask


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory, english: str) -> list[object]:
    path = tmp_path_factory.mktemp("text") / "manual.txt"
    path.write_text(english[:30_000], encoding="utf-8")
    flags = [*SCHEDULE.split(), *STEPS.split(), *SHAPE.split()]
    return ["pretrain", "--data", path, "--cache", path.parent / "cache", *flags]


@pytest.fixture(scope="module")
def single(run: Run, pretraining: list[object], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of one process, by its optimiser."""
    done: dict[str, Path] = {}

    def of(optimizer: str) -> Path:
        if optimizer not in done:
            done[optimizer] = tmp_path_factory.mktemp(optimizer) / "one"
            finished(run(*pretraining, "--optimizer", optimizer, "--out", done[optimizer]))
        return done[optimizer]

    return of


def finished(result: dict[str, Any]) -> str:
    assert [result["status"], *result["others"]] == [0] * (1 + len(result["others"])), result["output"]
    return str(result["output"])


def records(directory: Path, name: str) -> list[Any]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def assert_like(directory: Path, expected: Path, tolerance: float = EXACT) -> None:
    """The same weights, state, losses, evaluations and files but for rounding."""
    for pattern in ("last/*.safetensors", "state/step-9/tensors.safetensors"):
        (found,), (wanted,) = ([load_file(path) for path in each.glob(pattern)] for each in (directory, expected))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            difference = (found[name] - tensor).abs().max().item()
            assert difference <= tolerance + 1e-3 * tensor.abs().max().item(), f"{name} of {pattern} by {difference}"
    assert records(directory, "step") == records(expected, "step")
    for name in ("loss", "gradient_norm", "train_loss", "validation_loss", "tokens"):
        assert records(directory, name) == pytest.approx(records(expected, name), abs=10 * tolerance), name
    assert {path.name for path in directory.iterdir()} == {path.name for path in expected.iterdir()}


def test_two_processes_train_what_one_trains_and_only_the_first_speaks(
    run: Run, tmp_path: Path, pretraining: list[object], single: Callable[[str], Path]
) -> None:
    said = finished(run(*pretraining, "--out", tmp_path / "two", processes=2))
    assert_like(tmp_path / "two", single("adamw"))
    assert said.count("\nstep 9 ") == 1 and said.count("serve it with") == 1
    load_checkpoint(tmp_path / "two" / "best")


@pytest.mark.slow
def test_a_run_of_two_with_a_part_each_is_asked_to_stop_and_goes_on_with_one(
    run: Run, tmp_path: Path, pretraining: list[object], single: Callable[[str], Path]
) -> None:
    out = tmp_path / "run"
    # Either process may be the one that is asked, and both stop at the same step.
    stopped = run(
        *pretraining, "--optimizer", "muon", "--parallel", "fsdp", "--out", out,
        processes=2, victim=1, signal="SIGTERM",
    )  # fmt: skip
    assert [stopped["status"], *stopped["others"]] == [2, 2], stopped["output"]
    assert f"continue with: topkapi pretrain --resume {out}" in stopped["output"]
    said = finished(run("pretrain", "--resume", out))
    assert "one process has nothing to share by fsdp" in said
    assert_like(out, single("muon"), COARSE)


def test_a_process_that_is_killed_ends_the_others_and_says_what_to_do(
    run: Run, tmp_path: Path, pretraining: list[object]
) -> None:
    ended = run(*pretraining, "--max-steps", "100000", "--evaluate-every", "50000", "--out", tmp_path / "run", processes=2, victim=1, signal="SIGKILL")  # fmt: skip # noqa: E501
    assert ended["status"] == -9 and ended["others"] == [2], ended["output"]
    assert "error: process 0 of 2 lost the others" in ended["output"] and "--resume" in ended["output"]
    assert "Traceback" not in ended["output"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "3"], "a batch of 3 cannot be shared evenly by 2 processes"),
        (["--parallel", "fsdp", "--compile"], "with --parallel fsdp, layers that are gathered one by one"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    flags: list[object], message: str, run: Run, tmp_path: Path, pretraining: list[object]
) -> None:
    refused = run(*pretraining, "--out", tmp_path / "run", *flags, processes=2)
    assert [refused["status"], *refused["others"]] == [2, 2]
    assert f"error: {message}" in refused["output"] and "Traceback" not in refused["output"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_begun_by_one_process_it_goes_on_with_two(
    parallel: str, run: Run, tmp_path: Path, pretraining: list[object], single: Callable[[str], Path]
) -> None:
    out = tmp_path / "run"
    stopped = run(*pretraining, "--optimizer", "muon", "--out", out, signal="SIGINT")
    assert stopped["status"] == 2, stopped["output"]
    finished(run("pretrain", "--resume", out, "--parallel", parallel, processes=2))
    assert_like(out, single("muon"), COARSE)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--optimizer", "muon"], ["--parallel", "fsdp", "--optimizer", "muon"]])
def test_stopped_and_continued_by_as_many_processes_it_ends_with_the_same_bytes(
    flags: list[str], run: Run, tmp_path: Path, pretraining: list[object]
) -> None:
    given = [*pretraining, *flags, "--dropout", "0.1"]
    finished(run(*given, "--out", tmp_path / "whole", processes=2))
    stopped = run(*given, "--out", tmp_path / "stopped", processes=2, signal="SIGTERM")
    assert [stopped["status"], *stopped["others"]] == [2, 2], stopped["output"]
    finished(run("pretrain", "--resume", tmp_path / "stopped", processes=2))
    for name in ("state/step-9/tensors.safetensors", "last/model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.fixture(scope="module")
def parent(run: Run, pretraining: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parent") / "run"
    finished(run(*pretraining, "--context-length", "96", "--max-steps", "2", "--out", out))
    return out / "last"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("finetune", ["--prompt-loss-weight", "0.5", "--recompute", "--precision", "bf16"]),
        ("finetune", ["--method", "lora"]),
        ("finetune", ["--method", "qlora"]),
        ("finetune", ["--method", "dora"]),
        ("dpo", ["--method", "full"]),
        ("dpo", ["--method", "lora"]),
        ("kto", ["--method", "full"]),
    ],
)
def test_checkpoints_are_tuned_by_two_processes_as_by_one(
    command: str, flags: list[str], parallel: str, run: Run, tmp_path: Path, parent: Path
) -> None:
    rows = [{"instruction": f"Say {n}.", "output": "yes" * (n % 3 + 1)} for n in range(1, 30)]
    pairs = [{"prompt": f"Say {n}.", "chosen": f"yes {n % 4}", "rejected": "no"} for n in range(1, 30)]
    data = tmp_path / "rows.json"
    judged = [{"prompt": f"Say {n}.", "completion": f"yes {n % 4}", "label": n % 2 == 0} for n in range(1, 30)]
    data.write_text(json.dumps({"finetune": rows, "dpo": pairs, "kto": judged}[command]))
    given = [command, "--checkpoint", parent, "--data", data, *SCHEDULE.split(), *STEPS.split(), *flags]
    given += ["--learning-rate", "1e-3"]
    finished(run(*given, "--out", tmp_path / "one"))
    finished(run(*given, "--out", tmp_path / "two", "--parallel", parallel, processes=2))
    assert_like(tmp_path / "two", tmp_path / "one", COARSE if "bf16" in flags else EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_return_to_the_same_save_and_stop_early_together(
    parallel: str, run: Run, tmp_path: Path, pretraining: list[object]
) -> None:
    rhyme = "Jack and Jill went up the hill to fetch a pail of water. Jack fell down and broke his crown. " * 3
    noise = "".join(chr(33 + (index * index * 7 + index) % 90) for index in range(90))
    (tmp_path / "rhymes.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [rhyme] * 60 + [noise] + [rhyme] * 60)
    )
    (tmp_path / "held-out.txt").write_text(noise * 20)
    given = [*pretraining, "--data", tmp_path / "rhymes.jsonl", "--validation-data", tmp_path / "held-out.txt"]
    given += ["--on-divergence", "return", "--learning-rate", "0.01", "--max-steps", "200", "--evaluate-every", "10"]
    given += ["--sample-every", "never", "--patience", "4"]
    finished(run(*given, "--out", tmp_path / "one"))
    said = finished(run(*given, "--out", tmp_path / "two", "--parallel", parallel, processes=2))
    spikes = [records(tmp_path / name, "returned_to") for name in ("one", "two")]
    assert spikes[0] and spikes[0] == spikes[1], "the noise must be met"
    assert "is left out from now on" in said and "no better validation loss in 4 evaluations" in said
    assert records(tmp_path / "two", "step") == records(tmp_path / "one", "step")


@pytest.mark.slow
def test_the_command_of_the_documentation(tmp_path: Path, pretraining: list[object]) -> None:
    command = [str(argument) for argument in (*pretraining, "--out", tmp_path / "run")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]  # fmt: skip # noqa: E501
    topkapi = shutil.which("topkapi", path=str(Path(sys.executable).parent))
    assert topkapi is not None
    result = subprocess.run(
        [*torchrun, "--no-python", topkapi, *command], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("serve it with: topkapi serve") == 1
    load_checkpoint(tmp_path / "run" / "best")
    assert "torchrun --nproc-per-node 4 --no-python topkapi pretrain" in (ROOT / "docs" / "training.md").read_text()
