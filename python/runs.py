"""A training run as an object: its metrics as a table, its plots, and its checkpoints."""

from __future__ import annotations

import io
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from topkapi.model.errors import SettingsError
from topkapi.python.errors import readable
from topkapi.python.table import Table, html_table

if TYPE_CHECKING:
    from topkapi.python.model import Model
    from topkapi.training.run.directory import RunDirectory
    from topkapi.training.run.runs import Summary


class Run:
    """A training run, finished or not: what `topkapi.pretrain` and its like return, or `topkapi.Run.open("runs/x")`.

    path            its directory
    config          its recipe, every field of it
    metrics         a table: the loss of each step, and at evaluations those on training and validation data
    evaluations     the rows of it that evaluations wrote
    samples         a table: what the model wrote on the way
    best, last      the paths of its checkpoints, as `topkapi.load` and `topkapi serve` take them
    plot()          the losses as a picture, which shows in a notebook
    load()          the best checkpoint, ready to be asked
    summary         steps, tokens, the best validation loss, and whether it is finished, running or stopped

    What is read is read when it is asked for, so an object of a run that goes on shows how far it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            message, hint = f"there is no training run in {self.path}", "name the directory with config.yaml in it"
            raise SettingsError(message, field="path", hint=hint)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run in a directory. Raises `topkapi.TopkapiError` where there is none."""
        with readable():
            return cls(path)

    @cached_property
    def _directory(self) -> RunDirectory:
        from topkapi.training.run.directory import RunDirectory

        return RunDirectory(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The run's recipe."""
        return self._directory.config()

    @property
    def metrics(self) -> Table:
        """A row for each step with its loss, learning rate and gradient norm, and for each evaluation with its."""
        return Table(self._directory.records("metrics.jsonl"))

    @property
    def evaluations(self) -> Table:
        """The rows of evaluations: losses on training and validation data, and what else was measured."""
        return self.metrics.where("train_loss")

    @property
    def samples(self) -> Table:
        """What the model wrote at evaluations, with the step and the prompt."""
        return Table(self._directory.records("samples.jsonl"))

    @property
    def timings(self) -> Table:
        """Seconds and tokens per second since the run was last started."""
        return Table(self._directory.records("timings.jsonl"))

    @property
    def summary(self) -> Summary:
        """The run in one line, as `topkapi runs` lists it."""
        from topkapi.training.run.runs import summary

        return summary(self.path)

    @property
    def report(self) -> str:
        """The report of a finished run, in Markdown."""
        return self._file("report.md", "the run is not finished").read_text("utf-8")

    @property
    def best(self) -> Path:
        """The checkpoint that was best on the validation data. Raises `topkapi.TopkapiError` before the first save."""
        return self._file("best", "the run has kept no checkpoint yet")

    @property
    def last(self) -> Path:
        """The latest checkpoint. Raises `topkapi.TopkapiError` before the first save."""
        return self._file("last", "the run has kept no checkpoint yet")

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints that are kept, by their steps."""
        return {step: self._directory.checkpoint(step) for step in self._directory.steps("checkpoints")}

    def load(self, which: Literal["best", "last"] | int = "best", **options: Any) -> Model:
        """A checkpoint of the run, ready to be asked: the best, the last, or that of a step.

        `options` are those of `topkapi.load`. An adapter is loaded with its base.
        """
        from topkapi.python.model import load

        if isinstance(which, str):
            return load(self.best if which == "best" else self.last, **options)
        found = self.checkpoints.get(which)
        if found is None:
            steps = ", ".join(map(str, self.checkpoints)) or "none"
            with readable():
                raise SettingsError(f"no checkpoint of step {which} is kept", field="which", hint=f"there are: {steps}")
        return load(found, **options)

    def plot(self, what: Literal["loss", "schedule"] = "loss") -> Plot:
        """The losses over the steps, or the learning rate and the gradient norm: a picture, with `save(path)`."""
        from topkapi.training.run.plots import draw_losses, draw_schedule
        from topkapi.training.run.state import TrainerState

        records = list(self.metrics)
        if what == "schedule":
            return Plot(draw_schedule(records))
        losses = [
            (each["step"], each["train_loss"], each.get("validation_loss", each["train_loss"]))
            for each in records
            if "train_loss" in each
        ]
        # Without data held out, training data stand in for them.
        state = TrainerState(held_out=any(trained != held_out for _, trained, held_out in losses))
        for step, trained, held_out in losses:
            state.step = step
            state.note(trained, held_out)
        for record in records:
            state.step = max(state.step, record["step"])
            state.tokens = max(state.tokens, record.get("tokens", 0))
        return Plot(draw_losses(records, state))

    def _file(self, name: str, missing: str) -> Path:
        path = self.path / name
        if not path.exists():
            with readable():
                raise SettingsError(
                    f"{path} is not there: {missing}", field=name, hint="wait for it, or resume the run"
                )
        return path

    def __repr__(self) -> str:
        return f"<topkapi.Run {os.fspath(self.path)!r}: {self.summary.state}, {self.summary.steps:,} steps>"

    def _repr_html_(self) -> str:
        from topkapi.training.run.runs import COLUMNS

        return html_table(COLUMNS, [self.summary.cells()])


class Plot:
    """A picture: it shows itself in a notebook; `save(path)` writes it, `figure` is matplotlib's."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture, in the format that the name ends in."""
        self.figure.savefig(path, dpi=120)

    def __repr__(self) -> str:
        return "<a plot: notebooks show it, .save('plot.png') writes it>"

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.figure.savefig(content, format="png", dpi=80)
        return content.getvalue()
