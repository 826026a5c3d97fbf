"""Public instruction sets: what a small model can use is kept, the rest named; files weigh by their names."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.evaluation.test_evaluation import write_rows
from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import main
from topkapi.training.data.instructions import read_conversations
from topkapi.training.data.preparation import Limits, clean, prepare
from topkapi.training.data.weights import unused, weighted
from topkapi.training.recipes.arguments import RECIPES, build_recipe, read_yaml
from topkapi.training.recipes.recipe import FinetuneRecipe

GOOD = {"instruction": "Name a bird.", "output": "An owl [1]  is a bird."}


def test_marks_that_mean_nothing_to_a_reader_are_taken_out() -> None:
    assert clean("It  is old.[3]\n\n\n\nYes [citation needed]") == "It is old.\n\nYes"
    assert clean("2*3=<<2*3=6>>6 eggs\n#### 1,006") == "2*3=6 eggs\nThe answer is 1,006."
    assert clean("### A heading, 2 < 3 << 4") == "### A heading, 2 < 3 << 4"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD | {"output": "Owl. " * 99}, "answer too long"),
        (GOOD | {"input": "bird " * 200}, "question too long"),
        (GOOD | {"output": "def f(x): return x"}, "code or tables"),
        (GOOD | {"output": "See https://example.org"}, "links"),
        (GOOD | {"output": "I am an open-source AI language model."}, "of another assistant"),
        (GOOD | {"output": "As an artificial intelligence, I have no taste."}, "of another assistant"),
        (GOOD | {"instruction": "Hey! Who are you?"}, "of another assistant"),
        (GOOD | {"output": "Это сова."}, "not plain English"),
        (GOOD | {"output": "[12]"}, "empty"),
    ],
)
def test_what_a_small_model_cannot_use_is_left_out(row: dict[str, str], reason: str, tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "rows.jsonl", GOOD | {"instruction": "Name an owl."}, row))
    found = prepare(path, Limits())
    assert found.left_out == {reason: 1}
    assert [messages[-1]["content"] for messages in found.rows] == ["An owl is a bird."]


def test_a_quoted_question_is_not_one_to_the_assistant(tmp_path: Path) -> None:
    row = GOOD | {"instruction": "Translate 'What is your name?' into French.", "output": "Quel est votre nom ?"}
    found = prepare(Path(write_rows(tmp_path / "rows.jsonl", row)), Limits())
    assert len(found.rows) == 1 and not found.left_out


def test_what_is_held_out_is_not_asked(tmp_path: Path) -> None:
    names = ["one", "two", "One!", "three", "two", "four", "five"]
    rows = ({"prompt": f"Say {name}", "completion": name} for name in names)
    path = Path(write_rows(tmp_path / "rows.jsonl", *rows))
    found = prepare(path, Limits(), first=4)
    assert [messages[-1]["content"] for messages in found.rows] == ["one", "three"]
    assert found.left_out == {"asked before": 1, "asked in what is held out": 1}


def test_the_command_cleans_files_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_rows(tmp_path / "a.jsonl", GOOD, {"instruction": "Why?", "output": "Owl. " * 99})
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"question": "Say so", "answer": "So.\n#### 3"}]))
    out = tmp_path / "out"

    def run(*arguments: object) -> tuple[int, Any]:
        code = main(["instructions", "prepare", *map(str, arguments)])
        return code, capsys.readouterr()

    code, said = run(first, second, "--out", out)
    assert code == 0 and "1 conversations; left out: 1 answer too long" in said.out
    (found,) = read_conversations(out / "b.jsonl", input_heading=False)
    assert found.messages[-1]["content"] == "So.\nThe answer is 3."
    for arguments, message in (
        ((first, "--out", tmp_path), "would be overwritten"),
        ((first, first, "--out", out), "two files of the same name"),
        ((tmp_path / "gone.json", "--out", out), "no such file"),
        ((first, "--out", out, "--longest-answer", "3"), "nothing that a small model can use"),
        ((first, "--out", out, "--first", "0"), "--first must be at least 1"),
    ):
        code, said = run(*arguments)
        assert code == 2 and message in said.err


def test_files_weigh_by_their_names() -> None:
    data = ["a/made-1.jsonl", "made.jsonl=3", "b/dolly.jsonl", "other.json"]
    weights = ["made*=6", "dolly*=0.5", "gsm*=2"]
    assert weighted(data, weights) == ["a/made-1.jsonl=6", "made.jsonl=3", "b/dolly.jsonl=0.5", "other.json"]
    assert unused(data, weights) == ["gsm*"]
    recipe = build_recipe(FinetuneRecipe, {"data": data, "weights": {"made*": 6}}, "flags")
    assert recipe.data[0] == "a/made-1.jsonl=6"
    assert FinetuneRecipe.model_validate(recipe.model_dump(mode="json")) == recipe, "a resumed run has the same weights"
    assert build_recipe(FinetuneRecipe, {"data": ["made.jsonl"], "weights": ["made*=6"]}, "").data == ["made.jsonl"]
    for wrong in ("made*", "made*=0", "=3", "made*=many"):
        with pytest.raises(SettingsError, match="not a pattern and a weight"):
            build_recipe(FinetuneRecipe, {"weights": [wrong]}, "flags")


def test_the_chat_recipe_weighs_every_set_that_its_commands_write() -> None:
    path = RECIPES / "topkapi-chat.yaml"
    recipe = build_recipe(FinetuneRecipe, read_yaml(path), path.name)
    words = [word for line in path.read_text().splitlines() if line.startswith("#") for word in line.split()]
    written = [Path(name).name for name in words if name.endswith((".json", ".jsonl")) and "*" not in name]
    assert len(written) == 8
    assert unused([*written, "distilled.jsonl"], recipe.weights) == []
    assert all("=" in source for source in weighted(written, recipe.weights))
