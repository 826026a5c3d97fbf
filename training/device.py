"""The device a run computes on, and with how many threads."""

from __future__ import annotations

import torch

from model.errors import SettingsError
from training.recipe import TrainingRecipe


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
