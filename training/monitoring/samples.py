"""What a model writes on the way: kept, shown, and searched for copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from topkapi.model.generation import generate
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.training.data.windows import Tokens
from topkapi.training.monitoring.memorisation import Copy, longest_copy, memorises
from topkapi.training.recipes.recipe import TrainingRecipe
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.state import TrainerState


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from: the `text` as it is shown, its tokens, and the answer that is expected, if one is."""

    text: str
    token_ids: list[int]
    expected: str | None = None


def continuations(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], recipe: TrainingRecipe, step: int
) -> Iterator[dict[str, Any]]:
    """What the model makes of each prompt at `step`: records with `prompt`, `text` and `token_ids`."""
    for prompt in prompts:
        parameters = {
            "max_tokens": recipe.sample_tokens,
            "temperature": recipe.sample_temperature,
            "seed": recipe.seed + step,
        }
        result = generate(model, prompt.token_ids, parameters)
        yield {
            "prompt": prompt.text,
            "text": tokenizer.decode(result.token_ids, skip_control=True),
            "finish_reason": result.finish_reason,
            "token_ids": result.token_ids,
            **({} if prompt.expected is None else {"expected": prompt.expected}),
        }


def take_samples(
    samples: Iterable[dict[str, Any]],
    state: TrainerState,
    *,
    texts: tuple[Tokens, Tokens],
    directory: RunDirectory,
    console: Console,
    shown: bool,
    text_of: Callable[[list[int]], str],
) -> None:
    """Record `samples` with how much of them stands word for word in `texts`, of training and of validation.

    Prints them if they are to be `shown`. Says once in a run that the model memorises; `state` notes it, and the
    longest copy.
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
        directory.append("samples.jsonl", {"step": state.step, **record, **copied})
        prompt, text = (" ".join(str(record[part]).split()) for part in ("prompt", "text"))
        if shown:
            console.message(f"  sample: {prompt} | {text}")
    copied = {"copied_from_training": longest.length, "copied_from_validation": elsewhere.length}
    directory.append("metrics.jsonl", {"step": state.step, **copied})
    state.copied = longest.length
    if shown and longest.length:
        console.message(
            f"  longest copy: {longest.length} tokens of the training text, {elsewhere.length} of the validation text: "
            f"{' '.join(text_of(passage).split())!r}"
        )
    if memorises(longest.length, elsewhere.length) and not state.memorising:
        state.memorising = True
        console.message(f"memorising: a sample repeats {longest.length} tokens of the training text word for word")
