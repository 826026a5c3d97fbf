"""The results of an evaluation as a table on the console, as markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from topkapi.model.errors import SettingsError
from topkapi.training.evaluation.measures import Interval, Measure, difference, exact_chance, interval
from topkapi.training.evaluation.scoring_tasks import Outcome
from topkapi.training.evaluation.tasks import Kind, Task


@dataclass(frozen=True)
class Line:
    """One figure of every checkpoint, with the paired differences of the later ones from the first (None: the figures
    do not mean the same, as perplexities over different vocabularies)."""

    task: str
    measure: Measure
    intervals: list[Interval]
    differences: list[Interval | None]


@dataclass
class Evaluation:
    """Everything one call found: `outcomes[task][checkpoint]`, with the seconds each took."""

    checkpoints: list[str]
    tasks: list[Task]
    outcomes: list[list[Outcome]]
    seconds: list[list[float]]

    def lines(self, *, parts: Container[str] = ()) -> Iterator[Line]:
        """The figures in order; of tasks of the kinds `parts` also those of their parts."""
        for task, outcomes in zip(self.tasks, self.outcomes, strict=True):
            kinds = [[outcome.measures for outcome in outcomes]]
            if task.kind in parts:
                kinds.append([outcome.parts for outcome in outcomes])
            for kind in kinds:
                # A figure that only one checkpoint has (a judge that failed) is left out of the table, not of the JSON.
                shared = [one.name for one in kind[0] if all(one.name in _names(other) for other in kind)]
                for name in shared:
                    yield _line(task.name, [next(one for one in own if one.name == name) for own in kind])

    def notes(self) -> Iterator[str]:
        """Remarks, each with its task, and its checkpoint where not all have it."""
        for task, outcomes in zip(self.tasks, self.outcomes, strict=True):
            for note in dict.fromkeys(note for outcome in outcomes for note in outcome.notes):
                having = [name for name, one in zip(self.checkpoints, outcomes, strict=True) if note in one.notes]
                whose = "" if len(having) == len(self.checkpoints) else f" ({', '.join(having)})"
                yield f"{task.name}{whose}: {note}"


def _names(measures: Sequence[Measure]) -> list[str]:
    return [measure.name for measure in measures]


def _line(task: str, measures: Sequence[Measure]) -> Line:
    intervals = [interval(measure) for measure in measures]
    first = measures[0]
    differences = [
        replace(difference(intervals[0], other), chance=exact_chance(first, measure))
        if measure.comparable == first.comparable and len(measure.totals) == len(first.totals)
        else None
        for measure, other in zip(measures[1:], intervals[1:], strict=True)
    ]
    return Line(task, first, intervals, differences)


def shown(value: float, unit: str, *, sign: bool = False) -> str:
    """A figure in as many digits as mean something."""
    if math.isnan(value):
        return "-"
    if unit == "%":
        return f"{100 * value:{'+' if sign else ''}.1f}"
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:{'+' if sign else ''},.{digits}f}"


def table(evaluation: Evaluation, *, parts: Container[str] = ()) -> list[list[str]]:
    """Rows of cells, the first row the heading; with the parts of tasks of the kinds `parts`.

    A difference whose interval leaves zero out carries a star, on few items only where an exact test agrees."""
    several = len(evaluation.checkpoints) > 1
    heading = ["task", "measure", "items"]
    for name in evaluation.checkpoints:
        heading += [name, "95 %"]
    if several:
        heading += [f"{name} - {evaluation.checkpoints[0]}" for name in evaluation.checkpoints[1:]]
    rows = [heading]
    for line in evaluation.lines(parts=parts):
        unit = line.measure.unit
        row = [line.task, line.measure.name + (" (%)" if unit == "%" else ""), f"{line.measure.items:,}"]
        for one in line.intervals:
            bounds = "-" if math.isnan(one.low) else f"{shown(one.low, unit)} to {shown(one.high, unit)}"
            row += [shown(one.value, unit), bounds]
        row += ["not comparable" if one is None else _difference(one, unit) for one in line.differences]
        rows.append(row)
    return rows


def _difference(one: Interval, unit: str) -> str:
    if math.isnan(one.low):
        return shown(one.value, unit, sign=True)
    star = " *" if one.differs else ""
    bounds = f"{shown(one.low, unit, sign=True)} to {shown(one.high, unit, sign=True)}"
    return f"{shown(one.value, unit, sign=True)} ({bounds}){star}"


STAR = (
    "* the 95 % interval of the paired difference leaves zero out (bootstrap over items), and where at most 12 items "
    "differ, an exact test as well: six items at least."
)


def console(evaluation: Evaluation) -> str:
    """The table in columns, with the remarks below it."""
    rows = table(evaluation, parts=("exercises",))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if any(cell.endswith("*") for row in rows for cell in row):
        lines.append(STAR)
    return "\n".join([*lines, *evaluation.notes()])


def markdown(evaluation: Evaluation) -> str:
    """The whole table, parts too, as markdown."""
    heading, *rows = table(evaluation, parts=get_args(Kind))
    lines = ["# Evaluation", "", _cells(heading), "|---|---|" + "---:|" * (len(heading) - 2), *map(_cells, rows), ""]
    if any(cell.endswith("*") for row in rows for cell in row):
        lines += ["\\" + STAR, ""]
    lines += [f"- {note}" for note in evaluation.notes()]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row) + " |"


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """All figures, with their intervals and differences; NaN is null."""
    tasks = []
    lines = list(evaluation.lines(parts=get_args(Kind)))
    for index, task in enumerate(evaluation.tasks):
        tasks.append(
            {
                **task.model_dump(mode="json", exclude={"file"}),
                "file": task.file.name,
                "seconds": dict(zip(evaluation.checkpoints, evaluation.seconds[index], strict=True)),
                "measures": [_line_json(line, evaluation.checkpoints) for line in lines if line.task == task.name],
            }
        )
    return {"checkpoints": evaluation.checkpoints, "tasks": tasks, "notes": list(evaluation.notes())}


def _line_json(line: Line, names: Sequence[str]) -> dict[str, Any]:
    return {
        "measure": line.measure.name,
        "items": line.measure.items,
        "higher_is_better": line.measure.higher_is_better,
        "values": {name: _interval_json(one) for name, one in zip(names, line.intervals, strict=True)},
        f"differences from {names[0]}": {
            name: None if one is None else {**_interval_json(one), "exact_chance": one.chance}
            for name, one in zip(names[1:], line.differences, strict=True)
        },
    }


def _interval_json(one: Interval) -> Mapping[str, float | None]:
    return {
        name: value if math.isfinite(value) else None
        for name, value in (("value", one.value), ("low", one.low), ("high", one.high))
    }


def write(evaluation: Evaluation, directory: Path) -> None:
    """`evaluation.json`, `evaluation.md`, and `items.jsonl` with every item of every checkpoint."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        content = json.dumps(as_json(evaluation), indent=2, ensure_ascii=False)
        (directory / "evaluation.json").write_text(content + "\n", encoding="utf-8")
        (directory / "evaluation.md").write_text(markdown(evaluation), encoding="utf-8")
        with (directory / "items.jsonl").open("w", encoding="utf-8") as file:
            for task, outcomes in zip(evaluation.tasks, evaluation.outcomes, strict=True):
                for name, outcome in zip(evaluation.checkpoints, outcomes, strict=True):
                    for number, row in enumerate(outcome.rows):
                        record = {"task": task.name, "checkpoint": name, "item": number, **row}
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise SettingsError(
            f"{directory} cannot be written: {error.strerror or error}", field="out", hint="choose another --out"
        ) from None
