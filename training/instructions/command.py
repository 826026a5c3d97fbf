"""`topkapi instructions`: makes conversations to tune on and to judge by."""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from topkapi.model.errors import DataError, SettingsError
from topkapi.model.nearest import nearest
from topkapi.model.user_files import expanded
from topkapi.training.data.finding import no_such_file


def add_instructions(subparsers: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = subparsers.add_parser("instructions", help="make, prepare, ask for and answer instruction data")
    actions = command.add_subparsers(dest="action", required=True)
    make = actions.add_parser(
        "make",
        help="make exercises whose answers a rule can check",
        description="Write exercises (sums, spelling, grammar, lists, small talk, what was told earlier, …) as "
        "conversations that finetune reads, each with its kind and the checks of its answer. What --held-out writes "
        "shares no question with what it does not, whatever the seeds.",
    )
    make.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .jsonl file to write")
    make.add_argument("--count", type=int, metavar="N", help="rows [40000; held out: 1000]")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="decides which rows [0]")
    make.add_argument("--held-out", action="store_true", help="rows to judge by, for evaluate --exercises")
    make.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="only these kinds, or groups of them: see topkapi instructions kinds [all]",
    )
    make.add_argument(
        "--steps", action="store_true", help="answer sums and counts with what one writes down on the way"
    )
    _add_except(make)
    make.set_defaults(handler=_make)

    kinds = actions.add_parser(
        "kinds",
        help="list the kinds of exercise",
        description="List the kinds of exercise that make knows, by the groups that --kinds takes as well.",
    )
    kinds.set_defaults(handler=_kinds)

    prepare = actions.add_parser(
        "prepare",
        help="keep of instruction files what a small model can use",
        description="Write conversations of files that finetune reads into a folder, one .jsonl each: short ones in "
        "plain English, each question once, without footnote marks and GSM8K's calculations.",
    )
    prepare.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".json or .jsonl files")
    prepare.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the .jsonl files")
    prepare.add_argument(
        "--first",
        type=int,
        metavar="N",
        help="only the first N rows; the others are held out, and so are their questions",
    )
    prepare.add_argument(
        "--honest",
        action="store_true",
        help="keep only single questions that a small model cannot answer, each with an honest sentence that says so",
    )
    _add_except(prepare)
    prepare.add_argument("--longest-question", type=int, default=800, metavar="N", help="in characters [800]")
    prepare.add_argument("--longest-answer", type=int, default=320, metavar="N", help="in characters [320]")
    prepare.set_defaults(handler=_prepare)

    ask = actions.add_parser(
        "ask",
        help="write open questions, for a larger model to answer",
        description="Write open questions that ask for no facts (describe, compare, advise, comfort), a line each, "
        "for instructions answer.",
    )
    ask.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .txt file to write")
    ask.add_argument("--count", type=int, default=5000, metavar="N", help="questions [5000]")
    ask.add_argument("--seed", type=int, default=0, metavar="N", help="decides which [0]")
    ask.set_defaults(handler=_ask)

    answer = actions.add_parser(
        "answer",
        help="have a larger model answer questions, to tune a small one on (distillation)",
        description="Answer questions in bulk, greedily, and append the answers that end by themselves, are short, in "
        "plain English and repeat nothing. The other questions are noted beside --out in FILE.left-out, so that a run "
        "that was stopped goes on without asking twice.",
    )
    answer.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="what finetune reads, or .txt: a question a line"
    )
    answer.add_argument(
        "--checkpoint", required=True, metavar="CKPT", help="directory or .gguf file of the larger model"
    )
    answer.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="the .jsonl file: a new one, or one to go on in"
    )
    answer.add_argument("--system", metavar="TEXT", help="system message, such as how long answers should be [none]")
    answer.add_argument("--limit", type=int, metavar="N", help="only the first N questions [all]")
    answer.add_argument("--longest-answer", type=int, default=320, metavar="N", help="in characters [320]")
    answer.add_argument("--max-tokens", type=int, default=96, metavar="N", help="answers that go on are dropped [96]")
    answer.add_argument("--slots", type=int, default=32, metavar="N", help="questions answered at once [32]")
    answer.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"),
        default="auto",
        help="precision, as in serving [auto: as stored]",
    )
    answer.add_argument("--threads", type=int, metavar="N", help="CPU threads [chosen by PyTorch]")
    answer.set_defaults(handler=_answer)


def _add_except(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--except",
        dest="without",
        type=Path,
        metavar="FILE",
        help="leave out what asks a line of this text file, whatever its case and punctuation: what is held out",
    )


def _excepted(path: Path | None) -> frozenset[str]:
    """The spellings of a file's lines. Raises `DataError` for one that is not there, or is no text."""
    from topkapi.training.data.exercises.typed import spelling

    if path is None:
        return frozenset()
    if not path.is_file():
        raise no_such_file(str(path), field="except")
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text in UTF-8", field="except") from None
    return frozenset(spelling(line) for line in lines if line.strip())


def _kinds(arguments: argparse.Namespace) -> int:
    from topkapi.training.data.exercises.rows import GROUPS

    for group, kinds in GROUPS.items():
        print(f"{group}:", *(f"  {kind}" for kind in kinds), sep="\n")
    return 0


def _make(arguments: argparse.Namespace) -> int:
    from topkapi.training.data.exercises.rows import GROUPS, MAKERS, make_rows
    from topkapi.training.data.preparation import write_rows

    wanted = (1000 if arguments.held_out else 40_000) if arguments.count is None else arguments.count
    asked = list(MAKERS) if arguments.kinds is None else arguments.kinds
    kinds = list(dict.fromkeys(kind for name in asked for kind in GROUPS.get(name, (name,))))
    if unknown := [kind for kind in kinds if kind not in MAKERS]:
        near = nearest(unknown[0], (*GROUPS, *MAKERS))
        hint = f"did you mean {near!r}?" if near else "topkapi instructions kinds lists them all"
        raise SettingsError(f"there is no kind {unknown[0]!r}", field="kinds", hint=hint)
    _check_draw(arguments, wanted)
    without = _excepted(arguments.without)
    rows = list(
        make_rows(
            arguments.seed, wanted, held_out=arguments.held_out, kinds=kinds, without=without, steps=arguments.steps
        )
    )
    write_rows(arguments.out, rows)
    of = Counter(row["kind"] for row in rows)
    print(
        f"{arguments.out}: {len(rows):,} exercises of {len(of)} kinds, "
        f"{min(of.values()):,} to {max(of.values()):,} of each"
    )
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from topkapi.training.data.preparation import Limits, prepare, write_rows

    for name in ("first", "longest_question", "longest_answer"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least 1, not {value}", field=name)
    without = _excepted(arguments.without)
    outs = [arguments.out / f"{path.name.split('.json')[0]}.jsonl" for path in arguments.files]
    if len(set(outs)) < len(outs):
        raise SettingsError("two files of the same name would be written to one", field="files")
    for path, out in zip(arguments.files, outs, strict=True):
        if not path.is_file():
            raise no_such_file(str(path), field="files")
        if out.exists() and out.samefile(path):
            raise SettingsError(f"{path} would be overwritten", field="out", hint="choose another --out")
        limits = Limits(arguments.longest_question, arguments.longest_answer)
        prepared = prepare(path, limits, arguments.first, honest=arguments.honest, without=without)
        if not prepared.rows:
            raise DataError(f"{path} has nothing that a small model can use", field="files")
        write_rows(out, ({"messages": messages} for messages in prepared.rows))
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in prepared.left_out.most_common())
        print(f"{out}: {len(prepared.rows):,} conversations; left out: {reasons or 'none'}")
        if prepared.unused:
            print(f"{out}: fields of the rows that are not used: {', '.join(sorted(prepared.unused))}")
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    from topkapi.training.data.exercises.questions import open_questions
    from topkapi.training.data.preparation import write_lines

    _check_draw(arguments, arguments.count)
    questions = list(islice(open_questions(arguments.seed), arguments.count))
    write_lines(arguments.out, questions)
    fewer = "" if len(questions) == arguments.count else f", not {arguments.count:,}: there are no more"
    print(f"{arguments.out}: {len(questions):,} questions{fewer}")
    return 0


def _answer(arguments: argparse.Namespace) -> int:
    from topkapi.model.hub.resolve import local_path
    from topkapi.model.storage.location import check_location

    for name in ("limit", "longest_answer", "max_tokens", "slots", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least 1, not {value}", field=name)
    checkpoint = local_path(arguments.checkpoint)
    check_location(checkpoint)
    if missing := next((path for path in arguments.files if not expanded(path).is_file()), None):
        raise no_such_file(str(missing), field="files")
    import torch

    from topkapi.model.serving import prepare, reading
    from topkapi.model.storage.checkpoint import load_checkpoint
    from topkapi.training.data.preparation import Limits
    from topkapi.training.instructions.distillation import answer_questions, read_earlier, read_questions

    questions = read_questions(arguments.files)[: arguments.limit]
    for path in arguments.files:
        if arguments.out.exists() and arguments.out.samefile(path):
            raise SettingsError(f"{path} holds the questions", field="out", hint="choose another --out")
    earlier = read_earlier(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # As it would be served: by the native core where there is one, and in nothing that is slower than float32 here.
    teacher = load_checkpoint(checkpoint, **reading(arguments.dtype))
    prepare(teacher.model, arguments.dtype)
    progress = answer_questions(
        teacher,
        questions,
        arguments.out,
        earlier=earlier,
        system=arguments.system,
        limits=Limits(answer=arguments.longest_answer),
        max_tokens=arguments.max_tokens,
        slots=arguments.slots,
    )
    for done in progress:
        print(done.line(arguments.out), flush=True)
    return 0


def _check_draw(arguments: argparse.Namespace, count: int) -> None:
    """Refuse what cannot be drawn, or would be written over something."""
    if count < 1:
        raise SettingsError(f"--count must be at least 1, not {count}", field="count")
    if arguments.seed < 0:
        raise SettingsError(f"--seed must not be below 0, not {arguments.seed}", field="seed")
    if arguments.out.exists():
        raise SettingsError(f"{arguments.out} is there already", field="out", hint="choose another --out")
