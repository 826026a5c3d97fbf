"""`topkapi import`: the checkpoints of other trainers as checkpoints of ours."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError
from topkapi.model.user_files import expanded

DESCRIPTION = (
    "Make a checkpoint directory of what another trainer wrote: the state dict of the book's GPTModel (.pth), "
    "nanoGPT's or llama2.c's ckpt.pt, litgpt's lit_model.pth, llama2.c's .bin, or a Hugging Face directory (or "
    "owner/name) with pytorch_model.bin. Files of torch.save are read without running anything of them."
)


def add_import(commands: Any) -> None:
    """Add the command; its `handler` takes the parsed namespace and returns an exit code."""
    command = commands.add_parser(
        "import", help="make a checkpoint of what another trainer wrote", description=DESCRIPTION
    )
    command.add_argument("source", help="file or directory, or owner/name on the Hugging Face hub")
    command.add_argument("out", type=Path, help="directory for the checkpoint")
    command.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="vocabulary: gpt2, a directory with tokenizer.json, or llama2.c's tokenizer.bin",
    )
    command.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="TEXT",
        help="the text it was trained on, whose characters it knows",
    )
    command.add_argument("--characters", metavar="TEXT", help="the characters it knows, in the order of their ids")
    command.add_argument("--heads", type=int, metavar="N", help="heads of attention, where the file does not say")
    command.add_argument(
        "--gelu", choices=("exact", "tanh"), help="how GELU is computed [exact for nanoGPT, tanh for the book]"
    )
    command.add_argument("--chat-template", metavar="TEXT", help="template to store with it: chatml, alpaca or a file")
    command.set_defaults(handler=_import)


def _import(arguments: argparse.Namespace) -> int:
    from topkapi.model.conversation.template_files import BUILT_IN_TEMPLATES
    from topkapi.model.hub.resolve import local_path
    from topkapi.model.importing.options import Options
    from topkapi.model.storage.location import check_directory_target

    out: Path = arguments.out
    check_directory_target(out)
    template = arguments.chat_template
    if template is not None and template not in BUILT_IN_TEMPLATES and not expanded(template).is_file():
        known = ", ".join(BUILT_IN_TEMPLATES)
        raise SettingsError(
            f"there is no chat template {template}", field="chat_template", hint=f"give a Jinja file or one of: {known}"
        )
    source = local_path(arguments.source, pickles=True)
    options = Options(
        arguments.tokenizer, tuple(arguments.data), arguments.characters, arguments.heads, arguments.gelu, template
    )
    from topkapi.model.importing.importing import import_checkpoint

    made = import_checkpoint(source, out, options)
    print(f"{made.kind}: {made.parameters:,} parameters; vocabulary: {made.vocabulary}")
    for assumed in made.assumed:
        print(f"taken for granted: {assumed}")
    place = shlex.quote(str(out))
    print(f"serve it with: topkapi serve {place}; go on training it with: topkapi finetune --checkpoint {place}")
    return 0
