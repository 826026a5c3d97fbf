"""`topkapi plan` without data: what training so many parameters on so many tokens takes, in time, money and energy.

A parameter costs 6 multiplications and additions for each token: 2 forwards, 4 backwards (Kaplan et al. 2020);
attention comes on top, for long contexts. Of what a GPU's data sheet promises, a run reaches a part, its MFU.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError

FLOPS_PER_PARAMETER = 6
# Hoffmann et al. 2022: at a given cost, the best network has seen about so many tokens for each parameter.
CHINCHILLA = 20
# What large runs reach today: Llama 3's had 38 to 43 % (Grattafiori et al. 2024, section 3.3.2), on this GPU.
TODAY_MFU, TODAY_GPU = 0.4, "H100"

# Full power in watts, from the makers' data sheets, of the GPUs whose peaks are known.
WATTS = {
    "GB200": 1200, "B200": 1000, "H200": 700, "H100 PCIe": 350, "H100 NVL": 400, "H100": 700, "A100": 400, "L40S": 350,
    "L40": 300, "L4": 72, "A10G": 150, "A10": 150, "A6000": 300, "4090": 450, "3090": 350,
}  # fmt: skip

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_AMOUNT = re.compile(r"(\d[\d,_]*(?:\.\d+)?(?:e\d+)?)([kmbgt]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """A run as its makers describe it, in `source`."""

    parameters: float
    tokens: float
    gpu: str
    gpu_hours: float
    source: str


_LLAMA = "Touvron et al. 2023, LLaMA, table 15"
_LLAMA_2 = "Touvron et al. 2023, Llama 2, table 2"
_LLAMA_3 = "the model card of Llama 3.1"
PUBLISHED = {
    "llama-7b": Published(6.7e9, 1.0e12, "A100", 82_432, _LLAMA),
    "llama-13b": Published(13.0e9, 1.0e12, "A100", 135_168, _LLAMA),
    "llama-33b": Published(32.5e9, 1.4e12, "A100", 530_432, _LLAMA),
    "llama-65b": Published(65.2e9, 1.4e12, "A100", 1_022_362, _LLAMA),
    "llama-2-7b": Published(6.738e9, 2.0e12, "A100", 184_320, _LLAMA_2),
    "llama-2-13b": Published(13.016e9, 2.0e12, "A100", 368_640, _LLAMA_2),
    "llama-2-70b": Published(68.977e9, 2.0e12, "A100", 1_720_320, _LLAMA_2),
    "llama-3.1-8b": Published(8.03e9, 15.0e12, "H100", 1_460_000, _LLAMA_3),
    "llama-3.1-70b": Published(70.6e9, 15.0e12, "H100", 7_000_000, _LLAMA_3),
    "llama-3.1-405b": Published(405.9e9, 15.6e12, "H100", 30_840_000, _LLAMA_3),
}

FIELDS = ("parameters", "tokens", "gpu", "gpus", "gpu_hours", "mfu", "published", "measured")
"""The flags of `plan` that are for this alone."""


@dataclass(frozen=True)
class Course:
    """One way to count a run: on what, at which part of its peak (None: unknown), and what comes of it.

    `gpu_hours` are those of one GPU, `hours` those of the clock on all; `cost` and `kilowatt_hours` are None where
    price or power are unknown.
    """

    name: str
    on: str
    mfu: float | None
    gpu_hours: float
    hours: float
    cost: float | None
    kilowatt_hours: float | None


@dataclass(frozen=True)
class Estimate:
    """The work of a run in multiplications and additions, what Chinchilla's rule says of it, and its courses."""

    parameters: float
    tokens: float
    flops: float
    chinchilla_tokens: float
    chinchilla_parameters: float
    courses: list[Course]
    source: str | None


def add_estimate_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags of a plan without data."""
    group = command.add_argument_group("without data")
    group.add_argument("--parameters", metavar="N", help="parameters of a network, such as 135M or 7B")
    group.add_argument("--tokens", metavar="N", help="tokens that it is trained on, such as 2T")
    group.add_argument("--published", choices=sorted(PUBLISHED), help="a run whose makers told what it took")
    group.add_argument("--gpu", choices=sorted(WATTS), help=f"what it trains on [{TODAY_GPU}]")
    group.add_argument(
        "--gpus", type=int, metavar="N", help="how many of them make the machine that --price-per-hour is for [1]"
    )
    group.add_argument("--gpu-hours", metavar="N", help="what it took, if that is known")
    group.add_argument(
        "--mfu", type=float, metavar="X", help=f"the part of the GPU's peak that it reaches [{TODAY_MFU}]"
    )
    group.add_argument(
        "--measured", type=Path, metavar="RUN", help="a run of yours: at its speed, what would this one take here?"
    )


def is_estimate(arguments: argparse.Namespace) -> bool:
    """Whether a plan is wished without data."""
    return any(getattr(arguments, name, None) is not None for name in FIELDS)


def amount(text: str, name: str) -> float:
    """A number such as `7B` or `2T`. Raises `SettingsError` for what is none above 0."""
    match = _AMOUNT.fullmatch(text.strip())
    value = float(match[1].replace(",", "").replace("_", "")) * _UNITS[match[2].lower()] if match else 0.0
    if not 0 < value < math.inf:
        flag = f"--{name.replace('_', '-')}"
        raise SettingsError(f"{flag} must be a number such as 135M, 7B or 2T, not {text!r}", field=name)
    return value


def estimate(arguments: argparse.Namespace) -> Estimate:
    """What the flags describe. Raises `SettingsError` for those that are missing, out of range, or contradict."""
    known = None if arguments.published is None else PUBLISHED[arguments.published]
    given = {
        name: amount(getattr(arguments, name), name)
        for name in ("parameters", "tokens", "gpu_hours")
        if getattr(arguments, name) is not None
    }
    for name in ("parameters", "tokens", "gpu_hours", "gpu"):
        if known and getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(
                f"{arguments.published} has its own {name.replace('_', ' ')}: {flag} does not go with --published",
                field=name, hint="leave one of them out",
            )  # fmt: skip
        if known is None and name in ("parameters", "tokens") and getattr(arguments, name) is None:
            raise SettingsError(
                f"a plan without data needs --{name}", field=name, hint="or --published llama-2-7b, say"
            )
    mfu, gpus, price = arguments.mfu, arguments.gpus or 1, arguments.price_per_hour
    if arguments.gpus is not None and arguments.gpus < 1:
        raise SettingsError("--gpus must be at least 1", field="gpus")
    if mfu is not None and not 0 < mfu <= 1:
        raise SettingsError(f"--mfu must be above 0 and at most 1, not {mfu:g}", field="mfu", hint="0.4 is 40 %")
    parameters = known.parameters if known else given["parameters"]
    tokens = known.tokens if known else given["tokens"]
    flops = FLOPS_PER_PARAMETER * parameters * tokens
    gpu = known.gpu if known else arguments.gpu or TODAY_GPU
    took = given.get("gpu_hours", known.gpu_hours if known else None)
    if took is not None and flops / (took * 3600) > _peak(gpu):
        raise SettingsError(
            f"{took:,.0f} hours are too few: not even at its peak does the {gpu} do {flops:.1e} FLOPs in them",
            field="gpu_hours",
        )

    def course(name: str, on: str, hours: float, part: float | None) -> Course:
        clock = hours / gpus
        return Course(name, on, part, hours, clock, None if price is None else clock * price, hours * WATTS[on] / 1000)

    courses = []
    if took is not None:
        courses.append(course("as it was", gpu, took, flops / (took * 3600 * _peak(gpu))))
    if took is None or mfu is not None:
        part = mfu or TODAY_MFU
        courses.append(course(f"at {part:.0%}", gpu, flops / (3600 * part * _peak(gpu)), part))
    if took is not None or (gpu, mfu or TODAY_MFU) != (TODAY_GPU, TODAY_MFU):
        courses.append(course("today", TODAY_GPU, flops / (3600 * TODAY_MFU * _peak(TODAY_GPU)), TODAY_MFU))
    courses.append(_here(arguments.measured, flops, price))
    return Estimate(
        parameters, tokens, flops, CHINCHILLA * parameters,
        math.sqrt(flops / (FLOPS_PER_PARAMETER * CHINCHILLA)), courses, known.source if known else None,
    )  # fmt: skip


def _here(run: Path | None, flops: float, price: float | None) -> Course:
    """The run on this machine: as fast as another run here was, else as its matrix products are at the usual part."""
    if run is not None:
        speed = _speed_of(run)
        hours = flops / speed / 3600
        return Course(f"as {run.name}", "this machine", None, hours, hours, price and hours * price, None)
    import torch

    from topkapi.training.optimisation.throughput import peak_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    # Where other programs took the processor there is no peak, and no answer.
    hours = math.nan if peak is None else flops / (TODAY_MFU * peak) / 3600
    return Course("here", "this machine", TODAY_MFU, hours, hours, None, None)


def _speed_of(run: Path) -> float:
    """Multiplications and additions a second that a run's updates came to. Raises `SettingsError` without any."""
    timings = run / "timings.jsonl"
    made = next(
        (run / name / "topkapi.json" for name in ("best", "last") if (run / name / "topkapi.json").is_file()), None
    )
    lines = timings.read_text("utf-8").splitlines() if timings.is_file() else []
    if made is None or not lines:
        raise SettingsError(
            f"{run} has no checkpoint and no timings", field="measured", hint="name the directory of a finished run"
        )
    parameters: float = json.loads(made.read_text("utf-8"))["parameters"]
    speed: float = json.loads(lines[-1])["tokens_per_s"]
    return FLOPS_PER_PARAMETER * parameters * speed


def _peak(gpu: str) -> float:
    from topkapi.training.optimisation.throughput import GPU_TFLOPS

    return GPU_TFLOPS[gpu] * 1e12


def print_estimate(arguments: argparse.Namespace) -> None:
    """Print what the flags describe, in words or as JSON."""
    found = estimate(arguments)
    gpus = arguments.gpus or 1
    if arguments.json:
        facts: dict[str, Any] = asdict(found)
        print(json.dumps(_finite(facts), indent=2))
        return
    ratio = found.tokens / found.parameters
    rows = [
        ("parameters", f"{_short(found.parameters)}, {_short(found.tokens)} tokens: {ratio:,.0f} for each"),
        ("work", f"{found.flops:.2e} FLOPs: {FLOPS_PER_PARAMETER} for each parameter and token, without attention"),
        (
            "Chinchilla",
            f"{CHINCHILLA} tokens for each parameter, {_short(found.chinchilla_tokens)}, are the best use of training; "
            f"this work best trains {_short(found.chinchilla_parameters)} parameters on "
            f"{_short(CHINCHILLA * found.chinchilla_parameters)} tokens. More tokens make a small network better, and "
            "cheaper to serve",
        ),
    ]
    if found.source:
        rows.append(("source", found.source))
    for each in found.courses:
        rows.append((each.name, _course(each, gpus, arguments.price_per_hour)))
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        print(f"{name:<{width}}{text}")


def _course(course: Course, gpus: int, price: float | None) -> str:
    if math.isnan(course.hours):
        return "other programs are using this machine: ask again when it is idle"
    if course.kilowatt_hours is None:
        part = "" if course.mfu is None else f" at {course.mfu:.0%} of the rate of its matrix products"
        cost = "" if course.cost is None else f"; {course.cost:,.0f} at {price:g} an hour"
        return f"{_long(course.hours)} on this machine{part}{cost}"
    text = f"{course.gpu_hours:,.0f} {course.on} hours"
    if course.mfu is not None:
        text += f" (MFU {course.mfu:.0%})"
    if gpus > 1:
        text += f"; on {gpus:,} at once {_long(course.hours)}"
    if course.cost is not None:
        text += f"; {course.cost:,.0f} at {price:g} an hour{f' of {gpus:,}' if gpus > 1 else ''}"
    return text + f"; {course.kilowatt_hours:,.0f} kWh at full power"


def _short(value: float) -> str:
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _long(hours: float) -> str:
    for size, unit in ((8766, "years"), (24, "days")):
        if hours >= 2 * size:
            return f"{hours:,.0f} hours ({hours / size:,.1f} {unit})"
    return f"{hours:,.1f} hours"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
