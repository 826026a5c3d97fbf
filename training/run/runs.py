"""`topkapi runs`: the runs of a folder, listed, compared and drawn over one another."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError
from topkapi.training.run.process import training_process

COLUMNS = ("name", "steps", "tokens", "best validation", "at step", "tokens/s", "state")


@dataclass(frozen=True)
class Summary:
    """One line of the list. `state` is finished, running or stopped."""

    name: str
    steps: int
    tokens: int
    best_loss: float | None
    best_step: int | None
    tokens_per_s: float | None
    state: str

    def cells(self) -> list[str]:
        """The line, as text."""
        best = "" if self.best_loss is None else f"{self.best_loss:.3f}"
        speed = "" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}"
        step = "" if self.best_step is None else f"{self.best_step:,}"
        return [self.name, f"{self.steps:,}", f"{self.tokens:,}", best, step, speed, self.state]


def add_runs(subparsers: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = subparsers.add_parser(
        "runs",
        help="list training runs, or compare some",
        description="List the training runs below a folder; with --compare, say in which settings some differ and "
        "draw their losses over one another.",
    )
    command.add_argument("folder", nargs="?", default=Path("runs"), type=Path, metavar="DIR", help="folder [runs]")
    command.add_argument("--compare", nargs="+", type=Path, metavar="RUN", help="run directories")
    command.add_argument("--plot", type=Path, metavar="PNG", help="where --compare draws [comparison.png]")
    command.add_argument(
        "--by", choices=("steps", "epochs", "tokens"), help="what --compare draws losses against [steps]"
    )
    command.add_argument("--json", action="store_true", help="print as JSON")
    command.set_defaults(handler=_runs)


def _runs(arguments: argparse.Namespace) -> int:
    if arguments.compare is None:
        for name in ("plot", "by"):
            if getattr(arguments, name) is not None:
                raise SettingsError(
                    f"--{name} draws what --compare compares", field=name, hint="name runs with --compare"
                )
        summaries = [summary(path) for path in find_runs(arguments.folder)]
        if arguments.json:
            print(json.dumps([vars(each) for each in summaries], indent=2))
        else:
            _print_table([list(COLUMNS), *(each.cells() for each in summaries)])
        return 0
    for path in arguments.compare:
        if not (path / "config.yaml").is_file():
            raise SettingsError(f"there is no training run in {path}", field="compare", hint="topkapi runs lists them")
    different = differences(arguments.compare)
    if arguments.json:
        runs = [vars(summary(path)) for path in arguments.compare]
        print(json.dumps({"runs": runs, "differences": different}, indent=2))
    else:
        _print_table([list(COLUMNS), *(summary(path).cells() for path in arguments.compare)])
        print()
        rows = [[name, *(str(value) for value in values)] for name, values in different.items()]
        _print_table([["setting", *(path.name for path in arguments.compare)], *rows])
    target = arguments.plot or Path("comparison.png")
    from topkapi.training.run.directory import RunDirectory
    from topkapi.training.run.plots import draw_comparison, save

    records = {path.name: RunDirectory(path).records("metrics.jsonl") for path in arguments.compare}
    save(draw_comparison(records, arguments.by or "steps"), target)
    if not arguments.json:
        print(f"\ncurves: {target}")
    return 0


def find_runs(folder: Path) -> list[Path]:
    """The run directories in `folder`, or itself, by name. Raises `SettingsError` where there is none."""
    found = sorted({path.parent for path in (*folder.glob("config.yaml"), *folder.glob("*/config.yaml"))})
    if not found:
        raise SettingsError(f"there are no training runs in {folder}", field="folder", hint="give another folder")
    return found


def summary(path: Path) -> Summary:
    """What a run's records say of it."""
    # torch comes with it, and `topkapi --help` is to answer at once.
    from topkapi.training.run.directory import RunDirectory

    run = RunDirectory(path)
    records, timings = run.records("metrics.jsonl"), run.records("timings.jsonl")
    evaluations = [record for record in records if record.get("validation_loss") is not None and record["step"]]
    best = min(evaluations, key=lambda record: record["validation_loss"], default={})
    finished = (path / "report.md").is_file()
    return Summary(
        name=path.resolve().name,
        steps=max((record["step"] for record in records if "event" not in record), default=0),
        tokens=max((record.get("tokens", 0) for record in records), default=0),
        best_loss=best.get("validation_loss"),
        best_step=best.get("step"),
        tokens_per_s=timings[-1]["tokens_per_s"] if timings else None,
        state="running" if training_process(path) else "finished" if finished else "stopped",
    )


def differences(paths: list[Path]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with their values."""
    from topkapi.training.run.directory import RunDirectory

    configs = [RunDirectory(path).config() for path in paths]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names if name != "out"}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
