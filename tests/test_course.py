"""The course page: its commands run as printed, and its figures are what they give."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.test_readme import ROOT, run, serving
from topkapi.service.commands.cli import build_parser
from topkapi.training.planning.estimating import PUBLISHED
from topkapi.training.recipes.arguments import read_arguments, read_yaml, resolve_recipe

PAGE = (ROOT / "docs" / "course.md").read_text()
STORY, TUNE, PLAN, SERVE = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

# The validation loss that the book prints at its steps. Seeds and processors differ by as much as 0.35 from it
# (docs/training.md has three of each).
PUBLISHED_COURSE = {10: 7.048, 20: 6.600, 30: 6.278, 40: 6.160, 55: 6.134, 70: 6.242, 85: 6.452}


def figures(row: str) -> list[float]:
    """The numbers of our column in the last row of that name in the page's tables."""
    line = re.findall(rf"^\| {re.escape(row)} \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE)[-1]
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,.]*\d|\d", line)]


def evaluations(directory: Path) -> list[dict]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "validation_loss" in record]


def test_the_commands_are_commands_and_the_books_figures_are_its_settings() -> None:
    parser = build_parser()
    for line in (STORY + TUNE + PLAN + SERVE).splitlines():
        arguments = parser.parse_args(shlex.split(line)[1:])
        if hasattr(arguments, "training_kind"):
            read_arguments(arguments)
    recipe = read_yaml(resolve_recipe("instruction-1100"))
    assert f"| {recipe['train_examples']}, 55, {recipe['test_examples']} |" in PAGE
    assert 935 // recipe["batch_size"] * recipe["epochs"] == 232
    run = PUBLISHED["llama-2-7b"]
    assert f"| {run.gpu_hours:,} | {run.gpu_hours:,} |" in PAGE and f"{run.gpu_hours / 8 * 30:,.0f}" in PAGE


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_course_runs_as_printed(tmp_path: Path, data_directory: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    shutil.copy(data_directory / "small" / "the-verdict.txt", tmp_path)
    shutil.copy(data_directory / "instruct" / "rasbt-instruction-data.json", tmp_path / "instruction-data.json")
    told = run(STORY, tmp_path, timeout=3000, HOME=str(tmp_path))
    course = evaluations(tmp_path / "runs" / "verdict")
    before = course[0]
    assert [before["train_loss"], before["validation_loss"]] == pytest.approx([10.989, 10.981], abs=0.05)
    assert course[-1]["step"] == 90 and course[-1]["train_loss"] < 1.5
    losses = {record["step"]: record["validation_loss"] for record in course}
    assert {step: losses[step] for step in PUBLISHED_COURSE} == pytest.approx(PUBLISHED_COURSE, abs=0.4)
    best = min(losses.values())
    assert best == pytest.approx(6.14, abs=0.1)
    assert "162,419,712 parameters" in told and "overfitting since" in told

    answered = run(TUNE, tmp_path, timeout=1500, HOME=str(tmp_path))
    course = evaluations(tmp_path / "runs" / "tuned")
    assert "935 training examples, 55 for validation; 232 steps" in answered and "exact match" in answered
    before, end = figures("loss before the first step, training / validation"), figures("at the end")
    for record, numbers in ((course[0], before), (course[-1], end)):
        assert [record["train_loss"], record["validation_loss"]] == pytest.approx(numbers, rel=0.1)

    planned = run(PLAN, tmp_path)
    assert "184,320 A100 hours" in planned and "691,200 at 30 an hour of 8" in planned
    with serving(tmp_path / shlex.split(SERVE)[2]) as port:
        assert port
