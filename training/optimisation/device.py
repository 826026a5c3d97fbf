"""The device a run computes on, and with how many threads."""

from __future__ import annotations

import torch

from topkapi.model.errors import SettingsError
from topkapi.training.optimisation import distributed
from topkapi.training.optimisation.memory import keep_freed_memory
from topkapi.training.recipes.recipe import TrainingRecipe


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
    if name == "cuda" and distributed.size() > 1:
        # Each process its own device, which NCCL wants to be the current one.
        number, there = distributed.local_rank(), torch.cuda.device_count()
        if number >= there:
            raise SettingsError(
                f"torchrun started more processes than this machine has CUDA devices ({there})",
                field="device",
                hint=f"use --nproc-per-node {there}",
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)
