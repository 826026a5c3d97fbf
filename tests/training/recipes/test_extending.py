"""docs/extending.md, "A recipe field", done as it says."""

from __future__ import annotations

from pathlib import Path

from tests.extending import followed, steps, told

PROGRAM = """
import json
from pathlib import Path
import yaml
from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import build_parser
from topkapi.training.recipes.arguments import read_arguments
from topkapi.training.run.directory import RunDirectory

Path("mine.yaml").write_text("data: [a.txt]\\nnote: from the file\\n")

def read(*flags):
    return read_arguments(build_parser().parse_args(flags))[0]

try:
    read("pretrain", "mine.yaml", "--note", "a", "--nota", "b")
except SystemExit as error:
    code = error.code
run = RunDirectory(Path("run"))
run.start(read("pretrain", "mine.yaml", "--note", "from the flag"))
run.begin()
print(json.dumps({
    "read": [read(command, "--data", "a", "--note", "b").note for command in ("pretrain", "finetune", "dpo", "kto")],
    "file": read("pretrain", "mine.yaml").note,
    "cleared": read("pretrain", "mine.yaml", "--note", "none").note,
    "mistyped": code,
    "kept": yaml.safe_load(Path("run/config.yaml").read_text())["note"],
}))
"""


def test_a_recipe_field_is_one_line(tmp_path: Path) -> None:
    ((_, _, code),) = steps("A recipe field")
    assert code.count("\n") == 1
    assert told(followed("A recipe field", tmp_path), PROGRAM) == {
        "read": ["b", "b", "b", "b"],
        "file": "from the file",
        "cleared": None,
        "mistyped": 2,
        "kept": "from the flag",
    }
