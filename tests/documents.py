"""Examples of the documents, for the tests that execute them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"


def example(section: str, page: str = "extending.md") -> str:
    """The first block of Python in a section of a page of docs/."""
    text = (DOCUMENTS / page).read_text()
    found = re.search(rf"^## {re.escape(section)}\n(?:(?!^## ).*\n)*?```python\n(.*?)```", text, re.M | re.S)
    assert found, f"docs/{page} has no example under {section!r}"
    return found[1]


def execute(section: str, directory: Path, page: str = "extending.md") -> dict[str, Any]:
    """Run the example of a section as a file in `directory`; the names it makes."""
    path = directory / "example.py"
    path.write_text(example(section, page))
    return runpy.run_path(str(path))
