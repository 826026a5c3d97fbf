"""What a model writes on the way: kept, shown, and searched for copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from topkapi.training.data.windows import Tokens
from topkapi.training.monitoring.memorisation import SHORTEST, Copy, longest_copy, memorises
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.state import Standing

NOTABLE = 2 * SHORTEST
"""Tokens of a copy that is told: shorter ones are in every text."""


def take_samples(
    samples: Iterable[dict[str, Any]],
    standing: Standing,
    *,
    texts: tuple[Tokens, Tokens],
    directory: RunDirectory,
    console: Console,
    shown: bool,
    text_of: Callable[[list[int]], str],
) -> None:
    """Record `samples` with how much of them stands word for word in `texts`, of training and of validation.

    Prints them if they are to be `shown`, a line each and nothing that was printed last time. Says once in a run that
    the model memorises; `standing` notes it, and the longest copy.
    """
    longest, elsewhere = Copy(), Copy()
    passage: list[int] = []
    for record in samples:
        ids = record.pop("token_ids")
        found, other = (longest_copy(ids, text) for text in texts)
        if found.length > longest.length:
            longest, passage = found, ids[found.start : found.start + found.length]
        elsewhere = max(elsewhere, other, key=lambda copy: copy.length)
        copied = {"copied_from_training": found.length, "copied_from_validation": other.length}
        directory.append("samples.jsonl", {"step": standing.step, **record, **copied})
        prompt, text = (" ".join(str(record[part]).split()) for part in ("prompt", "text"))
        if shown:
            console.news(prompt, f"  sample: {prompt} | {text}")
    copied = {"copied_from_training": longest.length, "copied_from_validation": elsewhere.length}
    directory.append("metrics.jsonl", {"step": standing.step, **copied})
    standing.copied = longest.length
    if shown and longest.length > NOTABLE:
        console.news(
            "",
            f"  longest copy: {longest.length} tokens of the training text, {elsewhere.length} of the validation text: "
            f"{' '.join(text_of(passage).split())!r}",
        )
    if memorises(longest.length, elsewhere.length) and not standing.memorising:
        standing.memorising = True
        console.message(f"memorising: a sample repeats {longest.length} tokens of the training text word for word")
