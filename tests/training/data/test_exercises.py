"""Exercises: their own answers are right, others wrong, what is held out is not trained on, and the judge counts."""

import itertools
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.evaluation.test_evaluation import evaluate, results, write_rows
from topkapi.engine.request import GenerateJob
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.generation import GenerationResult
from topkapi.service.commands.cli import main
from topkapi.training.data.exercises import letters, memory, numbers, talk
from topkapi.training.data.exercises.exercise import Draw, new_wordings
from topkapi.training.data.exercises.rows import GROUPS, MAKERS, make_rows
from topkapi.training.data.instructions import check_messages, read_conversations
from topkapi.training.data.rows import conversations_of
from topkapi.training.evaluation import answers
from topkapi.training.evaluation.checks import parse_checks

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trained() -> Rows:
    return list(make_rows(1, 4000, held_out=False))


@pytest.fixture(scope="module")
def held_out() -> Rows:
    return list(make_rows(1, 2000, held_out=True))


def right(row: dict[str, Any], answer: str) -> bool:
    return all(check.passes(answer) for check in parse_checks(row["checks"], "row"))


def test_an_exercises_own_answer_is_right_and_silence_is_not(trained: Rows, held_out: Rows) -> None:
    for row in [*trained, *held_out]:
        check_messages(row["messages"], "row")
        assert right(row, row["messages"][-1]["content"]), row
        assert not right(row, ""), row
        asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
        assert all(content.strip() and "{" not in content for content in asked), "a place in a wording was not filled"
    assert {row["kind"] for row in trained} == {row["kind"] for row in held_out} == set(MAKERS)


def test_another_exercises_answer_is_wrong(held_out: Rows) -> None:
    """Of one kind, too, save where many answers are right (a sentence with a word) or few are possible (yes)."""
    for row in held_out:
        assert not right(row, "perhaps so"), row
    numbers_asked = {"differences", "problems of one step", "close differences", "products in words"}
    numbers_asked |= {"names never heard", "names asked again", "quotients", "sums in words", "capitals backwards"}
    several = {
        "sentences with a word",
        "definitions",
        *talk.MAKERS,
        *GROUPS["manners"],
        *GROUPS["drill"],
        *GROUPS["polish"],
        *GROUPS["openings"],
        *GROUPS["review"],
        *GROUPS["said"],
        *GROUPS["beyond"],
    } - numbers_asked
    yes_or_no = {"even or odd", "yes or no", "letters in words", "what kind of thing", "positive or negative"}
    for kind in MAKERS.keys() - several:
        # As many of each that chance decides nothing.
        rows = list(make_rows(1, 100, held_out=True, kinds=[kind]))
        wrong = total = 0
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            theirs, own = other["messages"][-1]["content"], row["messages"][-1]["content"]
            if theirs.casefold().strip(".") != own.casefold().strip("."):
                total += 1
                wrong += not right(row, theirs)
        assert wrong >= (0.4 if kind in yes_or_no else 0.7) * total, kind


def test_answers_with_steps_are_as_right(trained: Rows, tmp_path: Path) -> None:
    stepwise = list(make_rows(1, 4000, held_out=False, steps=True))
    changed = 0
    for row, plain in zip(stepwise, trained, strict=True):
        assert row["checks"] == plain["checks"] and row["messages"][0] == plain["messages"][0]
        assert right(row, row["messages"][-1]["content"]), row
        changed += row != plain
    assert changed > 100
    for first in range(100):
        for second in range(100):
            for sign, found in (("+", first + second), ("-", first - second)):
                if found >= 0:
                    answer = numbers.with_steps(f"{first} {sign} {second} = {found}.")
                    assert len({eval_sum(part) for part in answer.rstrip(".").split(" = ")}) == 1, answer
    assert numbers.with_steps("25 + 16 = 41. The answer is 41.") == "25 + 16 = 30 + 11 = 41. The answer is 41."
    assert numbers.with_steps("42 - 17 = 25.") == "42 - 17 = 30 - 5 = 25."
    assert numbers.with_steps("31 + 42 = 73.") == "31 + 42 = 73.", "nothing is carried"
    assert numbers.with_steps("Twice 17 is 34.") == "Twice 17 is 20 + 14 = 34."
    assert letters.with_steps("c-a-t: cat has 3 letters.") == "1 c, 2 a, 3 t: cat has 3 letters."
    out = tmp_path / "made.jsonl"
    command = ["instructions", "make", "--kinds", "addition", "--count", "80", "--out", str(out), "--steps"]
    assert main(command) == 0 and re.search(r": \"(\d+ \+ \d+ = ){2}\d+\.", out.read_text("utf-8"))


def eval_sum(text: str) -> int:
    """What a sum of two numbers, or a number, makes."""
    first, *rest = text.split(" ")
    return int(first) + sum(
        int(number) * (-1 if sign == "-" else 1) for sign, number in zip(rest[::2], rest[1::2], strict=True)
    )


def test_the_seed_decides_the_rows() -> None:
    rows = list(make_rows(5, 300, held_out=False))
    assert list(make_rows(5, 200, held_out=False)) == rows[:200], "the first rows do not depend on how many follow"
    assert list(make_rows(6, 300, held_out=False)) != rows


def test_what_is_held_out_is_not_trained_on(held_out: Rows) -> None:
    """Whatever the seeds: no conversation, and no last question with its answer (but of follow-ups, which may say
    "thanks" to something new, and what is said first elsewhere, and of two facts told before, of which the other one
    may be new)."""
    trained = [row for seed in (2, 3) for row in make_rows(seed, 6000, held_out=False)]
    for width in (None, 2):
        depends = ("follow-ups", "memory: one of two") if width else ()
        seen = {json.dumps(row["messages"][-width if width else 0 :]) for row in trained if row["kind"] not in depends}
        again = [row for row in held_out if json.dumps(row["messages"][-width if width else 0 :]) in seen]
        assert not [row for row in again if row["kind"] not in depends]
    assert len({json.dumps(row["messages"][:-1]) for row in held_out}) == len(held_out)
    assert {row["wording"] for row in held_out} == {"new", "seen"}
    assert {row["wording"] for row in trained} == {"seen"}


def test_some_wordings_are_kept_from_training() -> None:
    import random

    wordings = tuple(f"Say {number} to {{name}}" for number in range(14))
    kept = new_wordings(wordings)
    assert len(kept) == 2 and not new_wordings(wordings[:5])
    said = {}
    for held in (False, True):
        draw = Draw(random.Random(0), held)
        said[held] = {draw.wording(*wordings, name="Ann") for _ in range(400)}
        assert draw.new_wording is held
    assert said[True] - said[False] == {wording.format(name="Ann") for wording in kept}


def test_what_was_told_is_asked_for_later(trained: Rows) -> None:
    """Of the answer to what was told earlier, the question itself says nothing."""
    rows = [row for row in trained if row["kind"] in memory.MAKERS and "go on" not in row["kind"]]
    assert any(len(row["messages"]) > 4 for row in rows)
    for row in rows:
        *earlier, question, _ = row["messages"]
        assert not right(row, question["content"]), row
        assert earlier


def test_the_command_writes_what_finetune_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "made.jsonl"
    assert main(["instructions", "make", "--out", str(out), "--count", "50", "--seed", "3"]) == 0
    assert "50 exercises" in capsys.readouterr().out
    assert len(read_conversations(out, input_heading=False)) == 50
    few = tmp_path / "few.jsonl"
    command = ["instructions", "make", "--out", str(few), "--held-out", "--kinds", "units of time", "--count", "40"]
    assert main(command) == 0
    assert {json.loads(line)["kind"] for line in few.read_text().splitlines()} == {"units of time"}
    for wrong, said in (
        (["--count", "0"], "--count must be at least 1"),
        (["--seed", "-1"], "--seed must not be below 0"),
        (["--kinds", "juggling"], "there is no kind 'juggling'\nhint: topkapi instructions kinds"),
        (["--kinds", "adition"], "there is no kind 'adition'\nhint: did you mean 'addition'?"),
    ):
        assert main(["instructions", "make", "--out", str(out), *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["instructions", "kinds"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.removesuffix(":") for line in listed if not line.startswith("  ")] == list(GROUPS)
    assert [line.strip() for line in listed if line.startswith("  ")] == [*itertools.chain(*GROUPS.values())]
    before = out.read_bytes()
    for there in (out, tmp_path):
        assert main(["instructions", "make", "--out", str(there)]) == 2
        assert f"{there} is there already" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["instructions", "make", "--out", str(out / "below.jsonl"), "--count", "9"]) == 2
    assert "cannot be written" in capsys.readouterr().err


Answerer = Callable[[dict[str, Any]], str]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> Callable[[Rows, Answerer], None]:
    """Puts in the model's place what answers each row, and stops after all but an empty answer."""

    def install(rows: Rows, answer: Answerer) -> None:
        chat = ChatTemplate.built_in("chatml")
        of = {tuple(chat.encode(row["messages"][:-1], tiny_tokenizer).token_ids): row for row in rows}
        end = tiny_tokenizer.control_tokens["<|im_end|>"]

        def generate(model: Any, jobs: list[GenerateJob], progress: Any) -> list[GenerationResult]:
            found = []
            for job in jobs:
                text = answer(of[tuple(job.prompt)])
                ids = tiny_tokenizer.encode_with_control(text) if text else tiny_tokenizer.encode("on and on")
                found.append(GenerationResult([*ids, end], "stop", end) if text else GenerationResult(ids, "length"))
            return found

        monkeypatch.setattr(answers, "run_batch", generate)

    return install


@pytest.fixture
def judged(
    tiny_checkpoint: Callable[..., Path], answering: Callable[[Rows, Answerer], None], tmp_path: Path
) -> Callable[[Rows, Answerer], dict[str, tuple[int, float]]]:
    def run(rows: Rows, answer: Answerer) -> dict[str, tuple[int, float]]:
        answering(rows, answer)
        checkpoint = tiny_checkpoint("judged", context=1024)
        path = write_rows(tmp_path / "rows.jsonl", *rows)
        assert evaluate(checkpoint, "--exercises", path, "--out", tmp_path / "out") == 0
        measures, _ = results(tmp_path / "out")
        return {
            name.removeprefix("rows/"): (one["items"], one["values"][str(checkpoint)]["value"])
            for name, one in measures.items()
        }

    return run


def test_the_judge_gives_a_perfect_answerer_everything(judged: Any, held_out: Rows) -> None:
    rows = held_out[: len(MAKERS)]
    found = judged(rows, lambda row: row["messages"][-1]["content"])
    assert found["correct"] == (len(rows), 1.0)
    assert {name: found[f"correct: {name}"] for name in MAKERS} == dict.fromkeys(MAKERS, (1, 1.0))
    new = sum(row["wording"] == "new" for row in rows)
    assert found["correct: new wordings"] == (new, 1.0) and found["correct: seen wordings"] == (len(rows) - new, 1.0)
    assert found["stop rate"][1] == 1 and found["template leaks"][1] == 0


def test_the_judge_tells_right_from_wrong_and_finds_leaks(judged: Any, held_out: Rows, capsys: Any) -> None:
    chosen = [row for row in held_out if row["kind"] in ("addition", "spelling")]
    rows = list({row["messages"][-1]["content"]: row for row in chosen}.values())[:20]
    seen = [row["messages"][-1]["content"] for row in rows if row["kind"] == "spelling"]
    first = seen[0]

    def answer(row: dict[str, Any]) -> str:
        own = str(row["messages"][-1]["content"])
        if row["kind"] == "addition":
            return own
        return f"### Instruction\n{own}" if own == first else "round and round it " * 3 if own == seen[1] else ""

    found = judged(rows, answer)
    additions = sum(row["kind"] == "addition" for row in rows)
    assert found["correct: addition"] == (additions, 1.0)
    assert found["correct: spelling"] == (len(seen), 0.0)
    assert found["correct"] == (len(rows), pytest.approx(additions / len(rows)))
    assert found["stop rate"][1] == pytest.approx((additions + 2) / len(rows))
    assert found["template leaks"][1] == pytest.approx(1 / len(rows))
    assert found["repetition"][1] == pytest.approx(5 / 9 / len(rows))
    assert "correct: spelling (%)" in capsys.readouterr().out, "kinds are in the table on the console too"


def test_a_real_model_is_judged_and_wrong_rows_are_named(
    tiny_checkpoint: Callable[..., Path], held_out: Rows, tmp_path: Path, capsys: Any
) -> None:
    checkpoint = tiny_checkpoint("guessing", context=1024)
    path = write_rows(tmp_path / "rows.jsonl", *held_out[:20])
    assert evaluate(checkpoint, "--exercises", path, "--max-tokens", 6, "--out", tmp_path / "out") == 0
    measures, items = results(tmp_path / "out")
    assert measures["rows/correct"]["items"] == 20 and all(item["tokens"] <= 6 for item in items)
    plain = write_rows(tmp_path / "plain.jsonl", {"prompt": "Why?", "completion": "So."})
    capsys.readouterr()
    assert evaluate(checkpoint, "--exercises", plain) == 2
    assert "an exercise needs a kind and checks" in capsys.readouterr().err


def test_only_the_test_examples_are_measured(tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    checkpoint = tiny_checkpoint("testing")
    rows = write_rows(tmp_path / "rows.jsonl", *({"instruction": f"Say {n}", "output": f"{n}"} for n in range(9)))

    def measured(*flags: object) -> list[str]:
        command = [checkpoint, "--instructions", rows, "--max-tokens", 2, "--out", tmp_path / "out", *flags]
        assert evaluate(*command) == 0
        return [item["reference"] for item in results(tmp_path / "out")[1]]

    assert measured("--test-examples", 3) == ["6", "7", "8"]
    assert measured("--test-examples", 3, "--train-examples", 4) == ["4", "5", "6"]
    capsys.readouterr()
    for flags, said in (
        (["--test-examples", 10], "9 rows: 10 test examples"),
        (["--test-examples", 3, "--train-examples", 7], "3 test examples after 7 do not fit"),
        (["--train-examples", 7], "needs test_examples"),
    ):
        assert evaluate(checkpoint, "--instructions", rows, *flags) == 2
        assert said in capsys.readouterr().err
    assert evaluate(checkpoint, "--perplexity", rows, "--test-examples", 3) == 2
    assert "--test-examples applies to --instructions" in capsys.readouterr().err


def test_tuning_on_exercises_tells_of_no_field_that_is_not_used() -> None:
    (row,) = make_rows(0, 1, held_out=False)
    for given, unused in ((row, set()), (row | {"source": "a book"}, {"source"}), ({**row, "checks": []}, set())):
        left_out: set[str] = set()
        list(conversations_of(given, "row 1", False, left_out))
        assert left_out == unused
    left_out = set()
    list(conversations_of({"messages": row["messages"], "kind": "sums"}, "row 1", False, left_out))
    assert left_out == {"kind"}, "somebody else's field of that name"


def test_every_data_file_is_packaged() -> None:
    """What a wheel lacks would be missing only once it is installed."""
    root = Path(__file__).resolve().parents[3]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["topkapi.training"]
    files = [path for path in (root / "training").rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {"words.yaml", "definitions.txt"} <= {path.name for path in files}
    assert [path for path in files if not any(path.match(pattern) for pattern in patterns)] == []
