"""What is measured while a run goes on: its pace, the machine, and the trackers that are told."""

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from topkapi.model.config import ModelConfig
from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import main
from topkapi.training.optimisation.throughput import Throughput, flops_per_token, peak_flops
from topkapi.training.recipes.recipe import PretrainRecipe
from topkapi.training.run import system, trackers
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.trackers import tracked

CONFIG = ModelConfig(
    family="qwen3", vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=4,
    head_dim=16, context_length=32, tie_embeddings=True,
)  # fmt: skip


@pytest.fixture
def pretrain(tmp_path: Path, english: str) -> Callable[..., Path]:
    (tmp_path / "text.txt").write_text(english[:20_000], encoding="utf-8")

    def run(*more: str) -> Path:
        out = tmp_path / "project" / "run"
        flags = "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --context-length 32"
        flags += " --batch-size 4 --threads 1 --max-steps 6 --evaluate-every 3 --sample-tokens 4"
        data = ["--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache"), "--out", str(out)]
        assert main(["pretrain", *data, *flags.split(), *more]) == 0
        return out

    run.out = tmp_path / "project" / "run"  # type: ignore[attr-defined]
    return run


def identity(out: Path) -> str:
    return json.loads((out / "run.json").read_text())["id"]


def validation(out: Path) -> list[float]:
    return [record["validation_loss"] for record in lines(out / "metrics.jsonl") if "validation_loss" in record]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_utilisation_is_the_work_done_over_the_work_possible() -> None:
    flops = flops_per_token(CONFIG, 1.0, 32)
    assert flops == 6 * CONFIG.parameter_count() + 12 * 2 * 4 * 16 * 32
    throughput = Throughput(total=10, first=0, token_flops=flops, peak=100 * flops)
    throughput.note(trained=20, processed=40, seconds=1.0)
    assert throughput.tokens_per_s == 20 and throughput.utilisation == pytest.approx(0.4)
    assert throughput.facts() == "20 tokens/s  MFU 40%"
    # A peak that was measured while other programs ran is no peak.
    throughput.peak = throughput.peak * 0.3
    assert throughput.utilisation is None and throughput.facts() == "20 tokens/s"
    assert Throughput(10, 0, flops, None).peak is None


def test_after_a_return_the_time_left_counts_the_steps_again() -> None:
    throughput = Throughput(total=100, first=50, token_flops=1.0, peak=None, began=time.monotonic() - 30)
    assert throughput.seconds_left(60) == pytest.approx(40 * 30 / 10, rel=0.01)
    assert throughput.seconds_left(41) == pytest.approx(59 * 30 / 1, rel=0.01)


def test_the_peak_of_this_machine_is_no_less_than_what_a_product_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkapi.training.optimisation.throughput._OWN_SHARE", 0.0)

    def measured() -> bool:
        ones = torch.ones(512, 512)
        peak, started = peak_flops(torch.device("cpu"), torch.float32), time.perf_counter()
        torch.mm(ones, ones)
        return peak is not None and peak > 1e9 and peak > 0.2 * 2 * 512**3 / (time.perf_counter() - started)

    # While another program has the core, what is measured is no peak.
    assert any(measured() for _ in range(10))


@pytest.mark.parametrize(
    "name,tflops",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA H100 PCIe", 756),
     ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX A1000", None),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", None)],
)  # fmt: skip
def test_a_gpu_is_known_by_whole_words_of_its_name(
    name: str, tflops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Measured(Exception):
        pass

    def ones(*arguments: object, **options: object) -> None:
        raise Measured

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "ones", ones)
    if tflops is None:
        with pytest.raises(Measured):
            peak_flops(torch.device("cuda"), torch.bfloat16)
    else:
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == tflops * 1e12


def test_a_peak_measured_beside_other_programs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkapi.training.optimisation.throughput.sys.platform", "linux")
    monkeypatch.setattr("topkapi.training.optimisation.throughput.time.process_time", lambda: 0.0)
    assert peak_flops(torch.device("cpu"), torch.float32) is None


def test_the_bar_shows_loss_learning_rate_speed_utilisation_and_time_left(
    pretrain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("topkapi.training.optimisation.throughput.peak_flops", lambda device, dtype: 1e12)
    pretrain()
    shown = terminal.getvalue()
    assert "6/6" in shown and "(smoothed " in shown and "tokens/s" in shown
    assert "MFU " in shown and "learning rate " in shown and "0s left" in shown


def test_a_narrow_terminal_cuts_the_facts_short_and_not_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    console.start(200_000, 0)
    facts = "loss 3.123 (smoothed 3.234)  12,345 tokens/s  MFU 45%  learning rate 3.0e-04"
    console.advance(100_000, facts, 50_000)
    console.stop()
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", terminal.getvalue())]
    last = next(line for line in reversed(shown) if "loss" in line)
    assert len(last) <= 80
    assert "━━━━━" in last and "100000/200000" in last and "13h53m left" in last and "loss 3.123" in last


def test_without_a_terminal_lines_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.start(10, 0)
    console._last_line = -1e9
    console.advance(3, "loss 1.0", 75)
    assert capsys.readouterr().out == "step 3/10  loss 1.0  1m15s left\n"


def test_the_machine_is_recorded_apart_from_the_metrics(
    pretrain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topkapi.training.optimisation.throughput.peak_flops", lambda device, dtype: 1e12)
    out = pretrain()
    first, last = lines(out / "system.jsonl")[0], lines(out / "system.jsonl")[-1]
    assert first["time"] <= last["time"]
    assert last["process_memory"] > 50_000_000 and last["memory_available"] > 0 and last["process_cpu_percent"] > 0
    assert all("cpu_percent" not in record for record in lines(out / "metrics.jsonl"))
    timings = lines(out / "timings.jsonl")
    assert [record["step"] for record in timings] == [3, 6]
    assert all(record["model_flops_utilisation"] > 0 for record in timings)


def test_every_gpu_that_nvml_sees_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def no_power(handle: int) -> int:
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: f"GPU {handle}",
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5_000_000),
        nvmlDeviceGetPowerUsage=lambda handle: 350_000 if handle == 0 else no_power(handle),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with system.recorded(tmp_path / "system.jsonl", print, interval=0.01):
        end = time.monotonic() + 30
        while len(lines(tmp_path / "system.jsonl")) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    found = lines(tmp_path / "system.jsonl")
    assert len(found) > 2
    assert found[0]["gpus"] == [
        {"name": "GPU 0", "use_percent": 97, "memory_used": 5_000_000, "power_watts": 350.0},
        {"name": "GPU 1", "use_percent": 97, "memory_used": 5_000_000, "power_watts": None},
    ]


def test_without_psutil_the_run_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    said: list[str] = []
    with system.recorded(tmp_path / "system.jsonl", said.append):
        pass
    assert said == ["system metrics are not recorded: pip install 'topkapi[train]'"]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(SettingsError, match="wandb is not installed") as caught,
        tracked(PretrainRecipe(track="wandb"), RunDirectory(tmp_path)),
    ):
        pass
    assert caught.value.hint == "pip install wandb"


def test_tensorboard_holds_the_numbers(pretrain: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboard")
    out = pretrain("--track", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = [record["loss"] for record in lines(out / "metrics.jsonl") if "loss" in record]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("validation_loss")] == [0, 3, 6]
    assert [event.step for event in events.Scalars("tokens_per_s")] == [3, 6]
    assert events.Scalars("system/process_memory")[0].value > 0
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 3, 6]
    (table,) = events.Tensors("evaluations/text_summary")
    assert table.tensor_proto.string_val[0].decode().count("\n") == 4, "a heading and three evaluations"


@pytest.mark.filterwarnings("ignore")
def test_trackio_holds_the_numbers(
    pretrain: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    out = pretrain("--track", "trackio")
    losses = [record["loss"] for record in lines(out / "metrics.jsonl") if "loss" in record]
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("project")
    assert name == f"run-{identity(out)[:6]}"
    found = SQLiteStorage.get_logs("project", name)
    assert [entry["loss"] for entry in found if "loss" in entry] == pytest.approx(losses)
    samples = [row["prompt"] for entry in found if "samples" in entry for row in entry["samples"]["_value"]]
    assert samples == [record["prompt"] for record in lines(out / "samples.jsonl")]
    (table,) = (entry["evaluations"]["_value"] for entry in found if "evaluations" in entry)
    assert [row["validation_loss"] for row in table] == validation(out)
    assert all(entry["process_memory"] > 0 for entry in SQLiteStorage.get_system_logs("project", name))


class Killed(Exception):
    """Stands for a process that ends between two saves."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], None]:
    def run_until(run: Callable[[], object], step: int) -> None:
        advance = Console.advance

        def end(self: Console, at: int, *facts: object) -> None:
            if at == step:
                raise Killed
            advance(self, at, *facts)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Console, "advance", end)
            with pytest.raises(Killed):
                run()

    return run_until


def test_a_run_has_an_id_of_its_own(pretrain: Callable[..., Path], killed: Callable[..., None]) -> None:
    """Kept when it is resumed, another when it is replaced."""
    killed(pretrain, 5)
    out = pretrain.out  # type: ignore[attr-defined]
    first = identity(out)
    assert len(first) == 32
    assert main(["pretrain", "--resume", str(out)]) == 0 and identity(out) == first
    (out / "tensorboard").mkdir()
    pretrain("--overwrite")
    assert identity(out) != first and not (out / "tensorboard").exists()


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self, told: Any, takes_back: bool) -> None:
        self.told, self.takes_back, self.heard = told, takes_back, list[tuple[str, int]]()

    def forget(self, first: int) -> bool:
        if self.takes_back:
            self.heard = [(name, step) for name, step in self.heard if step < first]
        return self.takes_back

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.heard += [(name, step) for name in numbers]

    def table(self, name: str, rows: list[Any], step: int) -> None:
        self.heard.append((f"{name} of {len(rows)}", step))

    def system(self, numbers: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


@pytest.mark.parametrize("takes_back", [False, True])
def test_a_resumed_run_tells_no_step_twice_and_leaves_none_out(
    takes_back: bool, pretrain: Callable[..., Path], killed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recorder] = []

    def make(told: Any) -> Recorder:
        made.append(Recorder(told, takes_back))
        return made[-1]

    monkeypatch.setitem(trackers._TRACKERS, "trackio", make)
    out = pretrain.out  # type: ignore[attr-defined]
    killed(lambda: pretrain("--track", "trackio"), 5)
    assert main(["pretrain", "--resume", str(out), "--track", "trackio", "--track-name", "other"]) == 0
    first, second = made
    assert first.told.identity == second.told.identity and second.told.name == "other"
    assert (first.told.first, second.told.first) == (0, 4)
    if takes_back:
        first.forget(second.told.first)
    for name, steps in {"loss": [1, 2, 3, 4, 5, 6], "validation_loss": [0, 3, 6], "tokens_per_s": [3, 6],
                        "samples of 1": [0, 3, 6], "evaluations of 3": [6]}.items():  # fmt: skip
        assert [step for each, step in (*first.heard, *second.heard) if each == name] == steps, name


def test_a_run_that_returns_to_a_save_tells_no_step_twice() -> None:
    for takes_back in (False, True):
        tracker = Recorder(None, takes_back)
        listener = trackers._Listener(tracker, {})
        for step in (1, 2, 3, 2, 3, 4):
            listener("metrics.jsonl", {"step": step, "loss": 1.0, "learning_rate": 1.0})
        assert [step for name, step in tracker.heard if name == "loss"] == [1, 2, 3, 4]


def test_tensorboard_shows_no_step_twice(pretrain: Callable[..., Path], killed: Callable[..., None]) -> None:
    pytest.importorskip("tensorboard")
    out = pretrain.out  # type: ignore[attr-defined]
    killed(lambda: pretrain("--track", "tensorboard"), 5)
    assert main(["pretrain", "--resume", str(out)]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_runs_of_one_name_apart_and_resumed_ones_together(
    pretrain: Callable[..., Path], killed: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    out = pretrain.out  # type: ignore[attr-defined]
    given = ("--track", "trackio", "--track-project", "apart", "--track-name", "same")
    killed(lambda: pretrain(*given), 5)
    assert main(["pretrain", "--resume", str(out)]) == 0
    (name,) = SQLiteStorage.get_runs("apart")
    assert name.startswith("same-")
    assert [entry["step"] for entry in SQLiteStorage.get_logs("apart", name) if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    pretrain("--overwrite", *given)
    assert len(SQLiteStorage.get_runs("apart")) == 2


@pytest.mark.slow
def test_wandb_holds_the_numbers(
    pretrain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = pretrain("--track", "wandb")
    (file,) = (out / "wandb").glob("offline-run-*/*.wandb")
    losses: list[float] = []
    tables, machine = set[str](), 0
    for record in wandb_records(file):
        items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        losses += [float(items["loss"])] if "loss" in items else []
        tables |= {name.partition("/")[0] for name, value in items.items() if "table-file" in value}
        machine += "system/process_memory" in items
        assert not record.HasField("run") or record.run.run_id == identity(out)
    expected = [record["loss"] for record in lines(out / "metrics.jsonl") if "loss" in record]
    assert losses == pytest.approx(expected)
    assert tables == {"samples", "evaluations"} and machine


@pytest.mark.slow
def test_wandb_keeps_runs_of_one_name_apart_and_resumed_ones_together(
    pretrain: Callable[..., Path], killed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline each part of a run has a folder, and all of one run its id, by which `wandb sync` puts them together."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = pretrain.out  # type: ignore[attr-defined]
    given = ("--track", "wandb", "--track-project", "apart", "--track-name", "same")
    killed(lambda: pretrain(*given), 5)
    assert main(["pretrain", "--resume", str(out)]) == 0
    told: dict[str, list[int]] = {}
    first = identity(out)
    pretrain("--overwrite", *given)
    for file in sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda each: each.stat().st_mtime_ns):
        records = list(wandb_records(file))
        (run,) = {record.run.run_id for record in records if record.HasField("run")}
        assert {record.run.display_name for record in records if record.HasField("run")} == {"same"}
        told.setdefault(run, []).extend(
            record.history.step.num for record in records if any(item.key == "loss" or list(item.nested_key) == ["loss"]
                                                                 for item in record.history.item)
        )  # fmt: skip
    assert told == {first: [1, 2, 3, 4, 5, 6], identity(out): [1, 2, 3, 4, 5, 6]} and len(told) == 2


def wandb_records(path: Path) -> Iterator[Any]:
    """What W&B wrote of a run, record by record."""
    from wandb.proto import wandb_internal_pb2

    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which wandb writes after seven bytes of its own."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        # Whole, first, middle, last.
        if kind in (1, 4):
            yield record
            record = b""


def test_what_is_told_anew_is_a_line_and_no_line_is_told_twice(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for text in ("  sample: Who? | I am.", "  sample: Who? | I am.", "  sample: Who? | You\n" + "a" * 500):
        console.news("Who?", text)
    console.news("What?", "  sample: What? | It is.")
    console.news("Who?", "  sample: Who? | I am.")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:18] for line in lines] == [
        "  sample: Who? | I", "  sample: Who? | Y", "a" * 18, "  sample: What? | ", "  sample: Who? | I"
    ]  # fmt: skip
    assert max(map(len, lines)) <= 120 and lines[2].endswith("…")
