"""A larger model's answers to questions, as conversations to tune a small one on (Kim and Rush 2016)."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topkapi.engine.batch import run_batch
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError, InvalidRequest, SettingsError
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.model.user_files import LONGEST_TEXT, read_file
from topkapi.training.data.finding import no_such_file
from topkapi.training.data.instructions import messages_of
from topkapi.training.data.preparation import Limits, Messages, clean, unusable, write_rows
from topkapi.training.data.row_files import read_rows
from topkapi.training.data.sources import decode_utf8, parse_json, read_lines
from topkapi.training.evaluation.answers import check_max_tokens, greedy_jobs, leak_pattern
from topkapi.training.evaluation.text_measures import repetition

# Answers are kept after every so many rounds of all slots.
_ROUNDS = 4
_MOST_REPETITION = 0.1


@dataclass
class DistillationProgress:
    """How far answering has come: `kept` and `left_out` in the files, `seconds`, `tokens` and `rows` in this run."""

    questions: int
    answered: int = 0
    kept: int = 0
    tokens: int = 0
    rows: int = 0
    seconds: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)

    def line(self, out: Path) -> str:
        """One line for the console."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        speed = (
            f" ({self.tokens / self.seconds:,.0f} tokens/s, {3600 * self.rows / self.seconds:,.0f} rows an hour)"
            if self.seconds
            else ""
        )
        return (
            f"{out}: {self.answered:,} of {self.questions:,} answered, {self.kept:,} kept{speed}; "
            f"left out: {reasons or 'none'}"
        )


@dataclass
class Earlier:
    """What earlier runs did: the questions answered (as JSON), and why others were left out."""

    answered: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def read_earlier(out: Path) -> Earlier:
    """What is in `out` and in the file of left-out questions beside it; nothing where there is no `out`.

    Raises `SettingsError` for an `out` that `answer_questions` did not write.
    """
    beside = _beside(out)
    if not out.exists():
        return Earlier()
    if not beside.is_file():
        if out.is_file() and not out.stat().st_size:
            return Earlier()
        raise _foreign(out, f"there is no {beside.name} beside it")
    found = Earlier()
    for origin, row in read_rows(out):
        messages = row.get("messages") if isinstance(row, dict) and set(row) == {"messages"} else None
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(messages, list) or not isinstance(last, dict) or last.get("role") != "assistant":
            raise _foreign(out, f"{origin} is not {{messages}} with an answer")
        found.answered.append(json.dumps(messages[:-1]))
    for number, line in read_lines(beside):
        row = parse_json(decode_utf8(line, beside, number), beside, number)
        if not isinstance(row, dict) or set(row) != {"question", "reason"}:
            raise _foreign(beside, f"line {number} is not {{question, reason}}")
        found.left_out[json.dumps(row["question"])] = str(row["reason"])
    return found


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.left-out")


def _foreign(path: Path, reason: str) -> SettingsError:
    return SettingsError(f"{path} was not written by this command: {reason}", field="out", hint="choose another --out")


def read_questions(paths: Sequence[Path]) -> list[Messages]:
    """Conversations without their last answer: of files that `finetune` reads, or the lines of `.txt` files; each once.

    Raises `DataError` for what cannot be read.
    """
    found: list[Messages] = []
    for path in paths:
        if not path.is_file():
            raise no_such_file(str(path), field="files")
        if path.suffix == ".txt":
            try:
                lines = read_file(path, LONGEST_TEXT, field="files").decode("utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} cannot be read: {error}", field="files") from None
            found += [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]
            continue
        for origin, row in read_rows(path):
            for messages in messages_of(row, origin, False):
                found.append(messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages)
    questions = list({json.dumps(messages): messages for messages in found if messages}.values())
    if not questions:
        raise DataError("there are no questions", field="files")
    return questions


def answer_questions(
    teacher: Checkpoint,
    questions: Sequence[Messages],
    out: Path,
    *,
    earlier: Earlier,
    system: str | None,
    limits: Limits,
    max_tokens: int,
    slots: int,
) -> Iterator[DistillationProgress]:
    """Append to `out` the questions with the teacher's answers that a small model can use; yields after every part.

    What `earlier` runs answered or left out is not asked again. `system` steers the teacher and is not written. Raises
    `SettingsError` for a teacher without a chat template, answers longer than its context, an `out` that cannot be
    written.
    """
    if teacher.chat is None:
        raise SettingsError(f"{teacher.name} has no chat template: it cannot answer", field="checkpoint")
    check_max_tokens(max_tokens, teacher)
    done = {*earlier.answered, *earlier.left_out}
    unasked = [messages for messages in questions if json.dumps(messages) not in done]
    progress = DistillationProgress(len(questions), len(questions) - len(unasked), len(earlier.answered))
    progress.left_out.update(earlier.left_out.values())
    if not out.exists():
        write_rows(_beside(out), ())
    write_rows(out, (), "a")
    write_rows(_beside(out), (), "a")
    if not unasked:
        yield progress
    leaks = leak_pattern(teacher.chat, teacher.tokenizer)
    started = time.monotonic()
    for start in range(0, len(unasked), _ROUNDS * slots):
        part = unasked[start : start + _ROUNDS * slots]
        prompts = {at: ids for at, messages in enumerate(part) if (ids := _prompt(teacher, messages, system))}
        order = sorted(prompts, key=lambda at: len(prompts[at]))
        jobs = greedy_jobs(teacher, [prompts[at] for at in order], max_tokens)
        answers = dict(zip(order, run_batch(teacher.model, jobs, together=slots), strict=True))
        rows, dropped = [], []
        for at, messages in enumerate(part):
            reason: str | None = "question too long"
            if at in answers:
                ids, stopped = list(answers[at].token_ids), answers[at].finish_reason == "stop"
                progress.tokens += len(ids)
                answer = teacher.tokenizer.decode(ids[:-1] if stopped else ids).strip()
                row = [*messages, {"role": "assistant", "content": clean(answer)}]
                if not stopped:
                    reason = "did not end"
                elif leaks.search(answer):
                    reason = "template leak"
                elif repetition(answer) > _MOST_REPETITION:
                    reason = "repetition"
                elif (reason := unusable(row, limits)) is None:
                    rows.append({"messages": row})
            if reason is not None:
                progress.left_out[reason] += 1
                dropped.append({"question": messages, "reason": reason})
        write_rows(out, rows, "a")
        write_rows(_beside(out), dropped, "a")
        progress.answered += len(part)
        progress.kept += len(rows)
        progress.rows += len(rows)
        progress.seconds = time.monotonic() - started
        yield progress


def _prompt(teacher: Checkpoint, messages: Messages, system: str | None) -> list[int]:
    """The question as the teacher's template renders it; empty where no answer would fit."""
    chat = teacher.chat
    assert isinstance(chat, ChatTemplate)
    steered = [{"role": "system", "content": system}, *messages] if system is not None else messages
    try:
        ids = chat.encode(steered, teacher.tokenizer, add_generation_prompt=True).token_ids
    except InvalidRequest as error:
        raise SettingsError(f"{teacher.name} cannot be asked: {error.message}", field="system") from None
    return ids if len(ids) < teacher.config.context_length else []
