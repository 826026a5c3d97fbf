"""The training loop: updates, evaluations, samples, saves; the same for pretraining and fine-tuning."""

from __future__ import annotations

import hashlib
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from topkapi.model.errors import SettingsError
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.training.data.windows import Batch, Loader, Tokens
from topkapi.training.monitoring.divergence import (
    MOST_RETURNS,
    QUIET_STEPS,
    Diverged,
    LossSpike,
    diverged,
    find_spike,
    observe,
)
from topkapi.training.monitoring.samples import Prompt, continuations, take_samples
from topkapi.training.optimisation import distributed
from topkapi.training.optimisation.loss import Compiled, NextToken, Objective
from topkapi.training.optimisation.optimisers import Optimizers, Schedule, trained_parameters
from topkapi.training.optimisation.throughput import Throughput, flops_per_token, longest_text
from topkapi.training.recipes.recipe import TrainingRecipe
from topkapi.training.run.console import Console, duration
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.process import Interrupted, StopRequest
from topkapi.training.run.saving import Save, Saver, Snapshot
from topkapi.training.run.state import TrainerState


@dataclass(frozen=True)
class Update:
    """What a step of training tells of itself; `factor` is the schedule's, `tokens` those trained
    of all that were `processed`."""

    loss: float
    norm: float
    factor: float
    tokens: int
    processed: int


@dataclass
class Training:
    """Everything one run of `topkapi {command}` is made of.

    `save(path, model, details)` writes a checkpoint, `held_out` are the validation tokens, `prompts` those sampled
    from. `facts` go into every checkpoint's `topkapi.json` and must not change when a run is resumed. Without
    validation batches the training batches take their place.
    """

    recipe: TrainingRecipe
    command: str
    model: Decoder
    tokenizer: Tokenizer
    optimizers: Optimizers
    schedule: Schedule
    loader: Loader
    train_batches: list[Batch]
    validation_batches: list[Batch]
    directory: RunDirectory
    console: Console
    save: Save
    prompts: Sequence[Prompt]
    facts: dict[str, Any]
    held_out: Tokens
    evaluate_every: int = 1
    objective: Objective = field(default_factory=NextToken)
    state: TrainerState = field(default_factory=TrainerState)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.stop = StopRequest(self.console.message)
        by_time = recipe.save_every is None and recipe.save_minutes is not None
        if by_time and recipe.on_divergence == "return":
            raise SettingsError(
                "a run that returns to its saves needs them at the same steps whenever it is run, not by the clock",
                field="save_minutes",
                hint="give --save-every, too",
            )
        self.save_every = None if by_time else recipe.save_every or self.evaluate_every
        self.saver = Saver(
            directory=self.directory,
            save=self.save,
            every=self.save_every,
            minutes=recipe.save_minutes,
            keep=recipe.keep,
            asynchronous=recipe.asynchronous_saves,
        )

    def run(self, peak_flops: float | None = None) -> TrainerState:
        """Train to the end, or to where the run stops early, from wherever `state` is.

        `peak_flops` are the machine's (None: unknown). Raises `Diverged` for a loss that is not a number and
        `Interrupted` after SIGINT or SIGTERM, once saved.
        """
        self.model.recompute = self.recipe.recompute
        compiled = Compiled.of(self.model) if self.recipe.compile else None
        total = self.schedule.total_steps
        self.console.start(total, self.state.step)
        try:
            with self.stop.awaited():
                if self.state.step == 0:
                    self.directory.begin()
                    self._boundary()
                throughput = self._throughput(peak_flops)
                while self.state.step < total and self.state.finished is None:
                    started = time.monotonic()
                    update = self._update(compiled)
                    seconds = time.monotonic() - started
                    if update is None:
                        continue
                    throughput.note(update.tokens, update.processed, seconds)
                    self._record(update)
                    facts = f"loss {update.loss:.3f} (smoothed {self.state.level:.3f})  {throughput.facts()}"
                    facts += f"  learning rate {self.recipe.learning_rate * update.factor:.1e}"
                    self.console.advance(self.state.step, facts, throughput.seconds_left(self.state.step))
                    self._boundary(throughput)
                    self.saver.check()
        finally:
            self.console.stop()
            self.saver.wait()
        return self.state

    def load_state(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `RunDirectory.load_state` found."""
        self.state = state = TrainerState.saved(facts["standing"])
        weights: dict[str, torch.Tensor] = {}
        optimizer: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(":")
            (optimizer if kind == "optimizer" else weights)[rest] = tensor
        with torch.no_grad():
            for name, parameter in trained_parameters(self.model):
                parameter.copy_(distributed.part_of(weights[name], parameter))
        self.optimizers.load_state_tensors(optimizer)
        if state.ranking:
            self.directory.point("best", state.best_steps()[0])
        self.directory.point("last", state.step)
        # What was written after that state is written again, and what a killed prune left is pruned.
        states = {state.step, self._anchor()}
        self.directory.prune({*state.best_steps(), state.step}, state.step, self.recipe.keep, states)

    def _anchor(self) -> int | None:
        """The last regular save, which a run returns to when it diverges."""
        if self.recipe.on_divergence == "stop" or self.save_every is None:
            return None
        return self.state.step // self.save_every * self.save_every

    def _update(self, compiled: Compiled | None) -> Update | None:
        """One step of training; None when it diverged, was not taken, and the run has returned to a save."""
        state = self.state
        number = state.batch_number()
        batch = self.loader.batch(number)
        # Dropout is a function of the seed and the step: nothing in between can disturb it, and nothing needs saving.
        torch.manual_seed(_mix(self.recipe.seed, state.step) + distributed.rank())
        self.model.train()
        own = distributed.share(batch)
        assert own is not None, "a batch can be shared evenly"
        loss = self.objective.backward(
            self.model,
            own,
            divisor=batch.weight(),
            micro_batch_size=self.recipe.micro_batch_size,
            compiled=compiled,
            z_loss=self.recipe.z_loss,
        )
        (loss,) = distributed.added(loss)
        parameters = list(self.optimizers.parameters())
        if not distributed.is_part(parameters[0]):
            distributed.add_gradients(parameters)
        loss, norm = distributed.told([loss, distributed.clip(parameters, self.recipe.clip or math.inf)])
        origins, text_of = self.loader.origins, self.tokenizer.decode
        spike = find_spike(state, loss, norm, loss_of=self._loss_of, batch=batch, origins=origins, text_of=text_of)
        if spike is not None and self._handle_spike(spike):
            return None
        self.console.warn(observe(state, loss))
        factor = self.schedule.factor(state.step)
        self.optimizers.step(factor)
        state.step += 1
        state.tokens += batch.token_count()
        return Update(loss, norm, factor, batch.token_count(), batch.tokens.numel())

    def _loss_of(self, batch: Batch) -> float:
        with distributed.whole(self.model):
            return self.objective.evaluate(self.model, [batch], None)["loss"]

    def trained_share(self) -> float:
        """The part of the network's parameters that trains."""
        trained = sum(parameter.numel() for parameter in self.optimizers.parameters())
        return min(1.0, trained / self.model.config.parameter_count())

    def samples(self) -> Iterator[dict[str, Any]]:
        """What the model now makes of the prompts."""
        return continuations(self.model, self.tokenizer, self.prompts, self.recipe, self.state.step)

    def _throughput(self, peak_flops: float | None) -> Throughput:
        context = longest_text(self.loader.batch(self.state.batch_number()))
        flops = flops_per_token(self.model.config, self.trained_share(), context)
        return Throughput(self.schedule.total_steps, self.state.step, flops, peak_flops)

    def _record(self, update: Update) -> None:
        self.directory.append(
            "metrics.jsonl",
            {
                "step": self.state.step,
                "tokens": self.state.tokens,
                "loss": update.loss,
                "learning_rate": self.recipe.learning_rate * update.factor,
                "gradient_norm": update.norm,
            },
        )

    def _handle_spike(self, spike: LossSpike) -> bool:
        """Tell of a diverging step; whether the run returned to a save. Raises `Diverged` where it can't go on."""
        state = self.state
        finite, returns = spike.kind == "spike", self.recipe.on_divergence == "return"
        quiet = state.last_spike is not None and spike.step - state.last_spike <= QUIET_STEPS
        if finite and not returns and quiet:
            return False
        for line in (spike.headline(), *spike.causes()):
            self.console.message(line)
        if finite and not returns:
            state.last_spike = spike.step
            self.directory.append("metrics.jsonl", {"event": spike.kind, **asdict(spike)})
            return False
        anchor = self._anchor()
        if not returns or not anchor or len(self.state.spikes) == MOST_RETURNS:
            best = self.directory.path / "best" if state.ranking else None
            raise diverged(spike, returns=returns, anchor=anchor, returned=len(state.spikes), best=best)
        self._return(spike, anchor)
        return True

    def _return(self, spike: LossSpike, anchor: int) -> None:
        """Go back to the save of step `anchor` and leave the batch out.

        All that decides this is in that save or follows from it, so that a run killed since does the same again.
        """
        skipped = [*self.state.skipped, spike.batch]
        spikes = [*self.state.spikes, {"event": spike.kind, **asdict(spike), "returned_to": anchor}]
        with distributed.in_turn():
            self.saver.wait()
            saved = self.directory.load_state(anchor)
        assert saved is not None, "regular saves are kept until the next one"
        self.optimizers.zero_gradients()
        self.load_state(*saved)
        self.state.skipped, self.state.spikes = skipped, spikes
        for line in spikes:
            self.directory.append("metrics.jsonl", line)
        self.console.message(f"  returned to step {anchor}; batch {spike.batch} is left out from now on")

    def _boundary(self, throughput: Throughput | None = None) -> None:
        """What is due between two updates, always in this order, so that a saved state has it all behind it."""
        state, step = self.state, self.state.step
        last = step == self.schedule.total_steps
        measured = None
        if step % self.evaluate_every == 0 or last:
            measured = self._evaluate(throughput)
            last = last or state.finished is not None
        if self._samples_due(last):
            self._sample()
        best = measured is not None and state.rank(self.recipe.best_metric, self.recipe.keep_best, measured)
        # Any process may have been asked to stop; the first one's clock counts.
        due = step > 0 and distributed.rank() == 0 and self.saver.due(step)
        asked, due = map(bool, distributed.added(self.stop.asked is not None, due))
        stopping = asked and not last
        resumable = due or (step > 0 and (last or stopping))
        if resumable or best:
            self._save(resumable)
        if stopping:
            raise Interrupted(
                f"{self.stop.name}: stopped at step {step} of {self.schedule.total_steps}",
                hint=f"continue with: topkapi {self.command} --resume {shlex.quote(str(self.directory.path))}",
            )

    def _evaluate(self, throughput: Throughput | None) -> dict[str, float]:
        """Evaluate, record and tell; returns what was measured on the validation data."""
        state = self.state
        micro = self.recipe.micro_batch_size
        with self._judged():
            measured = measure(self.objective, self.model, self.train_batches, micro)
            train = measured["loss"]
            if self.validation_batches:
                measured = measure(self.objective, self.model, self.validation_batches, micro)
        validation = measured["loss"]
        if not math.isfinite(validation):
            raise Diverged(
                f"the validation loss became {validation} at step {state.step}", hint="lower --learning-rate"
            )
        overfitting, state.held_out = state.overfitting, bool(self.validation_batches)
        best = state.note(train, validation)
        epoch = state.step / self.loader.steps_per_epoch
        tell(state, measured, epoch, best=best, directory=self.directory, console=self.console, throughput=throughput)
        if state.overfitting and not overfitting:
            self.console.message(state.verdict())
        patience = self.recipe.patience
        if patience is not None and state.evaluations_since_best >= patience:
            state.finished = f"no better validation loss in {patience} evaluations"
        return measured

    def _samples_due(self, last: bool) -> bool:
        step, every = self.state.step, self.recipe.sample_every
        if every == "never":
            return False
        if every == "epoch":
            return last or (step > 0 and step % self.loader.steps_per_epoch == 0)
        return last or step % self.evaluate_every == 0

    def _sample(self) -> None:
        state = self.state
        self.model.eval()
        with self._judged():
            if distributed.rank() == 0:
                take_samples(
                    self.samples(),
                    state,
                    texts=(self.loader.stream, self.held_out),
                    directory=self.directory,
                    console=self.console,
                    shown=self.evaluate_every > 1 or state.step == self.schedule.total_steps,
                    text_of=self.tokenizer.decode,
                )
        state.copied, state.memorising = distributed.told((state.copied, state.memorising))

    def _save(self, resumable: bool) -> None:
        """Save a checkpoint, where it is to be `resumable`, also what a resumed run needs."""
        state, anchor = self.state, self._anchor()
        if resumable and anchor == state.step:
            state.spikes = []
        states = self.optimizers.state_tensors().items() if resumable else ()
        tensors = {f"optimizer:{name}": distributed.collected(tensor) for name, tensor in states}
        with self._judged() as raw:
            weights = dict(trained_parameters(self.model))
            if not all(parameter.isfinite().all() for parameter in weights.values()):
                raise Diverged(
                    f"the weights are no numbers any more at step {state.step}", hint="lower --learning-rate"
                )
            if resumable and raw:
                tensors |= {f"raw:{name}": distributed.collected(parameter) for name, parameter in raw.items()}
            elif resumable:
                tensors |= {f"model:{name}": parameter.detach() for name, parameter in weights.items()}
            if distributed.rank():
                return
            model, tensors = self.saver.copied(self.model, tensors)
            facts = {"standing": asdict(state), "run": self.facts, "threads": torch.get_num_threads()}
            self.saver.write(
                Snapshot(
                    step=state.step,
                    model=model,
                    details=self._details(),
                    best=state.best_steps(),
                    tensors=tensors if resumable else None,
                    facts=facts,
                    lengths=self.directory.lengths(),
                    anchor=anchor,
                )
            )

    @contextmanager
    def _judged(self) -> Iterator[dict[str, torch.Tensor]]:
        """The network as it is evaluated, sampled from and stored: whole, and averaged where the optimiser keeps an
        average. Yields the weights that are trained, where these are others."""
        with self.optimizers.averaged() as raw, distributed.whole(self.model):
            yield raw

    def _details(self) -> dict[str, Any]:
        state = self.state
        return {
            **self.facts,
            "step": state.step,
            "tokens_seen": state.tokens,
            "train_loss": state.train_loss,
            "validation_loss": state.validation_loss,
        }


def _mix(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8]) >> 1


def measure(
    objective: Objective, model: Decoder, batches: list[Batch], micro_batch_size: int | None
) -> dict[str, float]:
    """What `objective` measures on `batches`, each process doing its share."""
    return distributed.averaged(lambda own: objective.evaluate(model, own, micro_batch_size), batches)


def tell(
    state: TrainerState,
    measured: Mapping[str, float],
    epoch: float,
    *,
    best: bool,
    directory: RunDirectory,
    console: Console,
    throughput: Throughput | None,
) -> None:
    """Record and print the evaluation that `state` has taken in; `measured` was found on the validation data,
    or on training data where there are none."""
    train, validation = state.train_loss, state.validation_loss
    directory.append(
        "metrics.jsonl",
        {
            "step": state.step,
            "epoch": epoch,
            "tokens": state.tokens,
            "train_loss": train,
            **{f"{'validation' if state.held_out else 'train'}_{name}": value for name, value in measured.items()},
        },
    )
    rate = "" if throughput is None else f"  {throughput.tokens_per_s:,.0f} tokens/s  {duration(throughput.elapsed)}"
    mark = "  *" if best else ""
    others = "".join(f"  {name} {value:.3f}" for name, value in measured.items() if name != "loss")
    held_out = f"  validation {validation:.3f}" if state.held_out else ""
    console.message(f"step {state.step}  epoch {epoch:.2f}  train {train:.3f}{held_out}{others}{mark}{rate}")
    if throughput is None:
        return
    facts: dict[str, Any] = {"step": state.step, "seconds": round(throughput.elapsed, 3)}
    facts["tokens_per_s"] = round(throughput.tokens_per_s, 1)
    if throughput.utilisation is not None:
        facts["model_flops_utilisation"] = round(throughput.utilisation, 4)
    directory.append("timings.jsonl", facts)
