"""A larger model's answers: only good ones are kept, in messages, and a run that was stopped goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.evaluation.test_evaluation import write_rows
from topkapi.engine.request import GenerateJob
from topkapi.model import native
from topkapi.model.generation import GenerationResult
from topkapi.model.serving import kernels
from topkapi.service.commands.cli import main
from topkapi.training.data.instructions import read_conversations
from topkapi.training.instructions import distillation

ANSWERS = {
    "Good?": "It is good.",
    "Long?": " ".join(f"Line {number} says it." for number in range(60)),
    "Again?": "round and round it " * 4,
    "Leak?": "### Response: yes",
    "Code?": "def run(): pass",
    "Endless?": None,
    "Last?": "The last one.",
}


@pytest.fixture
def teacher(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path], tiny_tokenizer: Any
) -> tuple[str, list[str]]:
    """A checkpoint in whose place handmade answers are given, and what it was asked."""
    asked: list[str] = []
    end = tiny_tokenizer.control_tokens["<|im_end|>"]

    def generate(model: Any, jobs: list[GenerateJob], *, together: int) -> list[GenerationResult]:
        assert all(job.parameters.temperature == 0 and job.parameters.max_tokens == 96 for job in jobs)
        assert together == 1
        prompts = [list(job.prompt) for job in jobs]
        asked.extend(map(tiny_tokenizer.decode, prompts))
        found = []
        for prompt in prompts:
            said = ANSWERS[tiny_tokenizer.decode(prompt).split("user\n")[1].split("<|im_end|>")[0]]
            ids = tiny_tokenizer.encode(said or "on and on")
            found.append(GenerationResult([*ids, end], "stop", end) if said else GenerationResult(ids, "length"))
        return found

    monkeypatch.setattr(distillation, "run_batch", generate)
    return str(tiny_checkpoint("teacher")), asked


def run(checkpoint: str, *arguments: object) -> int:
    return main(["instructions", "answer", *map(str, arguments), "--checkpoint", checkpoint, "--slots", "1"])


def test_good_answers_are_kept_and_a_stopped_run_goes_on(
    teacher: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, asked = teacher
    questions, out = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("\n".join([*ANSWERS, "", "Good?", "Too long " * 200]) + "\n")
    assert run(checkpoint, questions, "--out", out, "--limit", 5) == 0
    (first,) = read_conversations(out, input_heading=False)
    assert [message["content"] for message in first.messages] == ["Good?", "It is good."]
    assert run(checkpoint, questions, "--out", out, "--system", "Be brief.") == 0
    found = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [messages[-1]["content"] for messages in found] == ["It is good.", "The last one."]
    assert all(message["role"] != "system" for messages in found for message in messages)
    assert [sum(text in prompt for prompt in asked) for text in ("Good?", "Leak?", "Endless?")] == [1, 1, 1]
    assert "Be brief." in asked[-1] and "Be brief." not in asked[0]
    said = capsys.readouterr().out.splitlines()[-1]
    assert "8 of 8 answered, 2 kept" in said and "rows an hour" in said
    for reason in ("1 did not end", "1 question too long", "1 template leak", "1 repetition", "1 answer too long"):
        assert reason in said
    asked.clear()
    assert run(checkpoint, questions, "--out", out) == 0
    assert "8 of 8 answered, 2 kept; left out: " in capsys.readouterr().out and not asked
    out.unlink()
    assert run(checkpoint, questions, "--out", out) == 0
    assert "8 of 8 answered, 2 kept" in capsys.readouterr().out and len(asked) == 7, "a new file begins anew"


def test_somebody_elses_file_is_not_written_to(teacher: tuple[str, list[str]], tmp_path: Path, capsys: Any) -> None:
    checkpoint, asked = teacher
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "Good?", "completion": "No."})
    copy, link = Path(write_rows(tmp_path / "copy.jsonl", {"messages": []})), tmp_path / "link.jsonl"
    link.symlink_to(path)
    before = copy.read_bytes()
    for out, message in (
        (path, "rows.jsonl holds the questions"),
        (link, "rows.jsonl holds the questions"),
        (copy, "copy.jsonl was not written by this command: there is no copy.jsonl.left-out"),
        (tmp_path, "was not written by this command"),
    ):
        assert run(checkpoint, path, "--out", out) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "copy.jsonl.left-out").touch()
    assert run(checkpoint, path, "--out", copy) == 2
    assert "line 1 is not {messages} with an answer" in capsys.readouterr().err
    assert run(checkpoint, path, "--out", tmp_path / "new.jsonl", "--max-tokens", 100000) == 2
    assert "--max-tokens 100000 does not fit" in capsys.readouterr().err
    assert copy.read_bytes() == before and not asked


def test_questions_come_from_whatever_finetune_reads(teacher: tuple[str, list[str]], tmp_path: Path) -> None:
    checkpoint, _ = teacher
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "Good?", "completion": "No."})
    assert run(checkpoint, path, "--out", tmp_path / "answers.jsonl") == 0
    (found,) = read_conversations(tmp_path / "answers.jsonl", input_heading=False)
    assert found.messages[-1]["content"] == "It is good."


def test_open_questions_are_many_and_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(texts)}.txt"
        assert main(["instructions", "ask", "--out", str(out), "--count", "500", "--seed", str(seed)]) == 0
        texts.append(out.read_text())
    assert texts[0] == texts[1] != texts[2]
    questions = texts[0].splitlines()
    assert len(set(questions)) == 500 and not any("{" in question for question in questions)
    assert len(distillation.read_questions([tmp_path / "0.txt"])) == 500
    capsys.readouterr()
    assert main(["instructions", "ask", "--out", str(tmp_path / "all.txt"), "--count", "1000000"]) == 0
    assert "not 1,000,000: there are no more" in capsys.readouterr().out
    assert main(["instructions", "ask", "--out", str(tmp_path / "all.txt"), "--count", "0"]) == 2
    assert "--count must be at least 1" in capsys.readouterr().err


def test_a_real_model_answers(tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Random weights say nothing worth keeping, and the command says so; a base checkpoint cannot be asked."""
    questions, out = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("Why?\nHow?\n")
    command = ["instructions", "answer", str(questions), "--out", str(out), "--max-tokens", "4", "--checkpoint"]
    assert main([*command, str(tiny_checkpoint("random"))]) == 0
    assert "2 of 2 answered, 0 kept" in capsys.readouterr().out
    assert main([*command, str(tiny_checkpoint("random"))]) == 0
    assert "2 of 2 answered, 0 kept; left out: 2" in capsys.readouterr().out, "nothing kept is remembered too"
    assert main([*command, str(tiny_checkpoint("base", chat=False))]) == 2
    assert "has no chat template" in capsys.readouterr().err
    questions.write_text("\n")
    assert main([*command, str(tiny_checkpoint("random"))]) == 2
    assert "there are no questions" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_teacher_is_computed_as_it_would_be_served(
    dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    batch = distillation.run_batch

    def generate(model: Any, *arguments: Any, **options: Any) -> list[GenerationResult]:
        computed.append(kernels(model))
        return batch(model, *arguments, **options)

    monkeypatch.setattr(distillation, "run_batch", generate)
    questions = tmp_path / "questions.txt"
    questions.write_text("Good?\n")
    flags = ["--out", tmp_path / "answers.jsonl", "--dtype", dtype, "--max-tokens", "4"]
    assert run(str(tiny_checkpoint("teacher")), questions, *flags) == 0
    assert computed == [f"native, {native.levels()[-1]}" if native.levels() else "PyTorch"]
