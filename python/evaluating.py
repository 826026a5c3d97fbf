"""`topkapi.evaluate`: the command of that name from Python."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from topkapi.python.declaring import declares
from topkapi.python.errors import readable
from topkapi.python.runs import Run
from topkapi.python.table import Table

if TYPE_CHECKING:
    from topkapi.training.evaluation import report

Checkpoint = str | os.PathLike[str] | Run
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_FILES = ("perplexity", "lambada", "blimp", "choices", "instructions", "exercises")


class Evaluation:
    """What `topkapi.evaluate` found. Printed it is the command's table.

    `table` has a row for each figure of each checkpoint: value and 95 % interval, and from the second checkpoint on the
    paired difference from the first with its interval. `as_dict()` is what evaluation.json holds.
    """

    def __init__(self, found: report.Evaluation) -> None:
        self._found = found

    @property
    def table(self) -> Table:
        """Rows of task, measure, items, checkpoint, value, low, high, and of differences from the first checkpoint."""
        rows = []
        for task in self.as_dict()["tasks"]:
            for measure in task["measures"]:
                differences = next(value for name, value in measure.items() if name.startswith("differences from "))
                for checkpoint, interval in measure["values"].items():
                    row = {"task": task["name"], "measure": measure["measure"], "items": measure["items"]}
                    row |= {"checkpoint": checkpoint, **interval}
                    if other := differences.get(checkpoint):
                        row |= {f"difference_{name}": value for name, value in other.items()}
                    rows.append(row)
        return Table(rows)

    def value(self, measure: str, *, task: str | None = None, checkpoint: str | None = None) -> float:
        """One figure; without a task or a checkpoint, of the first that has it. Raises `KeyError` where none has."""
        for row in self.table:
            if row["measure"] == measure and task in (None, row["task"]) and checkpoint in (None, row["checkpoint"]):
                return float(row["value"])
        raise KeyError(f"no figure {measure!r}; there are: {', '.join(dict.fromkeys(self.table.column('measure')))}")

    def as_dict(self) -> dict[str, Any]:
        """All figures, with their intervals and differences."""
        from topkapi.training.evaluation import report

        return report.as_json(self._found)

    def __str__(self) -> str:
        from topkapi.training.evaluation import report

        return report.console(self._found)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


@declares({})
def evaluate(
    checkpoint: Checkpoint | Sequence[Checkpoint],
    *,
    perplexity: Files = (),
    lambada: Files = (),
    blimp: Files = (),
    choices: Files = (),
    instructions: Files = (),
    exercises: Files = (),
    tasks: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    test_examples: int | None = None,
    train_examples: int | None = None,
    chat_template: str | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "float32",
    threads: int | None = None,
) -> Evaluation:
    """Measure checkpoints on texts, questions and instructions, with 95 % intervals.

        found = topkapi.evaluate("runs/book/best", perplexity="held-out.txt")
        print(found.value("perplexity"))

    Several checkpoints are compared with the first; a `Run` stands for its best one. The keywords are the flags of
    `topkapi evaluate`: files for what is measured (`perplexity`: texts; `exercises`: rows of `topkapi instructions make
    --held-out`; …, see docs/evaluation.md), or `tasks`, a YAML file; `limit` takes the first rows of each; `out` writes
    evaluation.json, evaluation.md and items.jsonl. Raises `topkapi.TopkapiError`.
    """
    given = dict(locals())
    several = isinstance(checkpoint, Sequence) and not isinstance(checkpoint, str)
    checkpoints: Any = checkpoint if several else [checkpoint]
    given["checkpoint"] = [os.fspath(each.best if isinstance(each, Run) else each) for each in checkpoints]
    for name in _FILES:
        given[name] = [given[name]] if isinstance(given[name], str | os.PathLike) else list(given[name])
        given[name] = [os.fspath(each) for each in given[name]]
    for name in ("tasks", "out"):
        given[name] = None if given[name] is None else Path(given[name])
    with readable(given.keys()):
        from topkapi.training.evaluation.command import measured

        return Evaluation(measured(argparse.Namespace(**given)))
