"""`topkapi plan`: what a run will take, from a few real steps that count for nothing."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from topkapi.training.data.windows import Batch, Loader, Tokens
from topkapi.training.optimisation.device import PeakMemory, memory_for_a_run
from topkapi.training.optimisation.throughput import flops_per_token, longest_text
from topkapi.training.recipes.recipe import TrainingRecipe
from topkapi.training.run.console import Console, duration
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.precision import settled
from topkapi.training.run.state import TrainerState
from topkapi.training.trainer import Training

# A trial lasts so long, and so many steps at least and at most, besides the first, which is warmer than the others.
TRIAL_SECONDS = 10.0
TRIAL_STEPS = (3, 40)
# Micro batches are tried for no longer than this.
PROBE_SECONDS = 60.0
# Batches that are looked at to know how long they are.
_SURVEYED = 100
# What may be taken of the memory: the system and other processes want some, and a run a little more than a trial.
_SHARE_OF_MEMORY = 0.9
# Batches that one evaluation is timed on.
_EVALUATED = 2


@dataclass(frozen=True)
class Probe:
    """One micro batch size, tried: its peak memory in bytes and its speed."""

    micro_batch_size: int
    peak_bytes: int
    tokens_per_s: float
    fits: bool


@dataclass(frozen=True)
class RunPlan:
    """What a run will take. Seconds and bytes; tokens include padding; `cost` is None without a price, and
    `kilowatt_hours` without a power."""

    parameters: int
    trained_parameters: int
    steps: int
    tokens: int
    flops: float
    step_seconds: float
    tokens_per_s: float
    peak_bytes: int
    memory_bytes: int
    update_seconds: float
    evaluation_seconds: float
    sample_seconds: float
    save_seconds: float
    probes: list[Probe]
    cost: float | None
    kilowatt_hours: float | None = None

    @property
    def seconds(self) -> float:
        """The whole run."""
        return self.update_seconds + self.evaluation_seconds + self.sample_seconds + self.save_seconds

    @property
    def largest(self) -> Probe | None:
        """The largest micro batch that was tried and fits."""
        return max(
            (probe for probe in self.probes if probe.fits), key=lambda probe: probe.micro_batch_size, default=None
        )

    @property
    def fastest(self) -> Probe | None:
        """The fastest micro batch that fits."""
        return max((probe for probe in self.probes if probe.fits), key=lambda probe: probe.tokens_per_s, default=None)


class _Enough(Exception):
    """A trial has seen enough."""


class Silent(Console):
    """A console that shows nothing."""

    def message(self, text: str) -> None:
        pass

    def warn(self, findings: Sequence[str]) -> None:
        pass

    def count(self, what: str, done: int, total: int) -> None:
        pass

    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, step: int, facts: str, seconds_left: float) -> None:
        pass

    def stop(self) -> None:
        pass


class _Watch(Silent):
    """A console that shows nothing, notes when each step ends, and ends the trial."""

    def __init__(self, steps: tuple[int, int], seconds: float) -> None:
        self.ends: list[float] = []
        self.steps, self.seconds = steps, seconds

    def advance(self, step: int, facts: str, seconds_left: float) -> None:
        self.ends.append(time.monotonic())
        timed, (least, most) = len(self.ends) - 1, self.steps
        if timed >= most or (timed >= least and self.ends[-1] - self.ends[0] >= self.seconds):
            raise _Enough


class _Repeated(Loader):
    """Always the same batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    @property
    def steps_per_epoch(self) -> int:
        return 1

    @property
    def stream(self) -> Tokens:
        return self._batch.tokens.numpy().astype("uint32").ravel()

    def batch(self, step: int) -> Batch:
        return self._batch

    def origins(self, step: int) -> list[str]:
        return [f"row {number} of a trial" for number in range(1, self._batch.size + 1)]

    def first(self, batches: int | None) -> list[Batch]:
        return [self._batch]


def make_plan(training: Training, price_per_hour: float | None = None, memory_bytes: int | None = None) -> RunPlan:
    """Try `training` out, which is spoilt for any other use, and say what all of it will take.

    `memory_bytes` replaces the memory that was found. The state of the run is left in its directory nowhere: nothing
    but measurements comes of this.
    """
    recipe, model, total = training.recipe, training.model, training.schedule.total_steps
    memory = PeakMemory(model.device)
    limit = memory_bytes or memory_for_a_run(model.device)
    surveyed = [training.loader.batch(step) for step in range(min(total, training.loader.steps_per_epoch, _SURVEYED))]
    mean_tokens = statistics.fmean(batch.tokens.numel() for batch in surveyed)
    widest = max(surveyed, key=lambda batch: batch.tokens.numel())

    memory.reset()
    seconds = _trial(training, training.loader, TRIAL_STEPS, TRIAL_SECONDS)
    peak = memory.bytes()
    tokens = [training.loader.batch(step).tokens.numel() for step in range(1, len(seconds) + 1)]
    speed = sum(tokens) / sum(seconds)
    probes = _probe(training, widest, memory, limit)

    evaluations = 1 + -(-total // training.evaluate_every)
    samples = {"never": 0, "evaluation": evaluations, "epoch": max(1, total // training.loader.steps_per_epoch)}
    saves = 1 if training.save_every is None else -(-total // training.save_every)
    updating = total * mean_tokens / speed
    if training.save_every is None and recipe.save_minutes is not None:
        saves += int(updating / 60 / recipe.save_minutes)
    plan = RunPlan(
        parameters=model.config.parameter_count(),
        trained_parameters=sum(parameter.numel() for parameter in training.optimizers.parameters()),
        steps=total,
        tokens=round(total * mean_tokens),
        flops=total * mean_tokens * flops_per_token(model.config, training.trained_share(), longest_text(widest)),
        step_seconds=mean_tokens / speed,
        tokens_per_s=speed,
        peak_bytes=peak,
        memory_bytes=limit,
        update_seconds=updating,
        evaluation_seconds=evaluations * _evaluation_seconds(training),
        sample_seconds=samples[recipe.sample_every] * _sample_seconds(training)
        if samples[recipe.sample_every]
        else 0.0,
        save_seconds=saves * _save_seconds(training),
        probes=probes,
        cost=None,
    )
    return plan if price_per_hour is None else replace(plan, cost=plan.seconds / 3600 * price_per_hour)


def _trial(training: Training, loader: Loader, steps: tuple[int, int], seconds: float, **changes: Any) -> list[float]:
    """Run real steps; how long each took, the first one left out. The first evaluation sees one small batch."""
    watch = _Watch(steps, seconds)
    small = [next(iter(loader.batch(0).split(1)))]
    schedule = replace(training.schedule, total_steps=max(training.schedule.total_steps, steps[1] + 2))
    trial = replace(
        training,
        recipe=training.recipe.model_copy(
            update={"sample_every": "never", "save_every": None, "save_minutes": None, **changes}
        ),
        loader=loader,
        schedule=schedule,
        console=watch,
        train_batches=small,
        validation_batches=small,
        evaluate_every=schedule.total_steps + 1,
        state=TrainerState(),
    )
    try:
        trial.run()
    except _Enough:
        pass
    return [end - start for start, end in zip(watch.ends, watch.ends[1:], strict=False)]


def _probe(training: Training, widest: Batch, memory: PeakMemory, limit: int) -> list[Probe]:
    """Micro batches of 1, 2, 4, … rows of the widest batch, up to the whole batch or what will not fit."""
    probes: list[Probe] = []
    started = time.monotonic()
    sizes = [1 << power for power in range(widest.size.bit_length()) if 1 << power < widest.size]
    for size in [*sizes, widest.size]:
        if probes and (not probes[-1].fits or time.monotonic() - started > PROBE_SECONDS):
            break
        if len(probes) > 1:
            last, before = probes[-1], probes[-2]
            slope = (last.peak_bytes - before.peak_bytes) / (last.micro_batch_size - before.micro_batch_size)
            expected = last.peak_bytes + slope * (size - last.micro_batch_size)
            if expected > limit:
                probes.append(Probe(size, round(expected), 0.0, fits=False))
                break
        part = next(iter(widest.split(size)))
        memory.reset()
        seconds = _trial(training, _Repeated(part), (1, 3), 1.0, micro_batch_size=size)
        peak = memory.bytes()
        speed = part.tokens.numel() / statistics.median(seconds)
        probes.append(Probe(size, peak, speed, fits=peak <= _SHARE_OF_MEMORY * limit))
    return probes


def _evaluation_seconds(training: Training) -> float:
    batches = [*training.train_batches, *training.validation_batches]
    started = time.monotonic()
    training.objective.evaluate(training.model, batches[:_EVALUATED], training.recipe.micro_batch_size)
    tokens = sum(batch.tokens.numel() for batch in batches) / sum(
        batch.tokens.numel() for batch in batches[:_EVALUATED]
    )
    return (time.monotonic() - started) * tokens


def _sample_seconds(training: Training) -> float:
    training.model.eval()
    started = time.monotonic()
    for _ in training.samples():
        pass
    return time.monotonic() - started


def _save_seconds(training: Training) -> float:
    """A checkpoint and the state for resuming, from the time it takes to write the weights once."""
    weights = {name: parameter.detach().cpu() for name, parameter in training.model.state_dict().items()}
    shared = {tensor.data_ptr(): name for name, tensor in weights.items()}
    weights = {name: weights[name].contiguous() for name in shared.values()}
    state = training.optimizers.state_tensors()
    size, more = (sum(tensor.nbytes for tensor in tensors.values()) for tensors in (weights, state))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=training.directory.path) as folder:
        save_file(weights, Path(folder) / "weights.safetensors")
    return (time.monotonic() - started) * (2 * size + more) / size


def _show(plan: RunPlan, console: Console, micro_batch_size: int | None, batch_size: int) -> None:
    """Print the plan."""
    trained = "" if plan.trained_parameters == plan.parameters else f" ({plan.trained_parameters:,} trained)"
    parts = {
        "steps": plan.update_seconds,
        "evaluations": plan.evaluation_seconds,
        "samples": plan.sample_seconds,
        "saves": plan.save_seconds,
    }
    rows = [
        ("parameters", f"{plan.parameters:,}{trained}"),
        ("steps", f"{plan.steps:,} of {batch_size}: {plan.tokens:,} tokens"),
        ("work", f"{plan.flops:.1e} FLOPs: 2 for each weight and token forwards, up to 4 backwards, and attention's"),
        (
            "speed",
            f"{plan.step_seconds:.2f} s per step, {plan.tokens_per_s:,.0f} tokens/s, "
            f"{plan.flops / plan.tokens * plan.tokens_per_s / 1e12:.2f} TFLOPS",
        ),
        ("memory", f"{_gigabytes(plan.peak_bytes)} at most, of {_gigabytes(plan.memory_bytes)}"),
        ("time", f"{duration(plan.seconds)} ({', '.join(f'{name} {duration(each)}' for name, each in parts.items())})"),
    ]
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f}"))
    if plan.kilowatt_hours is not None:
        rows.append(("energy", f"{plan.kilowatt_hours:,.3g} kWh"))
    for name, text in rows:
        console.message(f"{name:<11}{text}")
    console.message("micro batches, each of the longest rows:")
    for probe in plan.probes:
        speed = f"{probe.tokens_per_s:,.0f} tokens/s" if probe.fits else "does not fit"
        console.message(f"  {probe.micro_batch_size:>5}  {_gigabytes(probe.peak_bytes):>8}  {speed}")
    console.message(_advice(plan, micro_batch_size or batch_size))


def _advice(plan: RunPlan, chosen: int) -> str:
    if plan.largest is None or plan.fastest is None:
        return (
            "this run does not fit into memory, not even by one row at a time: lower --context-length, choose a "
            "smaller model, or train adapters (finetune --method lora)"
        )
    best = plan.fastest.micro_batch_size
    line = f"the largest that fits is {plan.largest.micro_batch_size}, the fastest {best}"
    return line if best == chosen else f"{line}: set --micro-batch-size {best}, the steps stay the same"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def print_plan(
    recipe: TrainingRecipe,
    prepare: Callable[[TrainingRecipe, RunDirectory, Console], Training],
    price_per_hour: float | None,
    memory_gigabytes: float | None,
    watts: float | None = None,
    *,
    as_json: bool,
) -> bool:
    """Try the run that `prepare` makes in a directory, which is deleted afterwards, and print the plan.

    Whether the run fits into memory, if only in micro batches of one row. Raises what the run itself would raise before
    its first step.
    """
    console = _Findings(silent=as_json)
    memory = None if memory_gigabytes is None else round(memory_gigabytes * 1e9)
    recipe = settled(recipe, console)
    with tempfile.TemporaryDirectory(prefix="topkapi-plan-") as folder:
        directory = RunDirectory(Path(folder) / "run")
        directory.start(recipe)
        plan = make_plan(prepare(recipe, directory, console), price_per_hour, memory)
    if watts is not None:
        plan = replace(plan, kilowatt_hours=plan.seconds / 3600 * watts / 1000)
    if as_json:
        facts: Mapping[str, Any] = asdict(plan) | {"seconds": plan.seconds, "findings": console.findings}
        print(json.dumps(facts, indent=2))
        return plan.largest is not None
    if not console.findings:
        console.message("nothing is wrong with the data")
    _show(plan, console, recipe.micro_batch_size, recipe.batch_size)
    return plan.largest is not None


class _Findings(Console):
    """A console that keeps what was found wrong with the data."""

    def __init__(self, *, silent: bool) -> None:
        super().__init__()
        self.findings: list[str] = []
        self._silent = silent

    def message(self, text: str) -> None:
        if not self._silent:
            super().message(text)

    def count(self, what: str, done: int, total: int) -> None:
        if not self._silent:
            super().count(what, done, total)

    def warn(self, findings: Sequence[str]) -> None:
        self.findings += findings
        super().warn(findings)
