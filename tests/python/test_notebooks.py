"""The notebooks of docs/notebooks: well-formed, small, and run as they stand, while an event loop runs."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 16_000


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["from-text-to-chat", "why-this-token"]


def test_what_the_readme_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (ROOT / "README.md").read_text("utf-8").split("\n## Use it from Python\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "readme.py").write_text(block, "utf-8")
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(tmp_path / "readme.py"))["model"].close()
    printed = capsys.readouterr().out
    assert "Paris" in printed and "candidates" in printed


def cells(path: Path) -> list[dict[str, Any]]:
    """The cells, after checking what nbformat 4.5 asks of them."""
    content = json.loads(path.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert content["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    found: list[dict[str, Any]] = content["cells"]
    names = [cell["id"] for cell in found]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in found:
        wanted = {"cell_type", "id", "metadata", "source"}
        wanted |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == wanted and cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])
    return found


@pytest.mark.parametrize(
    "path",
    # One trains for ten seconds.
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem == "from-text-to-chat" else []) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert path.stat().st_size < MOST_BYTES, "outputs are made where it is read"
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert "pip" in "".join(code[0]["source"]) and "import topkapi" in code[0]["source"][1]
    blocks = []
    for cell in code:
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            source = re.sub(r"(STEPS = )\d+", r"\g<1>3", source)
        *_, last = source.rstrip().split("\n")
        # What stands in the last line of a cell is shown.
        shown = re.fullmatch(r"[\w.]+(\(\w*\))?", last)
        if shown and not last.startswith("model.close"):
            source = source.rstrip().removesuffix(last) + f"_shown({last})\n"
        blocks.append(source)
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(blocks), "utf-8")
    monkeypatch.chdir(tmp_path)
    pictures: list[object] = []

    def show(value: Any) -> None:
        made = value._repr_png_() if hasattr(value, "_repr_png_") else value._repr_html_() if hasattr(
            value, "_repr_html_") else repr(value)  # fmt: skip
        assert made
        pictures.append(made)

    async def as_notebooks_do() -> None:
        runpy.run_path(str(script), {"_shown": show})

    asyncio.run(as_notebooks_do())
    printed = capsys.readouterr().out
    assert len(pictures) >= 4
    assert "topkapi serve" in printed if path.stem == "from-text-to-chat" else "perplexity" in printed
