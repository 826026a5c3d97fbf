"""`topkapi evaluate`: its flags, and every task of every checkpoint in turn."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkapi.model.errors import SettingsError

if TYPE_CHECKING:
    from topkapi.model.storage.checkpoint import Checkpoint
    from topkapi.training.evaluation.judge import Judge
    from topkapi.training.evaluation.report import Evaluation
    from topkapi.training.evaluation.scoring_tasks import Outcome, TaskProgress
    from topkapi.training.evaluation.tasks import Task

_KINDS = {
    "perplexity": "texts: perplexity and bits per byte",
    "lambada": "{context, continuation} rows: is the last word what the model says?",
    "blimp": "a folder of minimal pairs {sentence_good, sentence_bad}, or one file",
    "choices": "{query, choices, gold} rows: multiple choice by log-likelihood",
    "instructions": "rows that finetune reads, IFEval's, or rows with checks: answers are generated and measured",
    "exercises": "rows of `topkapi instructions make --held-out`: the share of right answers, of each kind too",
}
_ANSWERING = ("instructions", "exercises")
_SPLIT = ("train_examples", "test_examples")


def add_evaluate(subparsers: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = subparsers.add_parser(
        "evaluate",
        help="measure checkpoints on texts, questions and instructions",
        description="Measure checkpoints, with 95 % intervals and the paired differences from the first one. Every "
        "flag for files may name several.",
    )
    command.add_argument(
        "checkpoint",
        nargs="+",
        help="directory, .gguf file or owner/name on the Hugging Face hub; several are compared with the first",
    )
    group = command.add_argument_group("what is measured")
    for kind, meaning in _KINDS.items():
        group.add_argument(
            f"--{kind}", nargs="+", default=[], metavar="DIR" if kind == "blimp" else "FILE", help=meaning
        )
    group.add_argument("--tasks", type=Path, metavar="YAML", help="a list of tasks: {kind, file, name, limit, …}")
    group.add_argument("--limit", type=int, metavar="N", help="first N rows of each file (BLiMP: of each paradigm)")
    answers = command.add_argument_group("answers")
    answers.add_argument("--max-tokens", type=int, metavar="N", help="longest answer [256]")
    answers.add_argument(
        "--test-examples", type=int, metavar="N", help="so many rows of --instructions, the last ones [all]"
    )
    answers.add_argument("--train-examples", type=int, metavar="N", help="the test examples follow after these")
    answers.add_argument("--chat-template", metavar="TEXT", help="chatml, alpaca or a file [the checkpoint's own]")
    answers.add_argument("--judge", metavar="URL", help="endpoint of OpenAI's shape that grades answers 0 to 100")
    answers.add_argument("--judge-model", metavar="NAME", help="the judge's model; its key is in OPENAI_API_KEY")
    command.add_argument("--out", type=Path, metavar="DIR", help="write evaluation.json, evaluation.md, items.jsonl")
    command.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "int8"), default="float32", help="precision [float32]"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads [chosen by PyTorch]")
    command.set_defaults(handler=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    evaluation = measured(arguments)
    from topkapi.training.evaluation import report

    print(report.console(evaluation))
    if arguments.out is not None:
        print(f"written: {arguments.out / 'evaluation.md'}, evaluation.json, items.jsonl")
    return 0


def measured(arguments: argparse.Namespace) -> Evaluation:
    """What is found of the checkpoints, also written where `out` says. Raises `TopkapiError` for what cannot be."""
    from topkapi.model.hub.names import meant
    from topkapi.model.hub.resolve import local_path
    from topkapi.model.storage.location import check_location
    from topkapi.training.evaluation.judge import Judge
    from topkapi.training.run.preflight import check_chat_template

    for name in arguments.checkpoint:
        if meant(name) is None:
            check_location(local_path(name))
    tasks = _tasks(arguments)
    answering = [task for task in tasks if task.kind in _ANSWERING]
    for name in ("max_tokens", "chat_template", "judge", "judge_model"):
        if getattr(arguments, name) is not None and not answering:
            flag = name.replace("_", "-")
            raise SettingsError(f"--{flag} applies to --instructions and --exercises, and neither is given", field=name)
    if (arguments.judge is None) != (arguments.judge_model is None):
        raise SettingsError("--judge and --judge-model belong together", field="judge")
    judge = None if arguments.judge is None else Judge(arguments.judge, arguments.judge_model)
    if len(set(arguments.checkpoint)) < len(arguments.checkpoint):
        raise SettingsError("the same checkpoint is named twice", field="checkpoint")
    if arguments.threads is not None and arguments.threads < 1:
        raise SettingsError("--threads must be at least 1", field="threads")
    check_chat_template(arguments.chat_template)
    # What is downloaded, and what takes seconds to import, comes after all that could be refused.
    paths = {name: local_path(name) for name in arguments.checkpoint}
    for path in paths.values():
        check_location(path)
    import torch

    from topkapi.model.storage.checkpoint import load_checkpoint
    from topkapi.training.evaluation import report
    from topkapi.training.evaluation.answers import check_max_tokens

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    outcomes: list[list[Outcome]] = [[] for _ in tasks]
    seconds: list[list[float]] = [[] for _ in tasks]
    for name in arguments.checkpoint:
        checkpoint = load_checkpoint(paths[name], dtype=dtype)
        for task in answering:
            # The default is a limit for any context; what is asked for must be possible.
            if "max_tokens" in task.model_fields_set:
                check_max_tokens(task.max_tokens, checkpoint)
        for index, task in enumerate(tasks):
            started = time.monotonic()
            outcomes[index].append(_run(checkpoint, task, arguments.chat_template, judge, _progress(name, task)))
            seconds[index].append(round(time.monotonic() - started, 2))
        del checkpoint
    evaluation = report.Evaluation(arguments.checkpoint, tasks, outcomes, seconds)
    if arguments.out is not None:
        report.write(evaluation, arguments.out)
    return evaluation


def _run(
    checkpoint: Checkpoint, task: Task, chat_template: str | None, judge: Judge | None, progress: TaskProgress
) -> Outcome:
    from topkapi.training.evaluation import scoring_tasks
    from topkapi.training.evaluation.answers import answer_instructions
    from topkapi.training.run.preflight import chat_template as read_template

    if task.kind == "perplexity":
        return scoring_tasks.perplexity(checkpoint, task, progress)
    if task.kind == "blimp":
        return scoring_tasks.blimp(checkpoint, task, progress)
    if task.kind == "lambada":
        return scoring_tasks.lambada(checkpoint, task, progress)
    if task.kind == "choices":
        return scoring_tasks.multiple_choice(checkpoint, task, progress)
    return answer_instructions(checkpoint, task, progress, read_template(chat_template), judge)


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    from topkapi.training.evaluation.tasks import build_task, read_tasks

    for name in _SPLIT:
        if getattr(arguments, name) is not None and not arguments.instructions:
            raise SettingsError(f"--{name.replace('_', '-')} applies to --instructions, which is not given", field=name)
    for name in ("limit", "max_tokens", "test_examples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least 1, not {value}", field=name)
    common = {} if arguments.limit is None else {"limit": arguments.limit}
    tasks = []
    for kind in _KINDS:
        own = dict(common)
        if kind in _ANSWERING and arguments.max_tokens is not None:
            own["max_tokens"] = arguments.max_tokens
        if kind == "instructions":
            own |= {name: getattr(arguments, name) for name in _SPLIT if getattr(arguments, name) is not None}
        tasks += [build_task({"kind": kind, "file": file, **own}, f"--{kind}") for file in getattr(arguments, kind)]
    if arguments.tasks is not None:
        if arguments.limit is not None or arguments.max_tokens is not None:
            raise SettingsError(
                "--limit and --max-tokens do not apply to --tasks", field="tasks", hint="write them into the file"
            )
        tasks += read_tasks(arguments.tasks)
    if not tasks:
        kinds = ", ".join(f"--{kind}" for kind in _KINDS)
        raise SettingsError("nothing to measure", field="tasks", hint=f"give files with {kinds} or --tasks")
    names: set[str] = set()
    for task in tasks:
        # Two files of the same name from two folders, or one file measured in two ways.
        base, number = task.name, 2
        while task.name in names:
            task.name, number = f"{base} {number}", number + 1
        names.add(task.name)
    return tasks


def _progress(name: str, task: Task) -> TaskProgress:
    """A line that is rewritten on a terminal, and nothing elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\r" if done < total else "\r\033[K"
            print(f"{name}  {task.name}  {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)

    return show
