"""Checkpoints loaded when a process starts, and what is said of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from topkapi.model.native import why_not
from topkapi.service.adapters import MIB
from topkapi.service.api.native.checkpoints import describe
from topkapi.service.locations import adapter_locations
from topkapi.service.logs import say
from topkapi.service.models import Models


def load(models: Models, locations: Sequence[str]) -> None:
    """Load the checkpoints, saying what each is."""
    if models.settings.threads is not None:
        torch.set_num_threads(models.settings.threads)
    if (why := why_not()) is not None:
        say(f"  {why}; PyTorch computes, which takes longer")
    why_held = ""
    for location in locations:
        model = models.load(location)
        say(f"  {summary(describe(models, model))}")
        if model.why and model.why != why_held:
            # The same for most of them, and told once.
            why_held = model.why
            say(f"  {model.dtype}: {why_held}")
        for warning in model.warnings:
            say(f"  warning: {model.name}: {warning}")
    load_adapters(models)


def load_adapters(models: Models) -> None:
    """See that the adapters of the settings can be read, saying beside which checkpoint each stands."""
    for location in adapter_locations(models.settings):
        model = models.load_adapter(location.name, location.path, base=location.base)
        assert model.use is not None, "an adapter's"
        adapter = model.use.adapter
        say(f"  {adapter.name}: adapter of {adapter.base}, rank {adapter.rank}, {adapter.size / MIB:.1f} MiB")


def summary(details: dict[str, object]) -> str:
    """One line about a loaded checkpoint."""
    parameters = details["parameters"]
    assert isinstance(parameters, int)
    size = f"{parameters / 1e6:.1f}M" if parameters >= 1e5 else f"{parameters / 1e3:.1f}K"
    kind = "chat" if details["chat"] else "base"
    return (
        f"{details['name']}: {kind} checkpoint, {details['family']}, {size} parameters ({details['dtype']}), "
        f"context {details['context_length']}, vocabulary {details['vocab_size']}, kernels: {details['kernels']}"
    )
