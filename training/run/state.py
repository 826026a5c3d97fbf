"""How far a run has come, and what it can say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from topkapi.model.errors import SettingsError
from topkapi.training.recipes.recipe import Metric

# Evaluations without a better validation loss, while the training loss still falls, after which it is overfitting.
OVERFITTING_EVALUATIONS = 3

# Of all others, lower is better.
_HIGHER_IS_BETTER = ("validation_accuracy", "validation_margin")


@dataclass
class TrainerState:
    """How far a run has come: together with the tensors, all that decides how it goes on. Saved as JSON.

    `step` counts finished updates, `tokens` trained targets. Losses are those of the latest evaluation; `best_…` are
    those of the lowest validation loss, `first_…` those before the first step. `ranking` holds
    `[value of the chosen metric, step]`, best first.
    `level` and `deviation` are the running mean of the batches' losses and of their distance from it, over `observed`
    steps; `risen` is the step at which the level stood far above the first loss. `skipped` are numbers of batches that
    made the loss spike; `spikes` are the lines of `metrics.jsonl` on those since the last regular save.
    Without `held_out` there is no validation data, and training data stand in for them.
    """

    step: int = 0
    tokens: int = 0
    train_loss: float | None = None
    validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    best_train_loss: float | None = None
    first_train_loss: float | None = None
    first_validation_loss: float | None = None
    evaluations_since_best: int = 0
    overfitting: bool = False
    copied: int | None = None
    memorising: bool = False
    ranking: list[list[float]] = field(default_factory=list)
    level: float | None = None
    deviation: float = 0.0
    observed: int = 0
    risen: int | None = None
    last_spike: int | None = None
    skipped: list[int] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)
    finished: str | None = None
    held_out: bool = True

    @classmethod
    def saved(cls, fields: Mapping[str, Any]) -> TrainerState:
        """The state that was saved with these `fields`, be it by an earlier version."""
        state = cls(**{{"leaps": "spikes"}.get(name, name): value for name, value in fields.items()})
        if not state.ranking and state.best_loss is not None and state.best_step is not None:
            # There was one kind of best.
            state.ranking = [[state.best_loss, state.best_step]]
        return state

    def note(self, train_loss: float, validation_loss: float) -> bool:
        """Take in an evaluation; whether it is the best so far, and better than before the first step."""
        self.train_loss, self.validation_loss = train_loss, validation_loss
        if self.step == 0:
            self.first_train_loss, self.first_validation_loss = train_loss, validation_loss
            return False
        if self.best_loss is None or validation_loss < self.best_loss:
            self.best_step, self.best_loss, self.best_train_loss = self.step, validation_loss, train_loss
            self.evaluations_since_best, self.overfitting = 0, False
            return self.first_validation_loss is None or validation_loss < self.first_validation_loss
        self.evaluations_since_best += 1
        assert self.best_train_loss is not None, "set with best_loss"
        self.overfitting |= self.evaluations_since_best >= OVERFITTING_EVALUATIONS and train_loss < self.best_train_loss
        return False

    def rank(self, metric: Metric, keep: int, measured: Mapping[str, float]) -> bool:
        """Rank the model as it stands among the `keep` best by `metric`; whether it is one of them.

        `measured` is what was found on the validation data. Of equal ones the earlier is better. Raises
        `SettingsError` for a metric that this run does not measure.
        """
        if self.step == 0:
            return False
        values: dict[str, float | None] = {f"validation_{name}": value for name, value in measured.items()}
        values |= {"train_loss": self.train_loss, "smoothed_loss": self.level, "copied_from_training": self.copied}
        value = values.get(metric)
        if value is None:
            known = ", ".join(sorted(name for name, value in values.items() if value is not None))
            raise SettingsError(f"this run does not measure {metric}", field="best_metric", hint=f"it measures {known}")
        self.ranking.append([value, self.step])
        sign = -1 if metric in _HIGHER_IS_BETTER else 1
        self.ranking = sorted(self.ranking, key=lambda entry: (sign * entry[0], entry[1]))[:keep]
        return self.step in self.best_steps()

    def best_steps(self) -> list[int]:
        """The steps of the best checkpoints, best first."""
        return [int(step) for _, step in self.ranking]

    def batch_number(self) -> int:
        """Which batch the next update trains on: those that were skipped are left out of the order."""
        number = self.step
        for skipped in sorted(self.skipped):
            number += skipped <= number
        return number

    def verdict(self) -> str:
        """The best evaluation in one line, and whether the run overfits since."""
        if self.best_loss is None:
            return "not evaluated"
        line = f"best {'validation' if self.held_out else 'training'} {self.best_loss:.3f} at step {self.best_step}"
        if self.overfitting:
            line += f"; overfitting since (validation {self.validation_loss:.3f}, training {self.train_loss:.3f})"
        if self.first_validation_loss is not None and self.best_loss >= self.first_validation_loss:
            line += f"; no better than before the first step ({self.first_validation_loss:.3f})"
        return line
