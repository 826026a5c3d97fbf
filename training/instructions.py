"""`topkapi instructions`: makes conversations to tune on and to judge by."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.errors import SettingsError


def add_instructions(subparsers: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = subparsers.add_parser("instructions", help="make instruction data")
    actions = command.add_subparsers(dest="action", required=True)
    make = actions.add_parser(
        "make",
        help="make exercises whose answers a rule can check",
        description="Write exercises (sums, spelling, grammar, lists, small talk, what was told earlier, …) as "
        "conversations that finetune reads, each with its kind and the checks of its answer. What --held-out writes "
        "shares no question with what it does not, whatever the seeds.",
        allow_abbrev=False,
    )
    make.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .jsonl file to write")
    make.add_argument("--count", type=int, metavar="N", help="rows [40000; held out: 1000]")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="decides which rows [0]")
    make.add_argument("--held-out", action="store_true", help="rows to judge by, for evaluate --exercises")
    make.add_argument("--kinds", nargs="+", metavar="KIND", help="only these kinds [all]")
    make.set_defaults(handler=_make)


def _make(arguments: argparse.Namespace) -> int:
    from training.data.exercises.rows import MAKERS, make_rows

    wanted = (1000 if arguments.held_out else 40_000) if arguments.count is None else arguments.count
    if wanted < 1:
        raise SettingsError(f"--count must be at least 1, not {wanted}", field="count")
    if arguments.seed < 0:
        raise SettingsError(f"--seed must not be below 0, not {arguments.seed}", field="seed")
    kinds = list(MAKERS) if arguments.kinds is None else list(dict.fromkeys(arguments.kinds))
    if unknown := [kind for kind in kinds if kind not in MAKERS]:
        raise SettingsError(f"there is no kind {unknown[0]!r}", field="kinds", hint=f"kinds: {', '.join(MAKERS)}")
    rows = list(make_rows(arguments.seed, wanted, held_out=arguments.held_out, kinds=kinds))
    write_rows(arguments.out, rows)
    of = Counter(row["kind"] for row in rows)
    print(
        f"{arguments.out}: {len(rows):,} exercises of {len(of)} kinds, "
        f"{min(of.values()):,} to {max(of.values()):,} of each"
    )
    return 0


def write_rows(path: Path, rows: Iterable[object], mode: str = "w") -> None:
    """Rows as JSON lines. Raises `SettingsError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written: {error.strerror or error}", field="out", hint="choose another --out"
        ) from None
