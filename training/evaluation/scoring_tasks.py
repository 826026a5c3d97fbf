"""The tasks that need likelihoods alone: perplexity, BLiMP, LAMBADA, multiple choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from topkapi.model.errors import DataError, InvalidRequest, SettingsError
from topkapi.model.scoring import windows
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.training.data.shards import tokenizer_digest
from topkapi.training.evaluation.likelihood import Scored, log_likelihoods
from topkapi.training.evaluation.measures import Measure, mean
from topkapi.training.evaluation.tasks import Task, choices, completions, documents, joined, pairs

# Long texts are resampled in parts of so many bytes.
PART_BYTES = 4096

TaskProgress = Callable[[int, int], None]


@dataclass
class Outcome:
    """What one checkpoint did in one task: figures, rows (one per item, in the file's order), and remarks.

    The first measure is the task's own; `parts` are those of its parts, such as BLiMP's paradigms.
    """

    measures: list[Measure]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    parts: list[Measure] = field(default_factory=list)


def start_token(checkpoint: Checkpoint) -> list[int]:
    """What a text begins after: the begin token, else the end token of the document before; nothing without either."""
    tokenizer = checkpoint.tokenizer
    start = tokenizer.begin_token_id if tokenizer.begin_token_id is not None else tokenizer.end_token_id
    return [] if start is None else [start]


def perplexity(checkpoint: Checkpoint, task: Task, progress: TaskProgress) -> Outcome:
    """Perplexity and bits per byte. Each document begins after the start token and is read in strided windows."""
    tokenizer, start = checkpoint.tokenizer, start_token(checkpoint)
    texts = [[*start, *tokenizer.encode(text)] for text in documents(task)]
    groups, at = [], []
    for text in texts:
        try:
            parts = windows(len(text), checkpoint.config, task.window, task.stride)
        except InvalidRequest as error:
            raise SettingsError(f"{task.name}: {error.message}", field=error.field) from None
        groups += [[Scored(text[part.start : part.end], part.first - part.start)] for part in parts]
        at += [(text, part.first) for part in parts]
    if not groups:
        raise DataError(f"{task.file} is too short to score", field="perplexity", hint="two tokens are the least")
    nll, tokens, sizes = [], [], []
    done: list[int] | None = None
    for (text, first), (found,) in zip(at, log_likelihoods(checkpoint.model, groups, progress), strict=True):
        if text is not done:
            done, room = text, 0
        for token_id, logprob in zip(text[first:], found.logprobs, strict=False):
            if room <= 0:
                nll.append(0.0)
                tokens.append(0)
                sizes.append(0)
                room = PART_BYTES
            size = len(tokenizer.token_bytes(token_id))
            room -= size
            nll[-1] -= logprob
            tokens[-1] += 1
            sizes[-1] += size
    losses, counts, lengths = (np.array(each, dtype=np.float64) for each in (nll, tokens, sizes))
    measures = [
        Measure("bits per byte", losses / math.log(2), lengths, higher_is_better=False),
        Measure(
            "perplexity",
            losses,
            counts,
            higher_is_better=False,
            exponential=True,
            comparable=tokenizer_digest(tokenizer),
        ),
    ]
    rows = [
        {"nll": float(loss), "tokens": int(count), "bytes": int(size)}
        for loss, count, size in zip(losses, counts, lengths, strict=True)
    ]
    notes = [] if start else ["the tokenizer has no begin or end token: each text's first token is not scored"]
    return Outcome(measures, rows, notes)


def blimp(checkpoint: Checkpoint, task: Task, progress: TaskProgress) -> Outcome:
    """The part of minimal pairs whose good sentence is the likelier one (Warstadt et al. 2020)."""
    paradigms, start = pairs(task), start_token(checkpoint)
    groups = [
        [Scored([*start, *checkpoint.tokenizer.encode(sentence)]) for sentence in pair]
        for pair in chain.from_iterable(paradigms.values())
    ]
    _check_fit(checkpoint, groups, task)
    found = log_likelihoods(checkpoint.model, groups, progress)
    right = [good.total > bad.total for good, bad in found]
    rows, parts, at = [], [], 0
    for paradigm, sentences in paradigms.items():
        own = slice(at, at + len(sentences))
        parts.append(mean(paradigm, right[own], unit="%"))
        rows += [
            {"paradigm": paradigm, "good": good.total, "bad": bad.total, "right": good.total > bad.total}
            for good, bad in found[own]
        ]
        at += len(sentences)
    return Outcome([mean("accuracy", right, unit="%")], rows, parts=parts if len(parts) > 1 else [])


def lambada(checkpoint: Checkpoint, task: Task, progress: TaskProgress) -> Outcome:
    """Whether the last word is what the network says greedily (Paperno et al. 2016), and its perplexity."""
    groups, notes = _continuations(
        checkpoint,
        task,
        [[(context, joined(word, task.delimiter))] for context, word in completions(task)],
    )
    found = [likelihood for (likelihood,) in log_likelihoods(checkpoint.model, groups, progress)]
    measures = [
        mean("accuracy", [one.greedy for one in found], unit="%"),
        Measure(
            "perplexity of the word",
            np.array([-one.total for one in found]),
            np.ones(len(found)),
            higher_is_better=False,
            exponential=True,
        ),
    ]
    return Outcome(measures, [{"logprob": one.total, "greedy": one.greedy} for one in found], notes)


def multiple_choice(checkpoint: Checkpoint, task: Task, progress: TaskProgress) -> Outcome:
    """Whether the likeliest continuation is the right one: by its log-probability, per token, and per byte.

    A tie goes to the first, as in lm-evaluation-harness.
    """
    questions = choices(task)
    groups, notes = _continuations(checkpoint, task, [question.candidates for question in questions])
    found = log_likelihoods(checkpoint.model, groups, progress)
    rows: list[dict[str, Any]] = []
    for question, likelihoods in zip(questions, found, strict=True):
        sizes = [len(continuation.strip().encode()) for _, continuation in question.candidates]
        totals = [one.total for one in likelihoods]
        chosen = {
            "none": _best(totals),
            "token": _best([one.total / len(one.logprobs) for one in likelihoods]),
            "byte": _best([total / size for total, size in zip(totals, sizes, strict=True)]),
        }
        rows.append({"origin": question.origin, "logprobs": totals, "gold": question.gold, "chosen": chosen})
    measures = [
        mean(name, [row["chosen"][key] == row["gold"] for row in rows], unit="%")
        for name, key in (("accuracy", "none"), ("accuracy per token", "token"), ("accuracy per byte", "byte"))
    ]
    return Outcome(measures, rows, notes)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


def _continuations(
    checkpoint: Checkpoint, task: Task, questions: Sequence[Sequence[tuple[str, str]]]
) -> tuple[list[list[Scored]], list[str]]:
    """Prompts with their continuations, encoded together as a text would be; what is too long loses its beginning."""
    tokenizer, start, longest = checkpoint.tokenizer, start_token(checkpoint), checkpoint.config.context_length + 1
    prompts: dict[str, list[int]] = {}
    groups, cut = [], 0
    for number, question in enumerate(questions, start=1):
        group = []
        for prompt, continuation in question:
            if prompt not in prompts:
                prompts[prompt] = tokenizer.encode(prompt)
            ids, before = tokenizer.encode(prompt + continuation), prompts[prompt]
            # Where the two meet, a token may span the border: it counts as the continuation's.
            first = next((at for at, (one, other) in enumerate(zip(ids, before, strict=False)) if one != other), None)
            first = min(len(before), len(ids) - 1) if first is None else first
            ids, first = [*start, *ids], first + len(start)
            if first == 0:
                raise DataError(
                    f"{task.name}: row {number} has nothing before its continuation", field=task.kind,
                    hint="give it a prompt",
                )  # fmt: skip
            if len(ids) > longest:
                excess = len(ids) - longest
                if excess >= first:
                    raise DataError(
                        f"{task.name}: the continuation of row {number} alone is longer than the context of "
                        f"{longest - 1} tokens",
                        field=task.kind,
                        hint="take the row out, or choose a checkpoint with a longer context",
                    )
                ids, first, cut = ids[excess:], first - excess, cut + 1
            group.append(Scored(ids, first))
        groups.append(group)
    notes = [f"{cut} texts longer than the context of {longest - 1} tokens lost their beginning"] if cut else []
    return groups, notes


def _check_fit(checkpoint: Checkpoint, groups: Sequence[Sequence[Scored]], task: Task) -> None:
    longest = checkpoint.config.context_length + 1
    for scored in chain.from_iterable(groups):
        if len(scored.token_ids) > longest or len(scored.token_ids) < 2:
            raise DataError(
                f"{task.name}: a sentence of {len(scored.token_ids)} tokens; 2 to {longest} can be scored",
                field=task.kind,
            )
