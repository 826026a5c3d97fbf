"""The course's page: its commands are commands, and its figures those of what they train."""

import re
import shlex
from pathlib import Path

import pytest

from topkapi.service.commands.cli import build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "course.md"


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("topkapi ")]


@pytest.mark.parametrize("line", commands())
def test_its_commands_are_understood(line: str) -> None:
    name, *words = shlex.split(line)[1:]
    build_parser(name).parse_args([name, *words])


def test_it_goes_the_whole_way() -> None:
    names = [line.split()[1] for line in commands()]
    assert names == ["plan", "pretrain", "generate", "finetune", "evaluate", "serve"]
