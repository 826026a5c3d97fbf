"""The Runs tab in a real browser: a run that trains meanwhile, several over one another, texts that stay texts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)

EPOCH = 40
HOSTILE = "<img src=x onerror=\"document.title='taken'\"> \u202eevil\u202c <b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched") / "runs"


@pytest.fixture(scope="module")
def training(folder: Path, english: str) -> Iterator[subprocess.Popen]:
    """A run of `topkapi pretrain`, `live`, that goes on until it is told to stop."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "text.txt").write_text(english[:20_000], encoding="utf-8")
    flags = "--model tiny --hidden-size 32 --intermediate-size 64 --num-layers 1 --context-length 32 --threads 1"
    flags += " --batch-size 4 --max-steps 1000000 --evaluate-every 50 --sample-tokens 4 --schedule constant"
    paths = ["--data", folder.parent / "text.txt", "--cache", folder.parent / "cache", "--out", folder / "live"]
    command = "import sys; from topkapi.service.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "pretrain", *map(str, paths), *flags.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def studio(training, serve: Callable, tiny_checkpoint: Callable[..., Path], folder: Path) -> Iterator:
    with serve(tiny_checkpoint("talker"), studio=True, runs_directory=folder, model_directory=folder) as running:
        yield running


def write_run(place: Path, name: str, rate: float, drop: float = 0.0) -> None:
    """A finished run of three epochs whose loss falls, and steps down by `drop` at each epoch's end."""
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(f"learning_rate: {rate}\nbatch_size: 4\nepochs: 3.0\ndata:\n- '{name}.txt'\n")
    lines: list[dict[str, object]] = [{"step": 0, "epoch": 0.0, "tokens": 0, "train_loss": 6.0, "validation_loss": 6.0}]
    for step in range(1, 3 * EPOCH + 1):
        loss = 6 - step * rate - drop * ((step - 1) // EPOCH) + 0.01 * (step % 3)
        lines.append({"step": step, "tokens": 10 * step, "loss": loss, "learning_rate": rate, "gradient_norm": 1.0})
        if step == 70 and name == "steady":
            lines[-1]["loss"] = float("nan")
        if step % 20 == 0:
            held = {"train_loss": loss, "validation_loss": 5 + 0.01 * step}
            lines.append({"step": step, "epoch": step / EPOCH, "tokens": 10 * step, **held})
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [
        {"step": step, "prompt": HOSTILE, "text": f"{HOSTILE} {step}", "copied_from_training": 30} for step in (20, 40)
    ]
    (place / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (place / "report.md").write_text(f"# {name}\n\n{HOSTILE}\n")


@pytest.fixture(scope="module")
def finished(serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path_factory) -> Iterator:
    place = tmp_path_factory.mktemp("finished") / "runs"
    write_run(place / "steady", "steady", 0.002)
    write_run(place / "memorising", "memorising", 0.001, drop=0.4)
    with serve(tiny_checkpoint("talker"), studio=True, runs_directory=place) as running:
        yield running


def chosen(page, name: str) -> None:
    """Look at this run alone."""
    page.get_by_role("checkbox", name=name).check()
    for other in {"steady", "memorising"} - {name}:
        page.get_by_role("checkbox", name=other).uncheck()
    page.locator(".runs-heading h2", has_text=name).wait_for()


@pytest.mark.slow
def test_a_run_is_watched_while_it_trains_stopped_and_loaded(browser, visiting, studio, training) -> None:
    with visiting(browser, f"{studio.url}/#runs", wait=".runs-list .state.running") as page:
        page.locator(".runs-heading h2", has_text="live").wait_for()
        page.wait_for_function("document.querySelector('.chart.large path.chart-line')?.getAttribute('d')?.length > 50")

        step = "Number(document.querySelector('.runs-heading .note')?.textContent.split(' ')[1].replace(/,/g, '') ?? 0)"
        before = page.evaluate(step)
        drawn = page.get_attribute(".chart.large path.chart-line:not(.faint)", "d")
        page.wait_for_function(f"before => {step} > before", arg=before)
        page.wait_for_function(
            "drawn => document.querySelector('.chart.large path.chart-line:not(.faint)').getAttribute('d') !== drawn",
            arg=drawn,
        )
        for title in ("Loss", "Perplexity", "Learning rate", "Gradient norm", "Processor", "Memory"):
            assert page.locator(".chart figcaption", has_text=title).first.is_visible()
        page.locator(".runs-samples li").first.wait_for()

        training.send_signal(signal.SIGINT)
        page.locator(".runs-heading .state.stopped").wait_for()
        page.get_by_role("button", name="the best checkpoint").click()
        page.locator(".runs-checkpoints", has_text="loaded as live-step-").wait_for()
        assert any(name.startswith("live-step-") for name in studio.models.names)
        assert training.wait(30) == 0 or training.returncode == 2


@pytest.mark.slow
def test_steps_down_at_epochs_are_named_as_memorisation(browser, visiting, finished) -> None:
    with visiting(browser, f"{finished.url}/#runs", wait=".runs-list input") as page:
        chosen(page, "memorising")
        found = page.locator(".runs-findings li", has_text="Memorisation")
        found.first.wait_for()
        assert found.count() == 2 and "−0.40 at the end of epoch 1 (step 40)" in found.first.inner_text()
        assert page.locator(".chart-mark.drop").count() >= 2
        assert "Overfitting since" in page.inner_text(".runs-findings")
        chosen(page, "steady")
        assert page.locator(".runs-findings li", has_text="Memorisation").count() == 0
        assert page.locator(".chart.large .chart-mark.epoch").count() == 3
        assert "One step has a loss that is no number, the last one step 70" in page.inner_text(".runs-findings")


@pytest.mark.slow
def test_runs_are_laid_over_one_another_with_what_differs(browser, visiting, finished) -> None:
    with visiting(browser, f"{finished.url}/#runs", wait=".runs-list input") as page:
        page.get_by_role("checkbox", name="steady").check()
        page.get_by_role("checkbox", name="memorising").check()
        page.locator(".runs-heading", has_text="2 runs").wait_for()
        legend = page.locator(".chart.large .chart-legend button")
        assert {text.strip() for text in legend.all_inner_texts()} >= {"steady", "memorising"}
        rows = page.locator(".runs-settings tbody th").all_inner_texts()
        assert rows == ["learning_rate", "data"]
        curves = page.locator(".chart.large path.chart-line").count()
        legend.first.click()
        page.wait_for_function("n => document.querySelectorAll('.chart.large path.chart-line').length < n", arg=curves)


@pytest.mark.slow
def test_values_are_read_by_keyboard_and_axes_change(browser, visiting, finished) -> None:
    with visiting(browser, f"{finished.url}/#runs", wait=".runs-list input") as page:
        chosen(page, "steady")
        plot = page.locator(".chart.large .chart-plot")
        plot.focus()
        page.keyboard.press("End")
        readout = page.locator(".chart.large .chart-readout")
        assert readout.inner_text().startswith("step 120") and "validation 6.2" in readout.inner_text()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert "step 118" in readout.inner_text()
        page.get_by_label("Across").select_option("epoch")
        page.wait_for_function("document.querySelector('.chart.large .chart-axes').textContent.includes('epoch')")
        assert "by epoch" in plot.get_attribute("aria-label")


@pytest.mark.slow
def test_what_a_run_says_is_shown_as_text(browser, visiting, finished) -> None:
    with visiting(browser, f"{finished.url}/#runs", wait=".runs-list input") as page:
        chosen(page, "steady")
        sample = page.locator(".runs-samples li").first
        sample.wait_for()
        assert "<img src=x onerror=" in sample.inner_text() and "\\u202e" in sample.inner_text()
        assert "\u202e" not in page.inner_text("#tab-runs")
        page.locator("summary", has_text="Report").click()
        page.locator(".runs-report", has_text="<img src=x").wait_for()
        assert page.title() == "Topkapi" and page.locator("#tab-runs img").count() == 0


@pytest.mark.slow
def test_nothing_sticks_out_on_a_phone(browser, visiting, finished) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    with visiting(browser, f"{finished.url}/#runs", wait=".runs-side", **phone) as page:
        page.locator(".chart.large .chart-plot svg").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not page.locator(".runs-list input").first.is_visible(), "the list is folded"
        page.locator(".runs-side summary").click()
        assert page.locator(".runs-list input").first.is_visible()


@pytest.mark.slow
def test_without_runs_it_says_how_there_come_some(browser, visiting, serve, tiny_checkpoint, tmp_path) -> None:
    with (
        serve(tiny_checkpoint("talker"), studio=True, runs_directory=tmp_path) as running,
        visiting(browser, f"{running.url}/#runs", wait=".runs-none") as page,
    ):
        page.locator("text=topkapi pretrain").wait_for()
