"""The training commands of `topkapi`: `tokenizer train`, `pretrain`, `finetune`, `merge`, `evaluate`.

torch is imported when one runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkapi.model.errors import SettingsError, TopkapiError
from topkapi.model.flags import flag_of
from topkapi.training.evaluation.command import add_evaluate
from topkapi.training.export import GGUF_TYPES, add_formats
from topkapi.training.instructions.command import add_instructions
from topkapi.training.planning.estimating import FIELDS, add_estimate_flags, is_estimate, print_estimate
from topkapi.training.planning.finding_lr import add_find_lr
from topkapi.training.planning.sweeping import add_sweep
from topkapi.training.recipes.arguments import (
    EPILOG,
    RUNS,
    add_recipe_flags,
    read_arguments,
    read_yaml,
    resolve_recipe,
    run_of,
)
from topkapi.training.recipes.recipe import TrainingRecipe
from topkapi.training.run.pick import add_pick
from topkapi.training.run.runs import add_runs
from topkapi.training.start import at_hand, prepared, train

if TYPE_CHECKING:
    from topkapi.training.run.console import Console
    from topkapi.training.run.directory import RunDirectory
    from topkapi.training.trainer import Training


def _add_tokenizer(subparsers: Any) -> None:
    tokenizer = subparsers.add_parser("tokenizer", help="train a tokenizer")
    actions = tokenizer.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="train a byte-level BPE vocabulary on text files")
    train.add_argument("files", nargs="+", metavar="FILES", help="text files, folders or globs")
    train.add_argument("--vocab-size", type=int, default=8192, help="entries, control tokens included [8192]")
    train.add_argument("--out", required=True, type=Path, help="directory for tokenizer.json")
    train.add_argument("--text-field", default="text", help="field of JSON lines or Parquet rows [text]")
    train.add_argument("--megabytes", type=int, default=256, help="text to train on, at most [256]")
    train.set_defaults(handler=_train_tokenizer)


def _add_run(subparsers: Any, name: str) -> None:
    kind, summary = RUNS[name]
    command = subparsers.add_parser(name, help=summary, description=f"{summary.capitalize()}.", epilog=EPILOG)
    command.add_argument("recipe", nargs="?", help="recipe file (.yaml) or the name of an included one")
    command.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="continue the run in this directory (default: --out)"
    )
    add_recipe_flags(command, kind)
    command.set_defaults(handler=_train, training_kind=kind, training_command=name)


def _add_merge(subparsers: Any) -> None:
    merge = subparsers.add_parser(
        "merge",
        help="make a checkpoint of its own from an adapter and its base",
        description="Merge an adapter (Topkapi's, or LoRA or DoRA of PEFT) into the checkpoint it was trained on.",
    )
    merge.add_argument("checkpoint", help="the base: checkpoint directory, .gguf file or owner/name on the hub")
    merge.add_argument("adapter", help="directory that holds adapter_config.json, or owner/name on the hub")
    merge.add_argument("--out", required=True, type=Path, help="directory for the merged checkpoint")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="how matrices are stored (default: as the base)"
    )
    merge.set_defaults(handler=_merge)


def _add_plan(subparsers: Any) -> None:
    command = subparsers.add_parser(
        "plan",
        help="say what a run will take, and what is wrong with its data",
        description="Say what a run of pretrain or finetune will take in memory, time and money, from a few real "
        "steps, and what is wrong with its data. Takes the recipe and the flags that the run will be given.",
        epilog=EPILOG,
    )
    command.add_argument("recipe", nargs="?", help="recipe file (.yaml) or the name of an included one")
    command.add_argument("--price-per-hour", type=float, metavar="X", help="what an hour of this machine costs")
    command.add_argument("--watts", type=float, metavar="W", help="what the machine draws, for the kilowatt hours")
    command.add_argument("--memory", type=float, metavar="GB", help="memory that the run may take (default: all)")
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command.add_argument(
        "--run", choices=tuple(RUNS), help="the command that the plan is for (default: told by the settings)"
    )
    add_estimate_flags(command)
    add_recipe_flags(command, *(kind for kind, _ in RUNS.values()))
    command.set_defaults(handler=_plan, resume=None)


def _plan(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("price_per_hour", "memory", "watts"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise SettingsError(f"--{name.replace('_', '-')} must be greater than 0, not {value:g}", field=name)
    fields = {} if arguments.recipe is None else read_yaml(resolve_recipe(arguments.recipe))
    if is_estimate(arguments):
        _refuse_beside_estimate(arguments, fields)
        print_estimate(arguments)
        return 0
    run, why = run_of(arguments, fields)
    kind = RUNS[run][0]
    arguments.training_kind, arguments.training_command = kind, "plan"
    recipe, _, _ = read_arguments(arguments)
    recipe = at_hand(recipe)
    if recipe.parallel is not None:
        raise SettingsError(
            "a plan is made for one process, so --parallel does not apply",
            field="parallel",
            hint="leave it out, or add --parallel none",
        )
    from topkapi.training.run.preflight import check_inputs

    def prepare(recipe: TrainingRecipe, run: RunDirectory, console: Console) -> Training:
        return prepared(recipe, False, run, console)

    try:
        check_inputs(recipe)
        from topkapi.training.planning.measuring import print_plan

        price, memory, watts = arguments.price_per_hour, arguments.memory, arguments.watts
        fits = print_plan(recipe, prepare, price, memory, watts, as_json=arguments.json)
    except TopkapiError as error:
        if why is not None:
            error.hint = f"{error.hint}; {why}" if error.hint else why
        raise
    return 0 if fits else 1


def _refuse_beside_estimate(arguments: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Raise `SettingsError` for what a plan without data would not look at."""
    names = {name for kind, _ in RUNS.values() for name in kind.model_fields}
    given = [name for name in vars(arguments) if name in names and name != "recipe"]
    given += [name for name in ("memory", "run", "watts") if getattr(arguments, name) is not None]
    wrong = min([*given, *fields], default=None)
    if wrong is not None:
        own = next(flag_of(name) for name in FIELDS if getattr(arguments, name) is not None)
        raise SettingsError(
            f"{own} plans a run without data, so {flag_of(wrong)} does not apply", field=wrong, hint="leave one out"
        )


def _add_export(subparsers: Any) -> None:
    export = subparsers.add_parser(
        "export", help="write a checkpoint as GGUF, for ollama, in another precision, averaged, or its card"
    )
    formats = export.add_subparsers(dest="format", required=True)
    command = formats.add_parser(
        "gguf",
        help="a GGUF file, which llama.cpp loads",
        description="Write a checkpoint as a GGUF file, its tokenizer and chat template inside, which llama.cpp loads.",
    )
    command.add_argument(
        "checkpoint", help="checkpoint directory, adapter, .gguf file, or owner/name on the Hugging Face hub"
    )
    command.add_argument("out", type=Path, help="the file to write, ending in .gguf")
    command.add_argument(
        "--type",
        choices=GGUF_TYPES,
        default="f16",
        help="how matrices are stored [f16]; q4_k_m takes 5 bits a weight, in llama.cpp's mixture",
    )
    command.set_defaults(handler=_export)
    add_formats(formats)


def _export(arguments: argparse.Namespace) -> int:
    from topkapi.model.hub.resolve import local_path
    from topkapi.model.storage.location import check_gguf_target, check_location

    check_gguf_target(arguments.out)
    checkpoint = local_path(arguments.checkpoint)
    check_location(checkpoint)
    import torch

    from topkapi.model.storage.checkpoint import load_checkpoint
    from topkapi.model.storage.gguf_export import export_gguf, summary

    stored = export_gguf(load_checkpoint(checkpoint, dtype=torch.float32), arguments.out, arguments.type)
    print(summary(stored, arguments.type))
    print(
        f"{arguments.out}: {arguments.out.stat().st_size / 1e6:,.1f} MB; serve it with: topkapi serve {arguments.out}"
    )
    return 0


def _train_tokenizer(arguments: argparse.Namespace) -> int:
    from topkapi.training.data.vocabulary import train_tokenizer

    train_tokenizer(arguments.files, arguments.vocab_size, arguments.out, arguments.text_field, arguments.megabytes)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from topkapi.model.hub.resolve import local_path
    from topkapi.model.storage.location import check_location

    if arguments.out.exists():
        raise SettingsError(f"{arguments.out} is there already", field="out", hint="choose another --out")
    base, adapter = local_path(arguments.checkpoint), local_path(arguments.adapter)
    check_location(base)
    check_location(adapter, base)
    from topkapi.training.optimisation.lora import merge

    merge(base, adapter, arguments.out, arguments.dtype)
    print(f"serve it with: topkapi serve {shlex.quote(str(arguments.out))}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    train(*read_arguments(arguments))
    return 0


COMMANDS: dict[str, Callable[[Any], None]] = {
    "tokenizer": _add_tokenizer,
    **{name: partial(_add_run, name=name) for name in RUNS},
    "plan": _add_plan,
    "find-lr": add_find_lr,
    "sweep": add_sweep,
    "export": _add_export,
    "evaluate": add_evaluate,
    "instructions": add_instructions,
    "runs": add_runs,
    "pick": add_pick,
    "merge": _add_merge,
}
"""What adds each training command; it sets `handler`, which takes the parsed namespace and returns an exit code."""
