"""A wrong value of a flag, a variable or a recipe is told by its name, as what it must be instead."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import build_parser, main
from topkapi.service.settings import Settings
from topkapi.training.recipes.arguments import build_recipe
from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, KtoRecipe, PretrainRecipe, TrainingRecipe

LIBRARY_WORDING = re.compile(r"[Ii]nput should|invalid (int|float)|argument|expected one|Value error|unable to parse")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("TOPKAPI_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        assert main(arguments) == 2
    except SystemExit as end:
        assert end.code == 2
    return str(capsys.readouterr().err.splitlines()[0])


@pytest.mark.parametrize(
    "command,says",
    [
        ("serve --port abc", "--port must be a whole number from 0 to 65535, not 'abc'"),
        ("serve --port 99999", "--port must be a whole number from 0 to 65535, not '99999'"),
        ("serve --port 1.5", "--port must be a whole number from 0 to 65535, not '1.5'"),
        ("serve --port", "--port needs a value"),
        ("serve --max-queue 0", "--max-queue must be a whole number of at least 1, not '0'"),
        ("serve --idle-timeout soon", "--idle-timeout must be a number above 0 and at most 3600, not 'soon'"),
        ("serve --stream-grace nan", "--stream-grace must be a number from 0 to 3600, not 'nan'"),
        ("serve --step-timeout inf", "--step-timeout must be a number of at least 0, not 'inf'"),
        ("serve --root-path x", "--root-path: must be a path such as /topkapi, not 'x'"),
        ("serve --studio=yes", "--studio takes no value, and not 'yes'"),
        ("generate hi --threads two", "--threads must be a whole number from 1 to"),
        ("generate hi --top-k many", "--top-k must be a whole number, not 'many'"),
        ("generate hi --temperature hot", "--temperature must be a number, not 'hot'"),
        ("generate hi --logit-bias 5", "--logit-bias: '5' is not ID=NUMBER"),
        ("score --stride x", "--stride must be a whole number, not 'x'"),
        ("bench --tokens many", "--tokens must be a whole number, not 'many'"),
        ("pretrain --batch-size many", "--batch-size must be a whole number of at least 1, not 'many'"),
        (
            "pretrain --validation-fraction 1",
            "--validation-fraction must be a number of at least 0 and below 1, not '1'",
        ),
        ("pretrain --learning-rate nan", "--learning-rate must be a number above 0, not 'nan'"),
        ("pretrain --precision fp8", "--precision must be 'auto', 'fp32' or 'bf16', not 'fp8'"),
        ("pretrain --data", "--data needs a value, or several"),
        ("plan --memory much", "--memory must be a number, not 'much'"),
        ("evaluate a --limit x", "--limit must be a whole number, not 'x'"),
        ("instructions make", "missing: --out"),
        ("instructions make --out a.jsonl --count x", "--count must be a whole number, not 'x'"),
    ],
)
def test_a_wrong_value_is_told_as_what_it_must_be(command: str, says: str, capsys) -> None:
    assert told(capsys, *command.split()).startswith(f"error: {says}")


def numbers(parser: argparse.ArgumentParser, path: list[str]) -> Iterator[tuple[list[str], str]]:
    """Every flag of every command that takes a number, in a command line that has all it needs else."""
    needed = [word for action in parser._actions if action.required and action.option_strings
              for word in (action.option_strings[-1], "x")]  # fmt: skip
    positional = ["x" for action in parser._actions if not action.option_strings and action.nargs in (None, "+")]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, child in action.choices.items():
                yield from numbers(child, [*path, name])
        elif action.option_strings and (action.type in (int, float) or action.metavar in ("N", "X", "SECONDS")):
            yield [*path, *positional, *needed, action.option_strings[-1], "many"], action.option_strings[-1]


def test_no_flag_speaks_as_a_library_does(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = build_parser()
    lines = list(numbers(parser, []))
    monkeypatch.setattr("topkapi.service.commands.cli.build_parser", lambda command: parser)
    assert len(lines) > 200
    for line, flag in lines:
        error = told(capsys, *line)
        assert error.startswith(f"error: {flag} must be a") and "not 'many'" in error, (line, error)
        assert not LIBRARY_WORDING.search(error.replace(" number", "")), error


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_a_variable_is_told_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"TOPKAPI_{name.upper()}"
    monkeypatch.setenv(variable, "/no such/thing?")
    try:
        Settings.read()
    except SettingsError as error:
        assert error.message.startswith(variable) and not LIBRARY_WORDING.search(error.message), error.message
        assert "not " in error.message
    else:
        assert name in ("host", "checkpoints", "draft", "adapters"), "any text will do for these alone"


@pytest.mark.parametrize("kind", [PretrainRecipe, FinetuneRecipe, DpoRecipe, KtoRecipe])
def test_a_recipe_is_told_by_its_field(kind: type[TrainingRecipe]) -> None:
    for name in kind.model_fields:
        with pytest.raises(SettingsError) as refused:
            build_recipe(kind, {name: {"a": [object()]}}, "mine.yaml")
        assert refused.value.message.startswith(f"mine.yaml: '{name}'")
        assert not LIBRARY_WORDING.search(refused.value.message), refused.value.message
        assert len(refused.value.message) < 300


def test_a_long_value_is_not_repeated_whole(capsys) -> None:
    assert len(told(capsys, "bench", "--tokens", "9" * 100_000)) < 200


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-this-name/x"], ids=["long", "nobody's"])
@pytest.mark.parametrize("command", [
    ["serve"], ["config", "--keys"], ["config", "--model-directory"], ["config", "--config"], ["generate", "hi", "-c"],
    ["pretrain"], ["pretrain", "--data"], ["finetune"], ["evaluate"], ["plan"], ["import"],
], ids=" ".join)  # fmt: skip
def test_a_path_that_no_file_can_have_is_told_in_two_lines(command, name, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["out"] if command == ["import"] else []
    try:
        code = main([*command, name, *more])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    told = capsys.readouterr().err
    assert code == 2 and "error: " in told and len(told.strip().splitlines()) <= 3, told[:500]
