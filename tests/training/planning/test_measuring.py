"""What a run will take is measured before it starts, and what is wrong with its data is said: each warning provoked."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_config, tiny_model
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main
from topkapi.training.data.inspection import OVERLAP_TOKENS, overlapping_blocks, token_findings
from topkapi.training.data.shards import TokenData
from topkapi.training.optimisation.device import PeakMemory, memory_for_a_run
from topkapi.training.planning import measuring
from topkapi.training.run.console import Console

SMALL = ["--model", "tiny", "--num-layers", "1", "--hidden-size", "32", "--num-heads", "2", "--num-kv-heads", "1",
         "--intermediate-size", "32", "--context-length", "16", "--batch-size", "8", "--vocab-size", "300",
         "--epochs", "1", "--threads", "1", "--sample-tokens", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measuring, "TRIAL_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)


def plan(*arguments: object, command: str = "plan") -> int:
    return main([command, *map(str, arguments), "--cache", "cache"] if "--checkpoint" not in arguments else
                [command, *map(str, arguments)])  # fmt: skip


def documents(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def sentences(english: str, count: int) -> list[str]:
    """Texts of words in any order: those of the manual repeat one another."""
    words = sorted(set(english.split()))
    return [" ".join(random.Random(count + number).choices(words, k=50)) for number in range(count)]


def test_a_plan_counts_what_the_run_will_do(tmp_path: Path, english: str, capsys: Any) -> None:
    data = documents(tmp_path / "a.jsonl", *sentences(english, 40))
    given = ["--data", data, *SMALL, "--sample-every", "never", "--evaluate-every", "10", "--micro-batch-size", "4"]
    assert plan(*given, "--price-per-hour", 3600, "--watts", 1000, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "runs").exists(), "nothing is left behind"
    assert plan(*given, "--out", "real", command="pretrain") == 0
    metrics = [json.loads(line) for line in (tmp_path / "real" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in metrics if "loss" in record]
    assert found["steps"] == len(steps) and found["tokens"] == steps[-1]["tokens"] == len(steps) * 8 * 16
    details = json.loads((tmp_path / "real" / "best" / "topkapi.json").read_text())
    assert found["parameters"] == found["trained_parameters"] == details["parameters"]
    assert found["update_seconds"] == pytest.approx(found["steps"] * found["step_seconds"])
    parts = [found[f"{name}_seconds"] for name in ("update", "evaluation", "sample", "save")]
    assert found["cost"] == pytest.approx(found["seconds"]) == pytest.approx(sum(parts))
    assert found["kilowatt_hours"] == pytest.approx(found["seconds"] / 3600)
    assert found["sample_seconds"] == 0 < min(parts[0], parts[1], parts[3])
    assert [probe["micro_batch_size"] for probe in found["probes"]] == [1, 2, 4, 8]
    assert all(probe["fits"] for probe in found["probes"]) and found["findings"] == []


@pytest.mark.slow
def test_a_run_takes_as_long_as_planned(
    tmp_path: Path, english: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of two and a half, for this machine may have other things to do in between."""
    monkeypatch.setattr(measuring, "TRIAL_SECONDS", 5.0)
    data = documents(tmp_path / "a.jsonl", *sentences(english, 400))
    given = ["--data", data, "--model", "tiny", "--context-length", "64", "--batch-size", "8", "--threads", "1",
             "--max-steps", "150"]  # fmt: skip
    assert plan(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert plan(*given, "--out", "real", command="pretrain") == 0
    timings = [json.loads(line) for line in (tmp_path / "real" / "timings.jsonl").read_text().splitlines()]
    assert 0.4 < found["seconds"] / timings[-1]["seconds"] < 2.5


def test_the_largest_micro_batch_is_the_largest_that_fits(tmp_path: Path, english: str, capsys: Any) -> None:
    data = documents(tmp_path / "a.jsonl", *sentences(english, 40))
    assert plan("--data", data, *SMALL, "--memory", 0.01) == 1
    out = capsys.readouterr().out
    assert "this run does not fit into memory, not even by one row at a time" in out and "does not fit" in out
    assert plan("--data", data, *SMALL, "--memory", 0.01, "--json") == 1
    capsys.readouterr()
    assert plan("--data", data, *SMALL) == 0
    out = capsys.readouterr().out
    assert "the largest that fits is 8" in out
    assert out.count("FLOPs") == 1 and "update" not in out, "one number, and steps are called steps"
    (steps,) = re.findall(r"^([\d,]+) steps of", out, re.MULTILINE)
    assert re.search(rf"^steps +{steps} of ", out, re.MULTILINE) and "s per step" in out


def test_the_peak_of_memory_is_seen() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.bytes()
    taken = np.ones(30_000_000)
    assert memory.bytes() - before > 0.8 * taken.nbytes
    assert taken.nbytes < memory_for_a_run(torch.device("cpu")) < 1e14


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_flops_are_those_of_the_matrices(family: Any) -> None:
    """Counted by PyTorch, forwards and backwards, over every token of a window."""
    from torch.utils.flop_counter import FlopCounterMode

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **sight: Any) -> torch.Tensor:
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    model = tiny_model(family).requires_grad_(True)
    tokens = torch.ones(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(32).expand_as(tokens), attend).sum().backward()
    expected = measuring.flops_per_token(tiny_config(family), 1.0, 32) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)


def test_a_plan_for_instructions(tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"Say {number}", "completion": f"{number} " * (number % 5 + 1)} for number in range(22)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    checkpoint = tiny_checkpoint("planned", context=64)
    assert plan("--checkpoint", checkpoint, "--data", "rows.json", "--batch-size", "4", "--sample-tokens", "2") == 0
    out = capsys.readouterr().out
    assert "nothing is wrong with the data" in out and "10 of 4" in out


def test_a_plan_for_preferences(tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Its settings may be those of instructions as well, so the command is named; `--beta` would tell it, too."""
    rows = [{"prompt": f"Say {number}", "chosen": "yes", "rejected": "no"} for number in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    given = ["--checkpoint", tiny_checkpoint("preferring", context=64), "--data", "rows.json", "--batch-size", "2",
             "--sample-every", "never", "--validation-fraction", "0.2", "--json"]  # fmt: skip
    assert plan(*given, "--run", "dpo") == plan(*given, "--beta", "0.2") == 0
    assert '"steps": 4' in capsys.readouterr().out


def test_what_a_plan_is_for_is_told_where_a_setting_decided_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    """Rows of instructions are no text, and only `--cache` says that they were meant as such."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Say a", "completion": "a"}) + "\n")
    given = ["plan", "--checkpoint", str(tiny_checkpoint("asked")), "--data", "rows.jsonl"]
    assert main([*given, "--cache", "cache"]) == 2
    assert "--cache made this a plan for pretrain: leave it out for one for finetune" in capsys.readouterr().err
    assert main([*given, "--cache", "cache", "--run", "pretrain"]) == 2
    assert "made this" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan"], ["finetune", "--out", "run"]])
def test_preferences_where_answers_are_needed(
    command: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "Say a", "chosen": "yes", "rejected": "no"}]))
    assert main([*command, "--checkpoint", str(tiny_checkpoint("asked")), "--data", "rows.json"]) == 2
    error = capsys.readouterr().err
    assert "rows.json, row 1: a preference" in error and "topkapi dpo" in error and "plan: --run dpo" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x", "--vocab-size", "300"], "--vocab-size is the checkpoint's own"),
        (["--checkpoint", "x", "--vocab-size", "300", "--run", "finetune"], "--vocab-size does not apply to finetune"),
        (["--checkpoint", "x", "--cache", "y", "--method", "lora"], "or --method: no command takes both"),
        (["--cache", "y", "--beta", "1"], "--beta does not apply to pretrain"),
        (["--data", "x.txt", "--parallel", "fsdp"], "--parallel does not apply"),
        (["--price-per-hour", "0"], "--price-per-hour must be greater than 0"),
        (["--memory", "-1"], "--memory must be greater than 0"),
        (["--batch-size", "0"], "--batch-size must be a whole number of at least 1, not '0'"),
        (["no-recipe"], "there is no recipe no-recipe"),
        ([], "no training text"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def warnings(out: str) -> list[str]:
    return [line.removeprefix("warning: ") for line in out.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda texts: texts, None),
        (lambda texts: [*texts[:30], *texts[:3]], "training documents repeat an earlier one: --deduplicate"),
        (lambda texts: [*texts[:29], f"bad \x07 and {texts[29]}"], "1 tokens hold control characters or U+FFFD"),
        (lambda texts: [*texts[:29], f"bad \ufffd and {texts[29]}"], None),
    ],
)
def test_repeated_and_binary_documents(
    change: Callable[[list[str]], list[str]], expected: str | None, tmp_path: Path, english: str, capsys: Any
) -> None:
    """U+FFFD falls apart into bytes in a vocabulary of 300: too rare to have a token, it is no finding."""
    texts = change(sentences(english, 33))
    data = documents(tmp_path / "a.jsonl", *texts)
    assert plan("--data", data, *SMALL, "--max-steps", "1", command="pretrain") == 0
    found = warnings(capsys.readouterr().out)
    assert (expected is None and found == []) or (len(found) == 1 and (expected or "-") in found[0])


def test_a_text_cut_in_two_trains_no_end(tmp_path: Path, english: str, capsys: Any) -> None:
    (tmp_path / "one.txt").write_text("\n".join(sentences(english, 60)))
    assert plan("--data", "one.txt", *SMALL, "--max-steps", "1", command="pretrain") == 0
    (found,) = warnings(capsys.readouterr().out)
    assert found.startswith("no end token is trained")


def test_validation_that_is_also_trained_is_said(tmp_path: Path, english: str, capsys: Any) -> None:
    texts = sentences(english, 30)
    train = documents(tmp_path / "train.jsonl", *texts)
    same = documents(tmp_path / "same.jsonl", texts[3], "another text that is in no other file")
    parts = documents(tmp_path / "parts.jsonl", f"New. {texts[4]}", *sentences(english, 3))
    given = ["--data", train, *SMALL, "--max-steps", "1", "--overwrite", "--validation-data"]
    assert plan(*given, same, command="pretrain") == 0
    assert warnings(capsys.readouterr().out)[0].startswith("1 of 2 validation documents also occur in training")
    assert plan(*given, parts, command="pretrain") == 0
    assert "% of the validation text also occurs in training" in warnings(capsys.readouterr().out)[0]


def test_overlapping_blocks_are_counted_exactly() -> None:
    drawn = np.random.default_rng(0)
    train = drawn.integers(0, 50, 5000).astype(np.uint16)
    validation = drawn.integers(0, 50, 10 * OVERLAP_TOKENS + 7).astype(np.uint16)
    validation[3 * OVERLAP_TOKENS : 4 * OVERLAP_TOKENS] = train[1001 : 1001 + OVERLAP_TOKENS]
    validation[8 * OVERLAP_TOKENS : 9 * OVERLAP_TOKENS] = train[-OVERLAP_TOKENS:]
    validation[5 * OVERLAP_TOKENS : 6 * OVERLAP_TOKENS - 1] = train[2000 : 2000 + OVERLAP_TOKENS - 1]
    assert overlapping_blocks(train, validation) == (10, 2)
    assert overlapping_blocks(train[:20], validation) == (10, 0)
    assert overlapping_blocks(train, validation[:31]) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"stride": 20}, ["a stride of 20 after windows of 16 tokens: 4 of every 20 tokens are never trained"]),
        ({"batch_size": 40}, ["each epoch leaves out 22 of 62 windows"]),
    ],
)
def test_what_is_never_or_not_always_trained_is_said(
    settings: dict[str, int], expected: list[str], tiny_tokenizer: Tokenizer
) -> None:
    stream = np.random.default_rng(0).integers(300, 500, 1000).astype(np.uint16)
    stream[99::100] = tiny_tokenizer.end_token_id
    starts, none = np.arange(0, 1000, 100), np.empty(0, np.int64)
    data = TokenData(stream, stream[:0], starts, none, {})
    found = token_findings(data, tiny_tokenizer, **{"context": 16, "stride": 16, "batch_size": 2} | settings)
    assert len(found) == len(expected)
    assert all(finding.startswith(start) for finding, start in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[:16], None),
        (lambda rows: [*rows[:14], *rows[:2]], "2 of 16 training examples repeat an earlier one"),
        (lambda rows: [*rows[:15], {"prompt": "What\x01?", "completion": "a"}], "1 examples hold control characters"),
        (lambda rows: [*rows[:15], {"prompt": "What?", "completion": "\ufffd"}], "1 examples hold control characters"),
        (lambda rows: rows[:19], "each epoch leaves out 3 of 19 examples"),
        (
            lambda rows: [*rows[:16], {"prompt": "a " * 99, "completion": "a"}],
            "left out 1 examples longer than 64 tokens",
        ),
    ],
)
def test_findings_in_instructions(
    change: Callable[[list[dict[str, str]]], list[dict[str, str]]],
    expected: str | None,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
) -> None:
    rows = change([{"prompt": f"Say {number}", "completion": "yes"} for number in range(20)])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "held.json").write_text(json.dumps([{"prompt": "Other", "completion": "no"}]))
    given = ["--checkpoint", tiny_checkpoint("warned", context=64), "--data", "rows.json", "--batch-size", "4",
             "--max-steps", "1", "--sample-every", "never", "--validation-data", "held.json",
             "--on-overlong", "drop"]  # fmt: skip
    assert plan(*given, command="finetune") == 0
    found = warnings(capsys.readouterr().out)
    assert (expected is None and found == []) or (len(found) == 1 and found[0].startswith(expected or "-"))


def test_prompts_held_out_and_trained_are_said(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    rows = [{"prompt": f"Say {number}", "completion": "yes"} for number in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "held.json").write_text(json.dumps([*rows[:2], {"prompt": "Other", "completion": "no"}]))
    given = ["--checkpoint", tiny_checkpoint("overlapping", context=64), "--data", "rows.json", "--batch-size", "4",
             "--max-steps", "1", "--sample-every", "never", "--validation-data", "held.json"]  # fmt: skip
    assert plan(*given, command="finetune") == 0
    assert warnings(capsys.readouterr().out) == ["2 of 3 validation prompts also occur in training"]


def test_warnings_are_lines_of_their_own(capsys: Any, tiny_tokenizer: Tokenizer) -> None:
    Console().warn(["one", "two"])
    assert capsys.readouterr().out == "warning: one\nwarning: two\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what other systems do with freed memory is not asked")
def test_freed_memory_is_kept_until_a_peak_is_measured_anew() -> None:
    code = """
import torch
from topkapi.training.optimisation.device import PeakMemory, keep_freed_memory, _status
def taken_by(size):
    before = _status("VmRSS")
    block = torch.ones(size << 18)
    del block
    return (_status("VmRSS") - before) >> 20
first = taken_by(400)
keep_freed_memory()
second = taken_by(400)
again = taken_by(300)
peak = PeakMemory(torch.device("cpu"))
before = _status("VmRSS")
peak.reset()
print(first, second, again, (before - _status("VmRSS")) >> 20, (peak.bytes() - _status("VmRSS")) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, again, given_back, peak = map(int, done.stdout.split())
    assert first < 50 and second > 350 and again < 50, "given back at once, then kept, then taken again"
    assert given_back > 350 and peak < 50
