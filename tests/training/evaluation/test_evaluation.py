"""Evaluation: likelihoods equal transformers', tasks read their rows, differences show what chance makes of them."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.test_scoring import transformers_model
from tests.tiny import tiny_model
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.service.commands.cli import main
from topkapi.training.evaluation import report
from topkapi.training.evaluation.likelihood import Scored, log_likelihoods
from topkapi.training.evaluation.measures import EXACT_ITEMS, Measure, difference, exact_chance, interval, mean

BASE, CHOICES = [5, 9, 2, 44, 7, 7, 31], [[3], [8, 1, 9], [8, 2], [3, 3, 3, 3, 3, 3, 90]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_likelihoods_equal_transformers_whatever_is_read_together(family: str) -> None:
    """Choices after one prompt, texts that begin alike, one that is another's beginning, and texts of other lengths."""
    choices = [Scored([*BASE, *choice], len(BASE)) for choice in CHOICES]
    pair = [Scored([4, 8, 15, 16, 23]), Scored([4, 8, 42, 16, 23, 5])]
    nested = [Scored([4, 8, 15]), Scored([4, 8, 15, 16, 23], 2), Scored([4, 8])]
    groups = [choices, pair, nested, [Scored([60, 61])], [Scored(list(range(1, 66)), 30)]]
    reference = transformers_model(family)
    for group, found in zip(groups, log_likelihoods(tiny_model(family), groups), strict=True):
        for scored, likelihood in zip(group, found, strict=True):
            ids = torch.tensor([scored.token_ids])
            with torch.no_grad():
                logprobs = reference(ids[:, :-1]).logits[0].double().log_softmax(-1)
            wanted = ids[0, scored.first :]
            states = logprobs[scored.first - 1 :]
            expected = states.gather(1, wanted.unsqueeze(1)).squeeze(1)
            assert likelihood.logprobs == pytest.approx(expected.tolist(), abs=2e-4)
            assert likelihood.greedy == bool((states.argmax(-1) == wanted).all())


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        found = interval(mean("accuracy", (torch.rand(150, generator=random) < 0.3).tolist()))
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.3 <= found.high
    assert covered >= 52


def test_a_paired_difference_is_narrower_than_the_two_intervals() -> None:
    """Two models that err on nearly the same items differ with certainty, though their intervals overlap."""
    easy = [index % 2 == 0 for index in range(200)]
    better = [right or index in range(1, 20, 2) for index, right in enumerate(easy)]
    first, second = interval(mean("accuracy", easy)), interval(mean("accuracy", better))
    assert second.low < first.high, "the intervals overlap"
    paired = difference(first, second)
    assert paired.value == pytest.approx(0.05) and paired.low > 0
    assert difference(first, first).high == 0 == difference(first, first).low


@pytest.mark.parametrize("items", [2, 10, 100, 10_200])
def test_a_share_of_all_or_none_has_the_interval_of_wilson(items: int) -> None:
    """Resampled, all wrong stays all wrong, which says nothing of others."""
    from scipy.stats import binomtest

    for right in (False, True):
        found = interval(mean("accuracy", [right] * items, unit="%"))
        wanted = binomtest(items * right, items).proportion_ci(method="wilson")
        assert (found.low, found.value, found.high) == pytest.approx((wanted.low, float(right), wanted.high), abs=1e-12)
    # Newcombe 1998, table I: none of 20 (the score method) 0 to 0.1611.
    assert interval(mean("accuracy", [False] * 20, unit="%")).high == pytest.approx(0.1611, abs=5e-5)
    # What is no share can be anything, and items that take no part say nothing.
    assert interval(mean("tokens per answer", [0] * items)).high == 0
    assert interval(mean("accuracy", [False] * 20 + [None] * items, unit="%")).high == pytest.approx(0.1611, abs=5e-5)


def test_a_difference_that_is_the_same_on_every_item_is_not_certain() -> None:
    none, all_ = (interval(mean("accuracy", [right] * 20, unit="%")) for right in (False, True))
    same, more, less = difference(none, none), difference(none, all_), difference(all_, none)
    assert (same.low, same.high) == pytest.approx((-0.1611, 0.1611), abs=5e-5)
    assert (more.value, more.low, more.high) == pytest.approx((1, 1 - 2 * 0.1611, 1), abs=1e-4)
    assert (less.value, less.low, less.high) == pytest.approx((-1, -1, -1 + 2 * 0.1611), abs=1e-4)
    half = interval(mean("accuracy", [index % 2 == 0 for index in range(20)], unit="%"))
    assert (difference(half, half).low, difference(half, half).high) == pytest.approx((-0.1611, 0.1611), abs=5e-5)


def test_a_single_item_has_no_interval_and_no_star(checkpoints: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "short.txt").write_text("One short text.")
    assert evaluate(*checkpoints[:2], "--perplexity", tmp_path / "short.txt", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and " to " not in printed and "*" not in printed
    tasks = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    for measure in tasks[0]["measures"]:
        for value in (*measure["values"].values(), *measure[f"differences from {checkpoints[0]}"].values()):
            assert value["value"] is not None and value["low"] is None and value["high"] is None


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    measure = Measure(
        "perplexity", *map(torch.Tensor.numpy, torch.tensor([[2.0, 30.0], [1.0, 99.0]]).double()), exponential=True
    )
    assert measure.value == pytest.approx(math.exp(32 / 100))
    assert mean("x", [None, 1.0, 0.0]).value == 0.5 and mean("x", [None, 1.0, 0.0]).items == 2


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Callable[..., Path]) -> list[str]:
    return [str(tiny_checkpoint("first", seed=5)), str(tiny_checkpoint("second", seed=6))]


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score(checkpoint: str, prompt: str, completion: str) -> float:
    """The log-probability of `completion` by a plain pass over all of it."""
    loaded = load_checkpoint(checkpoint, dtype=torch.float32)
    encode = loaded.tokenizer.encode
    ids, start = [loaded.tokenizer.end_token_id, *encode(prompt + completion)], 1 + len(encode(prompt))
    logprobs = loaded.model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))[0].log_softmax(-1)
    return sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def results(out: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The measures by `task/measure`, and the items."""
    content = json.loads((out / "evaluation.json").read_text())
    measures = {f"{task['name']}/{one['measure']}": one for task in content["tasks"] for one in task["measures"]}
    return measures, [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


def test_every_kind_is_measured_and_compared(checkpoints: list[str], tmp_path: Path, english: str, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text(english[:9000])
    words = [{"context": f"The value of the {name} is the", "continuation": name} for name in ("class", "name", "list")]
    pairs = [
        {"sentence_good": f"The {noun} is here.", "sentence_bad": f"The {noun} are here."} for noun in ("cat", "sun")
    ]
    questions = [
        {"query": "A statement that imports is", "choices": ["import", "def", "an expression list"], "gold": 0},
        {"context_options": ["A function", "A class"], "continuation": "returns a value", "gold": 0},
    ]
    out = tmp_path / "out"
    code = evaluate(
        *checkpoints,
        "--perplexity", tmp_path / "text.txt",
        "--lambada", write_rows(tmp_path / "words.jsonl", *words),
        "--blimp", Path(write_rows(tmp_path / "pairs" / "one.jsonl", *pairs)).parent,
        "--choices", write_rows(tmp_path / "questions.jsonl", *questions),
        "--out", out,
    )  # fmt: skip
    assert code == 0
    measures, items = results(out)
    first, second = checkpoints
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"text", "words", "pairs", "questions"}
    for name, one in measures.items():
        low, value, high = (one["values"][first][key] for key in ("low", "value", "high"))
        assert low <= value <= high, name
        paired = one[f"differences from {first}"][second]
        assert paired["value"] == pytest.approx(one["values"][second]["value"] - value)
    rows = [item for item in items if item["task"] == "questions" and item["checkpoint"] == second]
    expected = [score(second, "A statement that imports is", f" {choice}") for choice in questions[0]["choices"]]
    assert rows[0]["logprobs"] == pytest.approx(expected, abs=1e-3)
    expected = [score(second, prompt, " returns a value") for prompt in questions[1]["context_options"]]
    assert rows[1]["logprobs"] == pytest.approx(expected, abs=1e-3)
    ruled = [item["logprob"] for item in items if item["task"] == "words" and item["checkpoint"] == first]
    assert ruled == pytest.approx([score(first, row["context"], f" {row['continuation']}") for row in words], abs=1e-3)
    value = measures["words/perplexity of the word"]["values"][first]["value"]
    assert value == pytest.approx(math.exp(-sum(ruled) / 3), rel=1e-3)
    (text,) = {item["bytes"] for item in items if item["task"] == "text" and item["item"] == 0}
    assert text == pytest.approx(4096, abs=30), "a long text is resampled in parts"


def test_bits_per_byte_count_every_byte_once(checkpoints: list[str], tmp_path: Path, english: str) -> None:
    short = english[:150]
    (tmp_path / "short.txt").write_text(short)
    evaluate(checkpoints[0], "--perplexity", tmp_path / "short.txt", "--out", tmp_path / "out")
    measures, (item,) = results(tmp_path / "out")
    loss = -score(checkpoints[0], "", short)
    assert item["bytes"] == len(short.encode()) and item["nll"] == pytest.approx(loss, rel=1e-4)
    value = measures["short/bits per byte"]["values"][checkpoints[0]]["value"]
    assert value == pytest.approx(loss / math.log(2) / len(short.encode()), rel=1e-4)
    value = measures["short/perplexity"]["values"][checkpoints[0]]["value"]
    assert value == pytest.approx(math.exp(loss / item["tokens"]), rel=1e-4)


def test_choices_are_normalised_by_tokens_and_by_bytes(
    checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same three log-likelihoods name three winners."""
    from topkapi.training.evaluation import scoring_tasks
    from topkapi.training.evaluation.likelihood import Likelihood

    found = [Likelihood([-3.0], False), Likelihood([-2.0, -2.0], False), Likelihood([-5.0], False)]
    monkeypatch.setattr(scoring_tasks, "log_likelihoods", lambda *_: [found])
    row = {"query": "x", "choices": ["ab", "cd", "a long choice"], "gold": 1}
    evaluate(checkpoints[0], "--choices", write_rows(tmp_path / "q.jsonl", row), "--out", tmp_path / "out")
    (item,) = results(tmp_path / "out")[1]
    assert item["chosen"] == {"none": 0, "token": 1, "byte": 2}


def test_perplexities_over_other_vocabularies_are_not_compared(
    checkpoints: list[str], tmp_path: Path, english: str, capsys: Any
) -> None:
    other = load_checkpoint(checkpoints[1], dtype=torch.float32)
    vocabulary = type(other.tokenizer).train([english[:20_000]], 400)
    path = save_checkpoint(
        tmp_path / "other", model=other.model, tokenizer=vocabulary, chat=None, generation={}, details={}
    )
    (tmp_path / "text.txt").write_text(english[:500])
    assert evaluate(checkpoints[0], path, "--perplexity", tmp_path / "text.txt") == 0
    bits, tokens = capsys.readouterr().out.splitlines()[1:3]
    assert "not comparable" in tokens and "not comparable" not in bits


def test_what_is_too_long_loses_its_beginning_and_says_so(
    checkpoints: list[str], tmp_path: Path, english: str, capsys: Any
) -> None:
    rows = write_rows(tmp_path / "long.jsonl", {"context": english[:3000], "continuation": "value"})
    assert evaluate(checkpoints[0], "--lambada", rows) == 0
    assert "1 texts longer than the context of 128 tokens lost their beginning" in capsys.readouterr().out
    rows = write_rows(tmp_path / "long.jsonl", {"context": "The", "continuation": english[:3000]})
    assert evaluate(checkpoints[0], "--lambada", rows) == 2
    assert "row 1 alone is longer than the context" in capsys.readouterr().err


def test_tasks_come_from_a_file_too(checkpoints: list[str], tmp_path: Path, capsys: Any) -> None:
    write_rows(tmp_path / "w.jsonl", *({"context": f"a {word}", "continuation": "b"} for word in "cde"))
    (tmp_path / "tasks.yaml").write_text("- {kind: lambada, file: w.jsonl, limit: 2, name: words}\n")
    assert evaluate(checkpoints[0], "--tasks", tmp_path / "tasks.yaml") == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[0] == "words" and line[3] == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--lambada", "{gold}", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["--choices", "none.jsonl"], "no such file: none.jsonl"),
        (["--choices", "{gold}"], "gold.jsonl, line 1: gold must be 0 to 1, not 2"),
        (["--choices", "{broken}"], "broken.jsonl, line 1: not valid JSON"),
        (["--lambada", "{gold}"], "no text in the field 'context'"),
        (["--blimp", "{folder}"], "holds no .jsonl files"),
        (["--tasks", "{tasks}"], "entry 1: stride does not apply to lambada"),
        (["--tasks", "{unknown}"], "entry 1: kind must be"),
        (["--lambada", "{gold}", "--judge", "http://x"], "--judge applies to --instructions"),
        (["--lambada", "{gold}", "--tasks", "{tasks}", "--limit", "3"], "do not apply to --tasks"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, checkpoints: list[str], tmp_path: Path, capsys: Any
) -> None:
    write_rows(tmp_path / "gold.jsonl", {"query": "x", "choices": ["a", "b"], "gold": 2})
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "tasks.yaml").write_text("- {kind: lambada, file: gold.jsonl, stride: 3}")
    (tmp_path / "unknown.yaml").write_text("- {kind: riddles, file: gold.jsonl}")
    (tmp_path / "folder").mkdir()
    names = {
        "gold": "gold.jsonl", "broken": "broken.jsonl", "tasks": "tasks.yaml", "unknown": "unknown.yaml",
        "folder": "folder",
    }  # fmt: skip
    places = {name: tmp_path / file for name, file in names.items()}
    code = evaluate(checkpoints[0], *(argument.format(**places) for argument in arguments))
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("items", range(1, EXACT_ITEMS + 2))
def test_a_star_takes_six_items_that_differ(items: int) -> None:
    """By chance alone, two rows of three checkpoints in four point the same way."""
    worse = mean("m", [0.1 * at for at in range(items)])
    better = mean("m", [0.1 * at + 0.5 + 0.01 * at for at in range(items)])
    chance = exact_chance(worse, better)
    assert chance == (None if items > EXACT_ITEMS else pytest.approx(2 / 2**items))
    line = report._line("task", [worse, better])
    (found,) = line.differences
    assert found is not None and found.differs == (items >= 6)
    assert report._difference(found, "").endswith(" *") == (items >= 6)
    # Items that do not differ add nothing.
    padded = [mean("m", [*(measure.totals.tolist()), *[1.0] * 9]) for measure in (worse, better)]
    assert exact_chance(*padded) == chance


def test_the_exact_test_is_scipys() -> None:
    """`scipy.stats.permutation_test((a, b), permutation_type="samples")` of 1.17 on these: 0.21875 (two-sided)."""
    first, second = mean("m", [0.1, 0.5, 0.3, 0.9, 0.2, 0.7]), mean("m", [0.4, 0.6, 0.2, 1.3, 0.1, 1.0])
    assert exact_chance(first, second) == pytest.approx(0.21875)
    # Perplexities and unequal counts, against every exchange by hand.
    totals, counts = ([1.0, 5.0, 2.0], [2.0, 6.0, 2.5]), ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    arrays = [(np.array(total), np.array(count)) for total, count in zip(totals, counts, strict=True)]
    own = [Measure("p", total, count, exponential=True) for total, count in arrays]
    gaps = []
    for choice in itertools.product((0, 1), repeat=3):
        a = math.exp(sum(totals[which][at] for at, which in enumerate(choice)) / 6)
        b = math.exp(sum(totals[1 - which][at] for at, which in enumerate(choice)) / 6)
        gaps.append(abs(a - b))
    assert exact_chance(*own) == pytest.approx(sum(gap >= gaps[0] - 1e-12 for gap in gaps) / 8)
