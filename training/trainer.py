"""The training loop: updates, evaluations, samples, saves; the same for pretraining and fine-tuning."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.errors import SettingsError, TopkapiError
from model.transformer import Decoder
from training.console import Console, duration
from training.data.windows import Batch, Loader
from training.loss import NextToken, Objective
from training.optim import Optimizers
from training.recipe import TrainingRecipe
from training.run import RunDirectory
from training.schedule import Schedule

# Evaluations without a better validation loss, while the training loss still falls, after which it is overfitting.
OVERFITTING_EVALUATIONS = 3


class Diverged(TopkapiError):
    """The loss is no longer a number."""

    kind = "diverged"


class Interrupted(TopkapiError):
    """The run was asked to stop; it has saved its state and can be resumed."""

    kind = "interrupted"


@dataclass
class Standing:
    """How far a run has come: together with the tensors, all that decides how it goes on. Saved as JSON.

    `step` counts finished updates, `tokens` trained targets. Losses are those of the latest evaluation.
    """

    step: int = 0
    tokens: int = 0
    train_loss: float | None = None
    validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    best_train_loss: float | None = None
    evaluations_since_best: int = 0
    overfitting: bool = False
    finished: str | None = None

    def note(self, train_loss: float, validation_loss: float) -> bool:
        """Take in an evaluation; whether it is the best so far. The untrained model is never the best."""
        self.train_loss, self.validation_loss = train_loss, validation_loss
        if self.step == 0:
            return False
        if self.best_loss is None or validation_loss < self.best_loss:
            self.best_step, self.best_loss, self.best_train_loss = self.step, validation_loss, train_loss
            self.evaluations_since_best, self.overfitting = 0, False
            return True
        self.evaluations_since_best += 1
        assert self.best_train_loss is not None, "set with best_loss"
        self.overfitting |= self.evaluations_since_best >= OVERFITTING_EVALUATIONS and train_loss < self.best_train_loss
        return False

    def verdict(self) -> str:
        """The best evaluation in one line, and whether the run overfits since."""
        if self.best_loss is None:
            return "not evaluated"
        line = f"best validation {self.best_loss:.3f} at step {self.best_step}"
        if self.overfitting:
            line += f"; overfitting since (validation {self.validation_loss:.3f}, training {self.train_loss:.3f})"
        return line


@dataclass
class Training:
    """Everything one run is made of.

    `save(path, details)` writes a checkpoint, `sample(model, standing)` yields records with `prompt` and `text`,
    `facts` go into every checkpoint's `topkapi.json` and must not change when a run is resumed. `command` is how the
    user resumes. Without validation batches the training batches take their place.
    """

    recipe: TrainingRecipe
    model: Decoder
    optimizers: Optimizers
    schedule: Schedule
    loader: Loader
    train_batches: list[Batch]
    validation_batches: list[Batch]
    directory: RunDirectory
    console: Console
    save: Callable[[Path, Mapping[str, Any]], None]
    sample: Callable[[Standing], Iterator[dict[str, Any]]]
    facts: dict[str, Any]
    command: str
    evaluate_every: int = 1
    save_every: int = 1
    objective: Objective = field(default_factory=NextToken)
    standing: Standing = field(default_factory=Standing)
    _stop: signal.Signals | None = None

    def run(self) -> Standing:
        """Train to the end, or to where the run stops early, from wherever `standing` is.

        Raises `Diverged` for a loss that is not a number and `Interrupted` after SIGINT or SIGTERM, once saved.
        """
        self.model.recompute = self.recipe.recompute
        hidden = torch.compile(self.model.hidden) if self.recipe.compile else None
        standing, total = self.standing, self.schedule.total_steps
        self.console.start(total, standing.step)
        try:
            with self._signals():
                if standing.step == 0:
                    self._boundary()
                began, first = time.monotonic(), standing.step
                tokens, updating = standing.tokens, 0.0
                while standing.step < total and standing.finished is None:
                    started = time.monotonic()
                    loss, norm, factor = self._update(hidden)
                    updating += time.monotonic() - started
                    self.directory.append(
                        "metrics.jsonl",
                        {
                            "step": standing.step,
                            "tokens": standing.tokens,
                            "loss": loss,
                            "learning_rate": self.recipe.learning_rate * factor,
                            "gradient_norm": norm,
                        },
                    )
                    elapsed = time.monotonic() - began
                    speed = (standing.tokens - tokens) / updating
                    left = (total - standing.step) * elapsed / (standing.step - first)
                    self.console.advance(standing.step, f"loss {loss:.3f}  {speed:,.0f} tokens/s", left)
                    self._boundary(speed, elapsed)
        finally:
            self.console.stop()
        return standing

    def load_state(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `RunDirectory.load_state` found."""
        self.standing = Standing(**facts["standing"])
        weights: dict[str, torch.Tensor] = {}
        optimizer: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(":")
            (weights if kind == "model" else optimizer)[rest] = tensor
        with torch.no_grad():
            for name, parameter in trained_parameters(self.model):
                parameter.copy_(weights[name])
        self.optimizers.load_state_tensors(optimizer)
        if self.standing.best_step is not None:
            self.directory.point("best", self.standing.best_step)
        self.directory.point("last", self.standing.step)
        # What was written after that state is written again, and what a killed prune left is pruned.
        self.directory.prune(self.standing.best_step, self.standing.step, self.recipe.keep)

    def _update(self, hidden: Any) -> tuple[float, float, float]:
        standing = self.standing
        batch = self.loader.batch(standing.step)
        # Dropout is a function of the seed and the step: nothing in between can disturb it, and nothing needs saving.
        torch.manual_seed(_mix(self.recipe.seed, standing.step))
        self.model.train()
        loss = self.objective.backward(
            self.model,
            batch,
            divisor=batch.weight(),
            micro_batch_size=self.recipe.micro_batch_size,
            hidden=hidden,
            z_loss=self.recipe.z_loss,
        )
        norm = nn.utils.clip_grad_norm_(self.optimizers.parameters(), self.recipe.clip or math.inf).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(
                f"the loss became {loss} at step {standing.step + 1} (gradient norm {norm})",
                hint="lower --learning-rate, lengthen --warmup or set --clip"
                + ("" if standing.best_step is None else f"; {self.directory.path / 'best'} is intact"),
            )
        factor = self.schedule.factor(standing.step)
        self.optimizers.step(factor)
        standing.step += 1
        standing.tokens += batch.token_count()
        return loss, norm, factor

    def _boundary(self, speed: float | None = None, seconds: float = 0.0) -> None:
        """What is due between two updates, always in this order, so that a saved state has it all behind it."""
        standing, step = self.standing, self.standing.step
        last = step == self.schedule.total_steps
        if step % self.evaluate_every == 0 or last:
            self._evaluate(speed, seconds)
            last = last or standing.finished is not None
        if self._samples_due(last):
            self._sample()
        saved = step and (last or step % self.save_every == 0)
        if saved:
            self._save()
        if self._stop is not None and not last:
            if not saved and step:
                self._save()
            raise Interrupted(
                f"{self._stop.name}: stopped at step {step} of {self.schedule.total_steps}",
                hint=f"continue with: {self.command}",
            )

    def _evaluate(self, speed: float | None, seconds: float) -> None:
        standing = self.standing
        measured = self.objective.evaluate(self.model, self.train_batches, self.recipe.micro_batch_size)
        train = measured["loss"]
        if self.validation_batches:
            measured = self.objective.evaluate(self.model, self.validation_batches, self.recipe.micro_batch_size)
        validation = measured["loss"]
        if not math.isfinite(validation):
            raise Diverged(
                f"the validation loss became {validation} at step {standing.step}", hint="lower --learning-rate"
            )
        overfitting = standing.overfitting
        best = standing.note(train, validation)
        self.directory.append(
            "metrics.jsonl",
            {
                "step": standing.step,
                "epoch": standing.step / self.loader.steps_per_epoch,
                "tokens": standing.tokens,
                "train_loss": train,
                **{f"validation_{name}": value for name, value in measured.items()},
            },
        )
        rate = "" if speed is None else f"  {speed:,.0f} tokens/s after {duration(seconds)}"
        mark = "  *" if best else ""
        others = "".join(f"  {name} {value:.3f}" for name, value in measured.items() if name != "loss")
        self.console.message(
            f"step {standing.step}  epoch {standing.step / self.loader.steps_per_epoch:.2f}  "
            f"train {train:.3f}  validation {validation:.3f}{others}{mark}{rate}"
        )
        if speed is not None:
            timing = {"step": standing.step, "seconds": round(seconds, 3), "tokens_per_s": round(speed, 1)}
            self.directory.append("timings.jsonl", timing)
        if standing.overfitting and not overfitting:
            self.console.message(standing.verdict())
        if best:
            self.save(self.directory.checkpoint(standing.step), self._details())
            self.directory.point("best", standing.step)
        patience = self.recipe.patience
        if patience is not None and standing.evaluations_since_best >= patience:
            standing.finished = f"no better validation loss in {patience} evaluations"

    def _samples_due(self, last: bool) -> bool:
        step, every = self.standing.step, self.recipe.sample_every
        if every == "never":
            return False
        if every == "epoch":
            return last or (step > 0 and step % self.loader.steps_per_epoch == 0)
        return last or step % self.evaluate_every == 0

    def _sample(self) -> None:
        self.model.eval()
        for record in self.sample(self.standing):
            self.directory.append("samples.jsonl", {"step": self.standing.step, **record})
            prompt, text = (" ".join(str(record[part]).split()) for part in ("prompt", "text"))
            self.console.message(f"  sample: {prompt} | {text}")

    def _save(self) -> None:
        standing = self.standing
        path = self.directory.checkpoint(standing.step)
        if standing.best_step != standing.step or not path.is_dir():
            self.save(path, self._details())
        self.directory.point("last", standing.step)
        tensors = {f"model:{name}": parameter.detach().cpu() for name, parameter in trained_parameters(self.model)}
        tensors |= {f"optimizer:{name}": tensor.cpu() for name, tensor in self.optimizers.state_tensors().items()}
        facts = {"standing": asdict(standing), "run": self.facts, "threads": torch.get_num_threads()}
        self.directory.save_state(standing.step, tensors, facts)
        self.directory.prune(standing.best_step, standing.step, self.recipe.keep)

    def _details(self) -> dict[str, Any]:
        standing = self.standing
        return {
            **self.facts,
            "step": standing.step,
            "tokens_seen": standing.tokens,
            "train_loss": standing.train_loss,
            "validation_loss": standing.validation_loss,
        }

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run at the next boundary; a second Ctrl-C ends it at once."""

        def ask(number: int, _: object) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number)
            self.console.message(f"{self._stop.name}: saving after this step")

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that change: beside adapters the others are frozen, and come from the parent again."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def prepare_torch(recipe: TrainingRecipe, threads: int | None = None) -> torch.device:
    """Set the number of threads (`threads` of a resumed run wins) and choose the device."""
    wanted = threads or recipe.threads
    if wanted:
        torch.set_num_threads(wanted)
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise SettingsError(f"device {name!r} is not supported", field="device", hint="use cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("there is no CUDA device", field="device", hint="use --device cpu")
    return torch.device(name)


def _mix(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8]) >> 1
