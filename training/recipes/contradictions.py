"""Settings that do not go together, or that would do nothing, refused by name before anything is begun."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from topkapi.model.errors import SettingsError


def check_together(recipe: Any, flags: Collection[str]) -> None:
    """Raise `SettingsError` for settings of `recipe` that contradict one another.

    Of those that merely do nothing, the ones in `flags` are refused, which were given on the command line: a recipe
    file may hold them for another day.
    """

    def refuse(message: str, field: str, hint: str) -> None:
        raise SettingsError(message, field=field, hint=hint)

    if recipe.optimizer == "schedule-free":
        if recipe.schedule != "constant":
            refuse(
                "the schedule-free optimizer averages weights instead of lowering its learning rate: --schedule "
                f"{recipe.schedule} does not go with it",
                "schedule",
                "add --schedule constant; --warmup still counts",
            )
        if recipe.beta1 == 0:
            refuse(
                "the schedule-free optimizer takes gradients between its average and its latest weights: --beta1 0 "
                "leaves no average",
                "beta1",
                "give a --beta1 above 0",
            )
    preferring = recipe.best_metric in ("validation_accuracy", "validation_margin") and not hasattr(recipe, "beta")
    unsampled = recipe.best_metric == "copied_from_training" and recipe.sample_every == "never"
    if preferring or unsampled:
        hint = (
            "only dpo and kto measure it"
            if preferring
            else "without samples it is not measured: leave out --sample-every"
        )
        refuse(f"this run does not measure {recipe.best_metric}", "best_metric", hint)
    if getattr(recipe, "split", None) == "random" and (recipe.train_examples is not None or recipe.test_examples):
        name = "train_examples" if recipe.train_examples is not None else "test_examples"
        refuse(
            f"{name} counts examples in the order of the file, and --split random mixes them",
            name,
            "add --split file_order",
        )
    for name, other, wanted in (
        ("muon_learning_rate", "optimizer", "muon"),
        ("decay_fraction", "schedule", "wsd"),
    ):
        if name in flags and getattr(recipe, name) is not None and getattr(recipe, other) != wanted:
            refuse(f"{name} does nothing without --{other} {wanted}", name, f"leave it out, or add --{other} {wanted}")
    for name in ("track_project", "track_name"):
        if name in flags and getattr(recipe, name) is not None and recipe.track is None:
            refuse(f"{name} does nothing without --track", name, "leave it out, or add --track trackio, say")
    if "push_every" in flags and recipe.push_every is not None and recipe.push is None:
        refuse("push_every does nothing without --push", "push_every", "leave it out, or add --push OWNER/NAME")
    if "final_learning_rate" in flags and recipe.schedule == "constant":
        refuse("final_learning_rate does nothing with --schedule constant", "final_learning_rate", "leave it out")
    micro = recipe.micro_batch_size
    if "micro_batch_size" in flags and micro is not None and micro > recipe.batch_size:
        refuse(
            f"a micro_batch_size of {micro} is more than the batch_size of {recipe.batch_size}",
            "micro_batch_size",
            "it is the part of a batch that is computed at once: give less, or leave it out",
        )
