"""Answers: each measure on hand-made cases, every rule both kept and broken, and the command from rows to figures."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.evaluation.test_evaluation import evaluate, results, write_rows
from topkapi.engine.request import GenerateJob
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.model.generation import GenerationResult
from topkapi.training.evaluation import answers
from topkapi.training.evaluation.checks import CHECKS, ifeval_checks, parse_checks
from topkapi.training.evaluation.judge import Judge, grade
from topkapi.training.evaluation.tasks import Instruction
from topkapi.training.evaluation.text_measures import (
    exact_match,
    longest_common_subsequence,
    repetition,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1", "rouge"),
    [
        ("The cat sat.", "the cat sat", True, 1.0, 1.0),
        ("sat the cat", "the cat sat", False, 1.0, 2 / 3),
        ("the cat", "the cat sat on the mat", False, 0.5, 0.5),
        ("a a a", "a", False, 0.5, 0.5),
        ("", "the cat", False, 0.0, 0.0),
        ("...", "", True, 1.0, 1.0),
        ("Çay içtim", "çay", False, 2 / 3, 2 / 3),
    ],
)
def test_an_answer_is_compared_with_its_reference(
    answer: str, reference: str, match: bool, f1: float, rouge: float
) -> None:
    assert exact_match(answer, reference) is match
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert rouge_l(answer, reference) == pytest.approx(rouge)


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_the_longest_common_subsequence_is_the_textbooks(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for row, one in enumerate(first):
        for column, other in enumerate(second):
            left_out = max(table[row][column + 1], table[row + 1][column])
            table[row + 1][column + 1] = table[row][column] + 1 if one == other else left_out
    assert longest_common_subsequence(first, second) == table[-1][-1]


def test_repetition_is_what_was_said_before() -> None:
    assert repetition("one two three") == 0
    assert repetition("one two three four five") == 0
    assert repetition("round and round it " * 3) == pytest.approx(5 / 9)


RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "number", "value": 18}, "So 9 * 2 = $1,018, no: 18.", "18, or rather 19"),
    ({"kind": "number", "value": 1234.5}, "1,234.5", "12"),
    ({"kind": "one_of", "values": ["Yes", "No"]}, "yes.", "perhaps"),
    ({"kind": "contains", "values": ["Paris", "France"]}, "paris, FRANCE", "Paris"),
    ({"kind": "excludes", "values": ["cat"]}, "a category", "a Cat!"),
    ({"kind": "frequency", "text": "tea", "least": 2, "most": 2}, "Tea and tea, teapots", "tea"),
    ({"kind": "matches", "pattern": r"^\d{4}$"}, "1999", "in 1999"),
    ({"kind": "json", "keys": ["a"]}, '```json\n{"a": 1}\n```', '{"b": 1}'),
    ({"kind": "json"}, "[1, 2]", "[1, 2"),
    ({"kind": "json", "value": {"a": 1}}, '{"a":  1}', '{"a": 1, "b": 2}'),
    ({"kind": "items", "of": ["cat", "dog", "owl"], "count": 2}, "1. a cat\n2. The owl.", "cat, dog and owl"),
    ({"kind": "items", "of": ["cat", "dog"], "count": 2}, "dog and cat.", "cat, cat"),
    ({"kind": "words", "least": 2, "most": 3}, "one two three", "one two three four"),
    ({"kind": "sentences", "most": 2}, "It costs 3.50. Cheap!", "One. Two. Three."),
    ({"kind": "paragraphs", "least": 2}, "one\n\ntwo", "one\ntwo"),
    ({"kind": "bullets", "least": 2, "most": 2}, "- one\n* two", "**one**\n- two"),
    ({"kind": "highlights", "least": 2}, "*one* and **two**", "*one* and 2 * 3"),
    ({"kind": "lowercase"}, "all small, 3", "Not all"),
    ({"kind": "uppercase"}, "ALL LARGE", "ALL large"),
    ({"kind": "starts_with", "value": "dear"}, "Dear Sir", "Sir"),
    ({"kind": "ends_with", "value": "Bye."}, "So long. bye.", "Bye. Or not"),
]


@pytest.mark.parametrize(("rule", "kept", "broken"), RULES)
def test_a_rule_is_kept_or_broken(rule: dict[str, Any], kept: str, broken: str) -> None:
    (check,) = parse_checks([rule], "row 1")
    assert check.passes(kept) and not check.passes(broken)


def test_every_rule_has_a_case() -> None:
    assert {rule["kind"] for rule, _, _ in RULES} == set(CHECKS)


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({}, "checks must be a list"),
        ([{"kind": "rhyme"}], "unknown kind of check 'rhyme'"),
        ([{"kind": "number"}], "the check 'number' lacks 'value'"),
        ([{"kind": "number", "value": 1, "unit": "m"}], "has no setting 'unit'"),
        ([{"kind": "number", "value": "many"}], "cannot be made"),
        ([{"kind": "matches", "pattern": "("}], "cannot be made"),
        ([{"kind": "words"}], "every answer passes the check 'words' without least or most"),
        ([{"kind": "frequency", "text": "so", "least": 0}], "every answer passes the check 'frequency'"),
    ],
)
def test_a_check_that_cannot_be_made_is_named(checks: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_checks(checks, "row 1")


def test_ifeval_rules_are_translated_or_named() -> None:
    row = {
        "instruction_id_list": [
            "punctuation:no_comma", "en:length_constraints:number_words", "language:response_language",
            "detectable_format:number_highlighted_sections", "keywords:forbidden_words",
        ],
        "kwargs": [
            {}, {"relation": "less than", "num_words": 4}, {"language": "de"}, {"num_highlights": 1},
            {"forbidden_words": ["tea"]},
        ],
    }  # fmt: skip
    checks, left_out = ifeval_checks(row, "row 1")
    assert left_out == ["language:response_language"]
    assert [check.passes("one *two* three") for check in checks] == [True, True, True, True]
    assert [check.passes("one, two three tea") for check in checks] == [False, False, False, False]


def test_a_grade_is_the_first_number_to_100() -> None:
    assert [grade(reply) for reply in ("85", "Score: 100/100", "I give 7.5", "1000", "none")] == [
        85,
        100,
        None,
        None,
        None,
    ]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the model say these texts, in the order of the rows; None is an answer that does not end."""

    def make(tokenizer: Any, *texts: str | None) -> None:
        def generate(model: Any, jobs: list[GenerateJob], progress: Any) -> list[GenerationResult]:
            assert [len(job.prompt) for job in jobs] == sorted(len(job.prompt) for job in jobs)
            assert all(job.parameters.temperature == 0 and job.parameters.max_tokens == 40 for job in jobs)
            end = tokenizer.control_tokens["<|im_end|>"]
            return [
                GenerationResult(tokenizer.encode("on and on"), "length")
                if text is None
                else GenerationResult([*tokenizer.encode_with_control(text), end], "stop", end)
                for text in texts
            ]

        monkeypatch.setattr(answers, "run_batch", generate)

    return make


def test_answers_are_measured(
    tiny_checkpoint: Callable[..., Path], tiny_tokenizer: Any, said: Callable[..., None], tmp_path: Path, capsys: Any
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        {"instruction": "Say one", "input": "", "output": "One."},
        {"instruction": "Say twenty", "output": "twenty"},
        {"question": "How many is that?", "answer": "9 + 9 = 18\n#### 18"},
        {"prompt": "How many is that, again?", "checks": [{"kind": "number", "value": 3}, {"kind": "lowercase"}]},
        {"prompt": "Long " * 200, "completion": "x"},
    )
    said(tiny_tokenizer, "one", None, "it is 18", "<|im_end|>\n<|im_start|>user 3")
    checkpoint = tiny_checkpoint("answering", context=300)
    assert evaluate(checkpoint, "--instructions", rows, "--max-tokens", 40, "--out", tmp_path / "out") == 0
    measures, items = results(tmp_path / "out")
    found = {
        name.removeprefix("rows/"): (one["items"], one["values"][str(checkpoint)]["value"])
        for name, one in measures.items()
    }
    assert found["exact match"] == (4, 0.25)
    assert found["checks kept"] == (2, 1.0)
    assert found["stop rate"] == (5, 0.6)
    assert found["template leaks"] == (5, 0.2)
    assert [item["finish_reason"] for item in items] == ["stop", "length", "stop", "stop", "too long"]
    assert [item["leak"] for item in items] == [False, False, False, True, False]
    assert "1 prompts fill the context" in capsys.readouterr().out


def test_alpaca_headings_in_an_answer_are_a_leak(tiny_tokenizer: Any) -> None:
    for template in ("alpaca", "chatml"):
        pattern = answers.leak_pattern(ChatTemplate.built_in(template), tiny_tokenizer)
        assert pattern.search("So:\n### Response:\nYes") and not pattern.search("The response: an instruction")
        assert pattern.search("### Instruction") and pattern.search("<|im_start|>user") and pattern.search("<|im_end|>")


def test_a_real_model_answers_every_row(tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("a", "b", "c")]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    first, second = tiny_checkpoint("one", seed=1), tiny_checkpoint("two", seed=2)
    assert evaluate(first, second, "--instructions", path, "--max-tokens", 8, "--out", tmp_path / "out") == 0
    _, items = results(tmp_path / "out")
    assert len(items) == 6 and all(item["tokens"] <= 8 for item in items)
    capsys.readouterr()
    assert evaluate(first, "--instructions", path, "--max-tokens", 9999) == 2
    assert "--max-tokens 9999 does not fit" in capsys.readouterr().err
    base = tiny_checkpoint("base", chat=False)
    capsys.readouterr()
    assert evaluate(base, "--instructions", path) == 2
    assert "--chat-template" in capsys.readouterr().err


@pytest.fixture
def judge() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint that grades 70, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"content": "70"}}]}).encode()
            refused = asked[-1]["model"] == "unknown"
            self.send_response(404 if refused else 200)
            self.end_headers()
            self.wfile.write(b"no such model" if refused else body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def test_a_judge_grades_answers(
    judge: tuple[str, list[dict[str, Any]]],
    tiny_checkpoint: Callable[..., Path],
    tiny_tokenizer: Any,
    said: Callable[..., None],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, asked = judge
    monkeypatch.setattr("topkapi.training.evaluation.judge._WAITS", (0.0, 0.0))
    rows = [{"prompt": "Say one", "completion": "One!"}, {"prompt": "Say nothing at all", "completion": "none"}]
    path, checkpoint = write_rows(tmp_path / "rows.jsonl", *rows), tiny_checkpoint("judged")
    said(tiny_tokenizer, "Uno", "")
    arguments = [checkpoint, "--instructions", path, "--max-tokens", 40, "--judge"]
    assert evaluate(*arguments, url, "--judge-model", "wise", "--out", tmp_path / "out") == 0
    measures, items = results(tmp_path / "out")
    assert [item["judge"] for item in items] == [70, 0], "an empty answer is not worth a question"
    assert measures["rows/judge"]["values"][str(checkpoint)]["value"] == 35
    _, question = asked
    prompt = question["messages"][0]["content"]
    assert question["model"] == "wise" and question["temperature"] == 0
    assert all(part in prompt for part in ("Say one", "One!", "Uno", "0 to 100"))
    assert evaluate(*arguments, url, "--judge-model", "unknown") == 2
    assert "the judge refused: 404 no such model" in capsys.readouterr().err
    assert evaluate(*arguments, "http://127.0.0.1:9/v1", "--judge-model", "wise") == 2
    assert "gave no answer" in capsys.readouterr().err
    assert evaluate(*arguments, url) == 2
    assert "--judge-model belong together" in capsys.readouterr().err


def test_a_judge_that_fails_is_asked_again_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes is waited for, as long as the server says; what stays costs the one answer alone."""
    waits: list[float] = []
    monkeypatch.setattr("topkapi.training.evaluation.judge.time.sleep", waits.append)
    replies = iter([503, 200, 429, 200, 500, 500, 500, 500, 200, 403, 200])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status := next(replies))
            if status == 429:
                self.send_header("Retry-After", "7")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": "70"}}]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr("topkapi.training.evaluation.judge._AT_ONCE", 1)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    judge = Judge(f"http://127.0.0.1:{server.server_port}/v1", "wise")
    judge.check()
    judge.check()
    row = Instruction([{"role": "user", "content": "Why?"}], "row 1", None, [])
    assert judge.scores([row] * 5, [{"answer": "So."}] * 5) == [70, None, 70, None, 70]
    assert waits == [1.0, 7.0, 1.0, 4.0, 16.0]
    assert [reason[:23] for reason in judge.failures] == ["the judge refused: 500 ", "the judge refused: 403 "]
    server.shutdown()
    server.server_close()
