"""docs/extending.md, "A column of the report", done as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.extending import followed, steps, told

PROGRAM = """
import json
from pathlib import Path
from topkapi.service.commands.cli import main

Path("rhyme.txt").write_text("Jack and Jill went up the hill to fetch a pail of water. " * 90)
shape = "--hidden-size 32 --intermediate-size 64 --num-layers 1 --num-heads 2 --num-kv-heads 1 --head-dim 16"
more = "--context-length 32 --vocab-size 300 --batch-size 4 --threads 1 --max-steps 5 --evaluate-every 2"
assert main(["pretrain", "--data", "rhyme.txt", "--out", "run", *shape.split(), *more.split()]) == 0
records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
print(json.dumps({
    "norms": {each["step"]: each["gradient_norm"] for each in records if "learning_rate" in each},
    "markdown": Path("run/report.md").read_text(),
    "page": Path("run/report.html").read_text(),
}))
"""


@pytest.mark.slow
def test_a_column_of_the_report_is_a_field_of_its_evaluations(tmp_path: Path) -> None:
    assert len(steps("A column of the report")) == 2
    found = told(followed("A column of the report", tmp_path), PROGRAM)
    norms = {int(step): norm for step, norm in found["norms"].items()}
    assert norms.keys() == {1, 2, 3, 4, 5}
    expected = ["", f"{max(norms[1], norms[2]):.3f}", f"{max(norms[3], norms[4]):.3f}", f"{norms[5]:.3f}"]
    heading, _, *rows = found["markdown"].split("## Evaluation\n\n")[1].split("\n\n")[0].splitlines()
    assert heading == "| step | train loss | validation loss | largest gradient norm |"
    assert [row.split("|")[-2].strip() for row in rows] == expected
    assert "<th>largest gradient norm</th></tr>" in found["page"]
    assert all(f"<td>{cell}</td></tr>" in found["page"] for cell in expected)
