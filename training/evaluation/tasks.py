"""What is to be evaluated: files and their kinds, from flags or a YAML list, and the rows in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from topkapi.model.errors import DataError, SettingsError
from topkapi.model.user_files import LONGEST_SETTINGS, expanded, read_file, what_it_is
from topkapi.model.wrong_values import told
from topkapi.model.yaml_reading import parse_yaml
from topkapi.training.data.finding import no_such_file
from topkapi.training.data.sources import read_documents
from topkapi.training.evaluation.checks import Check, ifeval_checks, parse_checks

Kind = Literal["perplexity", "lambada", "blimp", "choices", "instructions", "exercises"]


class Task(BaseModel):
    """One file (of BLiMP: a folder) and how it is evaluated. The fields are the keys of a YAML entry."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    file: Path
    name: str = Field("", description="as which it is reported (default: the file's name)")
    limit: int | None = Field(None, ge=1, description="first so many rows; of BLiMP, of each paradigm")
    text_field: str = Field("text", description="perplexity of .jsonl and .parquet: the field with the text")
    window: int | None = Field(None, ge=2, description="perplexity: tokens read at a time (default: the context)")
    stride: int | None = Field(None, ge=1, description="perplexity: tokens between windows (default: half a window)")
    delimiter: str = Field(" ", description="choices, lambada: between a prompt and what follows it")
    max_tokens: int = Field(256, ge=1, description="instructions, exercises: longest answer")
    train_examples: int | None = Field(
        None, ge=0, description="instructions: what is tested follows after so many rows (default: it ends the file)"
    )
    test_examples: int | None = Field(None, ge=1, description="instructions: so many rows are tested (default: all)")

    @model_validator(mode="after")
    def _check(self) -> Task:
        self.name = self.name or re.sub(r"\.jsonl?(\.bz2|\.gz|\.zst)?$|\.txt$", "", self.file.name)
        applies = {
            "text_field": ("perplexity",),
            "window": ("perplexity",),
            "stride": ("perplexity",),
            "delimiter": ("choices", "lambada"),
            "max_tokens": ("instructions", "exercises"),
            "train_examples": ("instructions",),
            "test_examples": ("instructions",),
        }
        for name in sorted(self.model_fields_set & applies.keys()):
            if self.kind not in applies[name]:
                raise ValueError(f"{name} does not apply to {self.kind}")
        if self.train_examples is not None and self.test_examples is None:
            raise ValueError("train_examples needs test_examples, the number of rows after them")
        return self


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a YAML list; files are relative to it. Raises `SettingsError` naming the entry at fault."""
    try:
        content = parse_yaml(read_file(path, LONGEST_SETTINGS, field="tasks", kind=SettingsError).decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"the tasks {path} cannot be read: {' '.join(str(error).split())}", field="tasks") from None
    if not isinstance(content, list) or not content:
        raise SettingsError(f"{path} must be a list of tasks", field="tasks", hint=_EXAMPLE)
    return [build_task(entry, f"{path}, entry {number}", path.parent) for number, entry in enumerate(content, 1)]


_EXAMPLE = "- {kind: lambada, file: lambada.jsonl, limit: 300}"


def build_task(entry: object, origin: str, base: Path = Path()) -> Task:
    """One task; its file must exist."""
    try:
        task = Task.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        said = str(first["msg"]).removeprefix("Value error, ")
        shown = told(name, first, Task.model_fields.get(name)) if name else said
        hint = f"fields: {', '.join(Task.model_fields)}; for example {_EXAMPLE}"
        raise SettingsError(f"{origin}: {shown}", field=name or None, hint=hint) from None
    task.file = base / expanded(task.file)
    if not task.file.exists():
        raise no_such_file(str(task.file), f"{origin}: no such file", field=task.kind)
    if (other := what_it_is(task.file)) and not (task.file.is_dir() and task.kind == "blimp"):
        raise DataError(f"{origin}: {task.file} {other}", field=task.kind, hint="name its files")
    return task


@dataclass(frozen=True)
class Choice:
    """A question: candidates of `(prompt, continuation)`, of which `gold` is right."""

    candidates: list[tuple[str, str]]
    gold: int
    origin: str


@dataclass(frozen=True)
class Instruction:
    """Messages to answer, with what the answer is compared with or checked by. `left_out` names unknown checks.

    `groups` are what an exercise is counted among: its kind, and whether its wording was trained on.
    """

    messages: list[dict[str, str]]
    origin: str
    reference: str | None = None
    checks: list[Check] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    groups: tuple[str, ...] = ()


def documents(task: Task) -> list[str]:
    """The texts of a perplexity task."""
    return list(islice(read_documents(task.file, task.text_field), task.limit))


def pairs(task: Task) -> dict[str, list[tuple[str, str]]]:
    """BLiMP's minimal pairs `(good, bad)` by paradigm: a folder of `.jsonl` files, or one file."""
    files = sorted(task.file.glob("*.jsonl")) if task.file.is_dir() else [task.file]
    if not files:
        raise DataError(f"{task.file} holds no .jsonl files", field="blimp", hint=_PAIRS)
    return {
        file.stem: [
            (_text(row, "sentence_good", origin, _PAIRS), _text(row, "sentence_bad", origin, _PAIRS))
            for origin, row in _rows(file, task)
        ]
        for file in files
    }


_PAIRS = "rows are {sentence_good, sentence_bad}"


def completions(task: Task) -> list[tuple[str, str]]:
    """LAMBADA's rows, `(context, what follows it)`."""
    hint = "rows are {context, continuation}"
    return [
        (_text(row, "context", origin, hint), _text(row, "continuation", origin, hint))
        for origin, row in _rows(task.file, task)
    ]


def choices(task: Task) -> list[Choice]:
    """The questions of a multiple-choice file."""
    return [_choice(row, origin, task.delimiter) for origin, row in _rows(task.file, task)]


_CHOICES = "rows are {query, choices, gold} or {context_options, continuation, gold}, gold counting from 0"


def _choice(row: object, origin: str, delimiter: str) -> Choice:
    given = row if isinstance(row, dict) else {}
    several = given.get("choices", given.get("context_options"))
    if not isinstance(several, list) or len(several) < 2 or not all(isinstance(one, str) for one in several):
        raise DataError(f"{origin}: two or more texts are needed to choose from", field="choices", hint=_CHOICES)
    gold = given.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(several):
        raise DataError(f"{origin}: gold must be 0 to {len(several) - 1}, not {gold!r}", field="choices", hint=_CHOICES)
    if "choices" in given:
        prompt = _text(row, "query", origin, _CHOICES)
        candidates = [(prompt, joined(one, delimiter)) for one in several]
    else:
        continuation = joined(_text(row, "continuation", origin, _CHOICES), delimiter)
        candidates = [(one, continuation) for one in several]
    if not all(continuation.strip() for _, continuation in candidates):
        raise DataError(f"{origin}: an empty choice", field="choices", hint=_CHOICES)
    return Choice(candidates, gold, origin)


def joined(continuation: str, delimiter: str) -> str:
    """What follows a prompt; one that brings its own white space gets no delimiter."""
    return continuation if continuation[:1].isspace() else delimiter + continuation


def instructions(task: Task, input_heading: bool) -> list[Instruction]:
    """The rows of an instruction file: those `finetune` reads, IFEval's, and either with `checks`."""
    return [
        instruction
        for origin, row in _rows(task.file, task)
        for instruction in _instructions(row, origin, input_heading)
    ]


def exercises(task: Task) -> list[Instruction]:
    """The rows of an exercise file, as `topkapi instructions make` writes them: all have checks and a kind."""
    found = []
    for origin, row in _rows(task.file, task):
        (instruction,) = _instructions(row, origin, False)
        kind, wording = (row.get(name) for name in ("kind", "wording")) if isinstance(row, dict) else (None, None)
        if not instruction.checks or not isinstance(kind, str):
            raise DataError(
                f"{origin}: an exercise needs a kind and checks",
                field="exercises",
                hint="topkapi instructions make --held-out writes such rows; others go to --instructions",
            )
        groups = (kind, f"{wording} wordings") if wording in ("new", "seen") else (kind,)
        found.append(replace(instruction, groups=groups))
    return found


def _instructions(row: object, origin: str, input_heading: bool) -> Iterator[Instruction]:
    # torch comes with it.
    from topkapi.training.data.instructions import messages_of

    given: dict[str, Any] = dict(row) if isinstance(row, dict) else {}
    checks = parse_checks(given.pop("checks"), origin) if "checks" in given else []
    left_out: list[str] = []
    unanswered = checks and not {"output", "completion", "answer", "messages", "instances"} & given.keys()
    if "instruction_id_list" in given:
        more, left_out = ifeval_checks(given, origin)
        checks, unanswered = [*checks, *more], True
    if unanswered:
        prompt = given.get("prompt", given.get("instruction", given.get("question")))
        if not isinstance(prompt, str):
            raise DataError(f"{origin}: no prompt", field="data", hint="rows with checks need a prompt")
        yield Instruction([{"role": "user", "content": prompt}], origin, None, checks, left_out)
        return
    for messages in messages_of(given, origin, input_heading):
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError(f"{origin}: the last message must be the assistant's answer", field="data")
        reference = messages[-1]["content"]
        # GSM8K ends its answers with the number that counts.
        number = re.search(r"####\s*(-?[\d,.]*\d)\s*$", reference)
        own = [Check("number", {"value": float(number[1].replace(",", ""))})] if number and not checks else checks
        yield Instruction(messages[:-1], origin, reference, own)


def _rows(path: Path, task: Task) -> Iterator[tuple[str, object]]:
    from topkapi.training.data.row_files import read_rows

    if task.test_examples is None:
        rows = list(islice(read_rows(path), task.limit))
    else:
        every = list(read_rows(path))
        start = len(every) - task.test_examples if task.train_examples is None else task.train_examples
        if start < 0 or start + task.test_examples > len(every):
            raise DataError(
                f"{path} has {len(every)} rows: {task.test_examples} test examples after {max(start, 0)} do not fit",
                field="test_examples",
            )
        rows = every[start : start + task.test_examples][: task.limit]
    if not rows:
        raise DataError(f"{path} holds no rows", field=task.kind, hint="give a file with one or more")
    return iter(rows)


def _text(row: object, name: str, origin: str, hint: str) -> str:
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value:
        raise DataError(f"{origin}: no text in the field {name!r}", field=name, hint=hint)
    return value
