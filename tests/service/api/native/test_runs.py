"""`/runs`: training runs as they are being written, cut back, damaged, or placed where nobody may look."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.served_by_replicas import REPLICAS
from topkapi.model.errors import SettingsError
from topkapi.service import runs as reading
from topkapi.service.commands.cli import main
from topkapi.service.settings import Settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    """A directory of runs with one that `topkapi pretrain` made."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(english[:30_000], encoding="utf-8")
    flags = "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --context-length 32 --threads 1"
    flags += " --batch-size 4 --max-steps 12 --evaluate-every 4 --sample-tokens 4 --schedule constant"
    data = ["--data", str(folder / "text.txt"), "--cache", str(folder / "cache"), "--out", str(folder / "runs" / "one")]
    assert main(["pretrain", *data, *flags.split()]) == 0
    return folder / "runs"


@pytest.fixture(scope="module")
def watched(serve: Callable, tiny_checkpoint: Callable[..., Path], trained: Path) -> Iterator:
    changing = {} if REPLICAS else {"model_directory": trained}
    with serve(tiny_checkpoint("watched"), runs_directory=trained, **changing) as running:
        yield running


def write_run(place: Path, lines: list[object] = [], settings: str = "epochs: 2\n") -> Path:  # noqa: B006
    """A run's directory with these records."""
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(settings, encoding="utf-8")
    if lines:
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return place


def updates(first: int, last: int) -> list[object]:
    return [
        {"step": step, "tokens": 10 * step, "loss": 5 - step / 10, "learning_rate": 0.1, "gradient_norm": 1.0}
        for step in range(first, last)
    ]


def test_a_run_that_trained_is_told_as_it_wrote(watched) -> None:
    (run,) = watched.client.get("/runs").json()["runs"]
    assert (run["name"], run["state"], run["step"], run["total_steps"]) == ("one", "finished", 12, 12)
    assert run["tokens"] == 12 * 4 * 32 and run["best_validation_loss"] == pytest.approx(run["validation_loss"])
    details = watched.client.get("/runs/one").json()
    assert details.items() >= run.items() and details["settings"]["batch_size"] == 4 and details["report"] is True
    assert watched.client.get("/runs/one/report").text.startswith("# one\n")
    metrics = watched.client.get("/runs/one/metrics").json()
    assert [each["step"] for each in metrics["records"] if "learning_rate" in each] == list(range(1, 13))
    assert metrics["records"][0]["validation_loss"] > run["validation_loss"] and not metrics["more"]
    thinned = watched.client.get("/runs/one/metrics", params={"every": 5}).json()["records"]
    assert [each["step"] for each in thinned if "learning_rate" in each] == [5, 10]
    assert [each["step"] for each in thinned if "train_loss" in each] == [0, 4, 8, 12]
    for kind in ("timings", "system", "samples"):
        assert watched.client.get(f"/runs/one/{kind}").json()["records"], kind
    assert watched.client.head("/runs").status_code == 200


@pytest.mark.one_process("replicas keep their checkpoints, and refuse POST /models")
def test_the_best_checkpoint_is_loaded_as_any_other(watched, serve, tiny_checkpoint, trained) -> None:
    (best,) = [each for each in watched.client.get("/runs/one").json()["checkpoints"] if each["best"]]
    assert best["path"] == f"one/checkpoints/step-{best['step']}"
    loaded = watched.post("/models", path=best["path"])
    assert loaded.status_code == 201 and loaded.json()["name"] == f"one-step-{best['step']}"
    with serve(tiny_checkpoint("alone"), runs_directory=trained) as other:
        assert {each["path"] for each in other.client.get("/runs/one").json()["checkpoints"]} == {None}
        assert other.post("/models", path=best["path"]).status_code == 403


def test_only_what_is_new_is_told_and_no_half_lines(tmp_path) -> None:
    runs = reading.Runs(tmp_path)
    metrics = write_run(tmp_path / "live", updates(1, 4)) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')
        file.flush()
        page = runs.page("live", "metrics")
        assert [json.loads(each)["step"] for each in page.records] == [1, 2, 3] and not page.more
        assert runs.page("live", "metrics", page.next).records == []
        file.write('ss": 4.5}\n')
    page = runs.page("live", "metrics", page.next)
    assert [json.loads(each) for each in page.records] == [{"step": 4, "loss": 4.5}] and not page.restarted


def test_a_file_that_was_cut_back_begins_anew(tmp_path) -> None:
    runs = reading.Runs(tmp_path)
    metrics = write_run(tmp_path / "live", updates(1, 9)) / "metrics.jsonl"
    after = runs.page("live", "metrics").next
    # The run went back to a save, left a batch out, and is as far again, with other losses.
    whole = metrics.read_text().replace('"gradient_norm": 1.0', '"gradient_norm": 2.0')
    metrics.write_text(whole)
    page = runs.page("live", "metrics", after)
    assert page.restarted and len(page.records) == 8
    # What a resumed run writes again bit for bit is nothing new.
    metrics.write_text(whole + json.dumps({"step": 9}) + "\n")
    again = runs.page("live", "metrics", page.next)
    assert not again.restarted and len(again.records) == 1
    metrics.unlink()
    assert runs.page("live", "metrics", again.next).restarted


def test_damaged_lines_are_passed_over_and_pages_are_bounded(tmp_path, monkeypatch) -> None:
    runs = reading.Runs(tmp_path)
    monkeypatch.setattr(reading, "PAGE_BYTES", 400)
    place = write_run(tmp_path / "odd", updates(1, 20))
    lines = place.joinpath("metrics.jsonl").read_bytes()
    odd = b'\xff\xfe\n[1]\n{"step": NaN, "loss": 1e999, "text": "\\ud800"}\n' + b"9" * 900 + b"\n"
    place.joinpath("metrics.jsonl").write_bytes(odd + lines)
    after, found, skipped = "0", [], 0
    while True:
        page = runs.page("odd", "metrics", after)
        assert sum(map(len, page.records)) <= 500
        found += [json.loads(record) for record in page.records]
        skipped, after = skipped + page.skipped, page.next
        if not page.more:
            break
    assert found[0] == {"step": None, "loss": None, "text": "\ud800"}
    assert [each["step"] for each in found[1:]] == list(range(1, 20)) and skipped >= 3


def test_odd_runs_are_answered_as_json(tmp_path, serve, tiny_checkpoint) -> None:
    write_run(tmp_path / "odd", [], 'a: .nan\nb: "\\ud800"\n2001-01-01: !!set {x}\nc: [.inf, {1: 2}]\n')
    write_run(tmp_path / "bomb", [], "a: &a [1, 1]\nb: &b [*a, *a]\n")
    (write_run(tmp_path / "text") / "metrics.jsonl").write_text('{"step": 1, "t": "\\ud800", "x": 1e999}\n')
    with serve(tiny_checkpoint("odd"), runs_directory=tmp_path) as served:
        assert served.client.get("/runs/odd").json()["settings"]["c"] == [None, {"1": 2}]
        assert served.client.get("/runs/bomb").json()["settings"] == {}
        assert served.client.get("/runs/text/metrics").json()["records"] == [{"step": 1, "t": "\ud800", "x": None}]
        assert len(served.client.get("/runs").json()["runs"]) == 3


def test_nothing_outside_the_directory_is_read(tmp_path, serve, tiny_checkpoint) -> None:
    outside = write_run(tmp_path / "outside", updates(1, 3))
    (outside / "report.md").write_text("secret")
    folder = tmp_path / "runs"
    run = write_run(folder / "run")
    (folder / "linked").symlink_to(outside)
    (run / "report.md").symlink_to(outside / "report.md")
    (run / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    os.mkfifo(run / "samples.jsonl")
    (run / "best").symlink_to(outside)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "config.yaml").write_text("a: 1\n")
    with serve(tiny_checkpoint("outside"), runs_directory=folder) as served:
        assert [each["name"] for each in served.client.get("/runs").json()["runs"]] == ["run"]
        assert served.client.get("/runs/run/metrics").json()["records"] == []
        assert served.client.get("/runs/run/samples").json()["records"] == []
        for name in ("linked", ".hidden", "..", "%2e%2e", "..%2foutside", "%2fetc", "nothing", "a%00b", "x" * 300):
            answer = served.client.get(f"/runs/{name}/report")
            assert answer.status_code == 404 and answer.json()["error"]["type"] in ("unknown_run", "not_found"), name
        answer = served.client.get("/runs/run/report")
        assert answer.status_code == 404 and "secret" not in answer.text


def test_what_a_query_can_not_mean_is_refused(watched) -> None:
    for query, field in (("after=x", "after"), ("every=0", "every"), ("aftr=3", "aftr")):
        answer = watched.client.get(f"/runs/one/metrics?{query}")
        assert answer.status_code == 422 and answer.json()["error"]["field"] == field, query
    assert watched.client.get("/runs/one/config").status_code in (404, 422)


def test_a_run_says_whether_it_is_going_on(tmp_path) -> None:
    runs = reading.Runs(tmp_path)
    place = write_run(tmp_path / "live", [*updates(1, 6), {"step": 5, "epoch": 0.5, "tokens": 50, "train_loss": 4.0}])
    assert runs.summary("live")["state"] == "stopped"
    note = {"host": platform.node(), "pid": os.getpid(), "started": None}
    (place / ".process.json").write_text(json.dumps(note))
    found = runs.summary("live")
    assert (found["state"], found["step"], found["total_steps"], found["steps_per_epoch"]) == ("running", 5, 20, 10)
    for change in ({"pid": 2**40}, {"pid": -1}, {"pid": None}, {"started": 1.0}):
        (place / ".process.json").write_text(json.dumps(note | change))
        assert runs.summary("live")["state"] == "stopped", change
    (place / "report.md").write_text("# live\n")
    assert runs.summary("live")["state"] == "finished"


def test_what_has_not_changed_is_not_read_again(tmp_path, monkeypatch) -> None:
    runs = reading.Runs(tmp_path)
    place = write_run(tmp_path / "live", updates(1, 6))
    assert runs.summary("live")["step"] == 5
    tail = reading.Runs._tail
    read: list[str] = []
    monkeypatch.setattr(reading.Runs, "_tail", lambda self, *which: read.append(which[1]) or tail(self, *which))
    assert runs.summary("live")["step"] == 5 and read == []
    (place / ".process.json").write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": None}))
    assert runs.summary("live")["state"] == "running" and read == []
    with (place / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(updates(6, 7)[0]) + "\n")
    assert runs.summary("live")["step"] == 6 and read


def test_a_directory_that_was_named_is_there_and_the_usual_one_may_be_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reading.Runs(Settings.read().runs_directory).names() == []
    with pytest.raises(SettingsError, match="--runs-directory: there is no such directory"):
        Settings.read(runs_directory=tmp_path / "nowhere")
