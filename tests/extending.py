"""The examples of docs/extending.md: executed, or followed in a copy of the tree as they say."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"^In `([\w/.]+)`, after `(\w+)`[^\n]*:\n\n```python\n(.*?)```", re.S | re.M)


def section_of(name: str) -> str:
    """A section of the page."""
    return (ROOT / "docs" / "extending.md").read_text("utf-8").split(f"## {name}\n")[1].split("\n## ")[0]


def examples(section: str, language: str = "python") -> list[str]:
    """The code of a section, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", section_of(section), re.S)


def execute(section: str, directory: Path) -> None:
    """Run the first example of a section as a file in `directory`."""
    path = directory / "example.py"
    path.write_text(examples(section)[0], "utf-8")
    runpy.run_path(str(path))


def steps(section: str) -> list[tuple[str, str, str]]:
    """(file, the definition after which it is put, code) of each step of a section."""
    found: list[tuple[str, str, str]] = STEP.findall(section_of(section))
    return found


def followed(section: str, directory: Path) -> Path:
    """A copy of the tree's code in `directory` with the section's steps done."""
    for room in ("model", "engine", "service", "training", "python"):
        shutil.copytree(ROOT / room, directory / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "topkapi", directory / "topkapi", symlinks=True)
    for name, after, code in steps(section):
        path = directory / name
        text = path.read_text("utf-8")
        (anchor,) = (node for node in ast.walk(ast.parse(text)) if named(node) == after)
        lines = text.splitlines(keepends=True)
        apart = "\n\n" if isinstance(anchor, ast.FunctionDef) else ""
        lines.insert(anchor.end_lineno or 0, apart + textwrap.indent(code, " " * anchor.col_offset))
        path.write_text("".join(lines), "utf-8")
    return directory


def named(node: ast.AST) -> str | None:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None


def told(root: Path, program: str) -> Any:
    """What a program that imports from `root` prints last, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
