"""Copies of the training text in what a model writes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkapi.service.commands.cli import main
from topkapi.training.data.windows import joined
from topkapi.training.monitoring import samples
from topkapi.training.monitoring.samples import longest_copy, memorises


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=60))
def test_the_longest_passage_is_found(sample: list[int], text: list[int]) -> None:
    found = longest_copy(sample, np.array(text, dtype=np.uint16))
    lengths = [
        size
        for start in range(len(sample))
        for size in range(samples.SHORTEST, len(sample) - start + 1)
        if any(text[at : at + size] == sample[start : start + size] for at in range(len(text) - size + 1))
    ]
    assert found.length == max(lengths, default=0)
    passage = sample[found.start : found.start + found.length]
    assert text[found.position : found.position + found.length] == passage


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_across_the_seams_of_a_long_text(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_CHUNK", 64)
    chance = random.Random(1)
    text = np.array([chance.randrange(60_000) for _ in range(1000)], dtype=dtype)
    for start in range(40, 400, 13):
        sample = [5, 6, 7, *text[start : start + 20].tolist(), 8, 9]
        found = longest_copy(sample, text)
        assert (found.length, found.start, found.position) == (20, 3, start)


def test_no_passage_runs_on_from_one_text_into_the_next() -> None:
    text = joined([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert longest_copy([3, 4, 5, 6, 7, 8], text).length == 0
    assert longest_copy([6, 7, 8, 9], text).length == 4


def test_text_that_everybody_writes_is_not_memorised() -> None:
    assert memorises(16, 8) and memorises(60, 0)
    assert not memorises(15, 0) and not memorises(30, 16)


def test_a_run_that_learns_by_heart_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], english: str) -> None:
    (tmp_path / "text.txt").write_text(english[:400], encoding="utf-8")
    (tmp_path / "other.txt").write_text(english[300_000:302_000], encoding="utf-8")
    flags = "--model tiny --num-layers 2 --hidden-size 64 --intermediate-size 128 --context-length 48 --stride 8"
    flags += " --batch-size 8 --vocab-size 300 --threads 1 --max-steps 90"
    flags += " --learning-rate 0.01 --evaluate-every 45 --sample-temperature 0 --sample-tokens 40"
    data = ["--data", str(tmp_path / "text.txt"), "--validation-data", str(tmp_path / "other.txt")]
    prompt = ["--sample-prompts", english[:12], "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    assert main(["pretrain", *data, *flags.split(), *prompt]) == 0
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    copies = [record for record in records if "copied_from_training" in record]
    assert [record["step"] for record in copies] == [0, 45, 90]
    assert copies[0]["copied_from_training"] < 10 < 30 < copies[-1]["copied_from_training"]
    assert copies[-1]["copied_from_validation"] < 16
    assert printed.count("memorising: a sample repeats") == 1
    assert f"longest copy: {copies[-1]['copied_from_training']} tokens of the training text" in printed
