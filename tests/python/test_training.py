"""Runs from Python: the recipe's fields as keywords, what comes back, and what is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

import topkapi

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "context_length": 64, "vocab_size": 300, "batch_size": 4, "sample_tokens": 8,
}  # fmt: skip
RHYME = "Jack and Jill went up the hill to fetch a pail of water. Jack fell down and broke his crown. "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("python-runs")
    (place / "rhyme.txt").write_text(RHYME * 60)
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("hill", "pail", "water", "crown")] * 3
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": "Say hill", "chosen": "hill", "rejected": "pail"}] * 8
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> topkapi.Run:
    return topkapi.pretrain(
        data=place / "rhyme.txt", out=place / "run", cache=place / "cache", max_steps=20, evaluate_every=10,
        learning_rate=0.01, threads=1, generation={"temperature": 0.5}, **SHAPE,
    )  # fmt: skip


def test_a_run_shows_what_it_did(run: topkapi.Run, place: Path) -> None:
    assert run.path == place / "run"
    assert run.config["learning_rate"] == 0.01
    assert run.config["generation"] == ["temperature=0.5"]
    assert run.evaluations.column("step") == [0, 10, 20]
    assert run.evaluations[-1]["validation_loss"] < run.evaluations[0]["validation_loss"]
    assert len(run.metrics.where("loss")) == 20
    assert {"step", "text"} <= set(run.samples.columns)
    assert (run.summary.state, run.summary.steps) == ("finished", 20)
    assert "finished, 20 steps" in repr(run)
    assert "<table>" in run._repr_html_()
    assert "serve" in run.report
    assert run.best.is_dir() and run.last.is_dir()
    assert list(run.checkpoints) == [20]
    assert topkapi.Run.open(str(run.path)).metrics == run.metrics


def test_metrics_are_a_table(run: topkapi.Run) -> None:
    table = run.evaluations
    assert repr(table).splitlines()[0].split() == table.columns
    assert repr(table).endswith("[3 rows]")
    assert table._repr_html_().count("<tr>") == 4
    assert "…" in repr(run.metrics) and "…" in run.metrics._repr_html_(), "the middle of a long one is left out"
    assert list(table.to_pandas().columns) == table.columns
    with pytest.raises(KeyError, match="there are: step"):
        table.column("nothing")


def test_plots_show_in_a_notebook(run: topkapi.Run, tmp_path: Path) -> None:
    backend = matplotlib.get_backend()
    for plot in (run.plot(), run.plot("schedule")):
        assert plot._repr_png_().startswith(b"\x89PNG")
        plot.save(tmp_path / "plot.svg")
        assert "<svg" in (tmp_path / "plot.svg").read_text()
    labels = [text.get_text() for text in run.plot().figure.axes[0].get_legend().get_texts()]
    assert {"training", "validation"} <= set(labels)
    assert matplotlib.get_backend() == backend, "nothing is changed for who draws beside it"


def test_a_run_without_validation_data_is_drawn(place: Path) -> None:
    run = topkapi.pretrain(
        data=place / "rhyme.txt", out=place / "whole", cache=place / "cache", max_steps=2, threads=1,
        validation_fraction=0, **SHAPE,
    )  # fmt: skip
    labels = [text.get_text() for text in run.plot().figure.axes[0].get_legend().get_texts()]
    assert "training" in labels and "validation" not in labels


def test_its_checkpoints_can_be_asked_and_measured(run: topkapi.Run, place: Path) -> None:
    with run.load() as model:
        assert model.defaults["temperature"] == 0.5
        text = model.generate("Jack", max_tokens=5, seed=1)
    with run.load(20) as model:
        assert model.generate("Jack", max_tokens=5, seed=1) == text
    found = topkapi.evaluate(run,
                             perplexity=place / "rhyme.txt", out=place / "figures")  # fmt: skip
    assert found.value("perplexity") > 1
    assert found.table.columns[:6] == ["task", "measure", "items", "checkpoint", "value", "low"]
    assert "perplexity" in str(found) and "<table>" in found._repr_html_()
    assert json.loads((place / "figures" / "evaluation.json").read_text()) == found.as_dict()
    with pytest.raises(KeyError, match="bits per byte"):
        found.value("beauty")


def test_tuning_from_python(run: topkapi.Run, place: Path) -> None:
    tuned = topkapi.finetune(
        checkpoint=run.best, data=[place / "answers.jsonl"], out=place / "tuned", max_steps=2, batch_size=2,
        sample_every="never",
    )  # fmt: skip
    with tuned.load() as model:
        assert model.can_chat
        assert model.chat("Say hill", max_tokens=3).usage.completion_tokens <= 3
    preferred = topkapi.dpo(
        checkpoint=tuned.best, data=place / "pairs.jsonl", out=place / "preferred", max_steps=1, batch_size=2,
        sample_every="never", validation_fraction=0.25,
    )  # fmt: skip
    assert preferred.summary.steps == 1


def test_a_run_goes_on(run: topkapi.Run, place: Path) -> None:
    given: dict[str, Any] = {
        "data": place / "rhyme.txt", "cache": place / "cache", "schedule": "constant", "warmup": 0,
        "evaluate_every": 2, "sample_every": "never", **SHAPE,
    }  # fmt: skip
    begun = topkapi.pretrain(out=place / "longer", max_steps=2, **given)
    longer = topkapi.pretrain(out=place / "longer", resume=True, max_steps=4, **given)
    assert (begun.path, longer.summary.steps) == (longer.path, 4)
    assert topkapi.pretrain(resume=longer.path).summary.steps == 4, "its own recipe says what is left: nothing"


def test_it_trains_on_any_thread_and_gives_the_threads_back(place: Path) -> None:
    before, ended = torch.get_num_threads(), []

    def train() -> None:
        ended.append(
            topkapi.pretrain(data=place / "rhyme.txt", out=place / "aside", cache=place / "cache", max_steps=1,
                             threads=before + 1, sample_every="never", **SHAPE)
        )  # fmt: skip

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    assert ended[0].summary.steps == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "message", "field", "hint"),
    [
        ({"learningrate": 1}, "unknown field 'learningrate'", "learningrate", "did you mean 'learning_rate'?"),
        ({"learning_rate": -1}, "learning_rate must be a number above 0, not -1", "learning_rate", None),
        ({"schedule": "sine"}, "schedule must be", "schedule", None),
        ({"data": "no/such.txt"}, "no such file", "data", None),
        ({"data": []}, "no training text", "data", "give files or folders with `data`"),
        ({"recipe": "no-such"}, "there is no recipe", "recipe", None),
        ({"resume": "no/such", "out": None}, "there is no training run", "resume", None),
        ({"schedule": "constant", "final_learning_rate": 0.5}, "`schedule` constant", "final_learning_rate", None),
    ],
)
def test_what_is_refused_is_named_as_it_is_written_here(
    place: Path, given: dict[str, Any], message: str, field: str, hint: str | None
) -> None:
    call: Any = topkapi.pretrain
    with pytest.raises(topkapi.TopkapiError, match=message) as caught:
        call(**{"data": place / "rhyme.txt", "out": place / "refused", **SHAPE, **given})
    assert caught.value.field == field
    assert hint is None or caught.value.hint == hint
    assert "--" not in f"{caught.value.message} {caught.value.hint}", "there are no flags here"
    assert not (place / "refused").exists()


def test_what_is_no_run_is_refused(place: Path, run: topkapi.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(topkapi.TopkapiError, match="there is no training run in"):
        topkapi.Run.open(place)
    with pytest.raises(topkapi.TopkapiError, match="no checkpoint of step 7 is kept") as caught:
        run.load(7)
    assert caught.value.hint == "there are: 20"
    with pytest.raises(topkapi.TopkapiError, match="nothing to measure"):
        topkapi.evaluate(run)
    with pytest.raises(topkapi.TopkapiError, match="limit must be at least 1") as caught:
        topkapi.evaluate(run, perplexity=place / "rhyme.txt", limit=0)
    assert caught.value.field == "limit"


def test_a_mark_of_a_flag_in_the_users_own_text_stays(tmp_path: Path) -> None:
    with pytest.raises(topkapi.TopkapiError, match=r"there is no checkpoint at .*/a--dtype-x"):
        topkapi.load(tmp_path / "a--dtype-x")
