"""Instruction tasks: answers are generated greedily, in a batch, and measured offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from topkapi.engine.batch import run_batch
from topkapi.engine.request import GenerateJob
from topkapi.model.conversation.chat_template import BUILT_IN_TEMPLATES, ChatTemplate
from topkapi.model.decoding.parameters import resolve
from topkapi.model.errors import InvalidRequest, SettingsError
from topkapi.model.generation import GenerationResult
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.evaluation.judge import Judge
from topkapi.training.evaluation.measures import Measure, mean
from topkapi.training.evaluation.scoring_tasks import Outcome, TaskProgress
from topkapi.training.evaluation.tasks import Instruction, Task, exercises, instructions
from topkapi.training.evaluation.text_measures import exact_match, repetition, rouge_l, token_f1

# Scaffolding of a template shorter than this may well occur in an honest answer.
_LEAST_LEAK = 6


def answer_instructions(
    checkpoint: Checkpoint,
    task: Task,
    progress: TaskProgress,
    chat: ChatTemplate | None = None,
    judge: Judge | None = None,
) -> Outcome:
    """Answer every instruction of a file through the chat template, as `finetune` renders it, and measure the answers.

    Raises `SettingsError` for a checkpoint without a template where none is given.
    """
    template = chat or checkpoint.chat
    if template is None:
        raise SettingsError(
            f"{checkpoint.name} has no chat template, so its prompts cannot be written",
            field="chat_template",
            hint="give --chat-template chatml, alpaca or a Jinja file",
        )
    if judge is not None:
        judge.check()
    rows = exercises(task) if task.kind == "exercises" else instructions(task, template.name == "alpaca")
    prompts = [_prompt(row, template, checkpoint.tokenizer) for row in rows]
    fitting = [number for number, ids in enumerate(prompts) if len(ids) < checkpoint.config.context_length]
    # Prompts of like length share the cache better, and all slots end at about the same time.
    order = sorted(fitting, key=lambda number: len(prompts[number]))
    jobs = greedy_jobs(checkpoint, [prompts[number] for number in order], task.max_tokens)
    generated: list[GenerationResult | None] = [None] * len(rows)
    for number, generation in zip(order, run_batch(checkpoint.model, jobs, progress=progress), strict=True):
        generated[number] = generation
    leaks = leak_pattern(template, checkpoint.tokenizer)
    records = [_record(row, one, checkpoint, leaks) for row, one in zip(rows, generated, strict=True)]
    if judge is not None:
        for row, record, score in zip(rows, records, judge.scores(rows, records), strict=True):
            record["judge"] = score if row else None
    notes = _notes(rows, records, judge)
    if task.kind == "exercises":
        return Outcome(_exercise_measures(records), records, notes, _parts(rows, records))
    return Outcome(_measures(records), records, notes)


def greedy_jobs(checkpoint: Checkpoint, prompts: Sequence[list[int]], max_tokens: int) -> list[GenerateJob]:
    """What the engine is given to continue each prompt by the most likely tokens, up to `max_tokens` of them."""
    config = checkpoint.config
    asked = {"temperature": 0, "max_tokens": max_tokens}
    parameters = resolve(asked, vocab_size=config.vocab_size, end_token_ids=config.end_token_ids)
    return [GenerateJob(prompt, parameters) for prompt in prompts]


def check_max_tokens(max_tokens: int, checkpoint: Checkpoint) -> None:
    """Raise `SettingsError` for answers that would not fit into the context with a prompt of one token."""
    context = checkpoint.config.context_length
    if max_tokens >= context:
        raise SettingsError(
            f"--max-tokens {max_tokens} does not fit: the context of {checkpoint.name} holds {context} tokens",
            field="max_tokens",
            hint=f"give at most {context - 1}; the question needs room too",
        )


def _prompt(row: Instruction, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    try:
        return template.encode(row.messages, tokenizer, add_generation_prompt=True).token_ids
    except InvalidRequest as error:
        raise SettingsError(f"{row.origin}: {error.message}", field="chat_template", hint=error.hint) from None


def _record(
    row: Instruction, generation: GenerationResult | None, checkpoint: Checkpoint, leaks: re.Pattern[str]
) -> dict[str, Any]:
    ids = [] if generation is None else list(generation.token_ids)
    stopped = generation is not None and generation.finish_reason == "stop"
    if stopped:
        ids.pop()
    answer = checkpoint.tokenizer.decode(ids).strip()
    record: dict[str, Any] = {
        "origin": row.origin,
        "prompt": row.messages[-1]["content"],
        "answer": answer,
        "tokens": len(ids),
        "finish_reason": "too long" if generation is None else generation.finish_reason,
        "stopped": stopped,
        "repetition": repetition(answer),
        "leak": bool(leaks.search(answer)),
    }
    if row.groups:
        record["groups"] = list(row.groups)
    if row.reference is not None:
        record |= {
            "reference": row.reference,
            "exact_match": exact_match(answer, row.reference),
            "token_f1": token_f1(answer, row.reference),
            "rouge_l": rouge_l(answer, row.reference),
        }
    if row.checks:
        record["checks"] = {f"{at} {check.kind}": check.passes(answer) for at, check in enumerate(row.checks, start=1)}
    return record


def _measures(records: Sequence[dict[str, Any]]) -> list[Measure]:
    def of(name: str, key: str, **options: Any) -> Measure:
        return mean(name, [record.get(key) for record in records], **options)

    kept = [all(record["checks"].values()) if "checks" in record else None for record in records]
    measures = [
        of("exact match", "exact_match", unit="%"),
        of("token F1", "token_f1", share=True),
        of("ROUGE-L", "rouge_l", share=True),
        mean("checks kept", kept, unit="%"),
        of("judge", "judge"),
        of("stop rate", "stopped", unit="%"),
        of("repetition", "repetition", unit="%", higher_is_better=False),
        of("template leaks", "leak", unit="%", higher_is_better=False),
        of("tokens per answer", "tokens"),
    ]
    return [measure for measure in measures if measure.items]


def _exercise_measures(records: Sequence[dict[str, Any]]) -> list[Measure]:
    """Of exercises only the rules say what is right."""
    correct = mean("correct", [all(record["checks"].values()) for record in records], unit="%")
    left_out = ("exact match", "token F1", "ROUGE-L", "checks kept")
    return [correct, *(measure for measure in _measures(records) if measure.name not in left_out)]


def _parts(rows: Sequence[Instruction], records: Sequence[dict[str, Any]]) -> list[Measure]:
    """The share of right answers in each group, those of the wordings first."""
    groups = sorted(
        {group for row in rows for group in row.groups}, key=lambda name: (not name.endswith("wordings"), name)
    )
    return [
        mean(
            f"correct: {group}",
            [
                all(record["checks"].values()) if group in row.groups else None
                for row, record in zip(rows, records, strict=True)
            ],
            unit="%",
        )
        for group in groups
    ]


def _notes(rows: Sequence[Instruction], records: Sequence[dict[str, Any]], judge: Judge | None) -> list[str]:
    notes = []
    if too_long := sum(record["finish_reason"] == "too long" for record in records):
        notes.append(f"{too_long} prompts fill the context and were not answered: they count as empty answers")
    if unknown := sorted({name for row in rows for name in row.left_out}):
        notes.append(f"rules that are not checked: {', '.join(unknown)}")
    if judge is not None and (failed := sum(record.get("judge") is None for record in records)):
        notes.append(f"the judge gave no score for {failed} answers")
        notes += [f"{count} times: {reason}" for reason, count in judge.failures.items()]
    return notes


def leak_pattern(template: ChatTemplate, tokenizer: Tokenizer) -> re.Pattern[str]:
    """What only templates say: control tokens' spellings, and the lines that this or a built-in one puts around
    messages, with or without the colon that ends them."""
    spellings = set(tokenizer.control_tokens)
    for each in (template, *map(ChatTemplate.built_in, BUILT_IN_TEMPLATES)):
        spellings |= {line.removesuffix(":") for line in _scaffolding(each)}
    return re.compile("|".join(map(re.escape, sorted(spellings | {"### Input"}))))


def _scaffolding(template: ChatTemplate) -> set[str]:
    said = ("\ue0f0", "\ue0f1", "\ue0f2")
    messages = [
        {"role": role, "content": content} for role, content in zip(("user", "assistant", "user"), said, strict=True)
    ]
    try:
        text = template.render(messages)
    except InvalidRequest:
        return set()
    lines = {line.strip() for line in re.split(f"[{''.join(said)}\n]", text)}
    return {line for line in lines if len(line) >= _LEAST_LEAK}
