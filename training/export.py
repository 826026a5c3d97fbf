"""`topkapi export safetensors`, `average`, `ollama` and `card`: a checkpoint in another precision, the average of two,
what ollama loads, and a card for the hub."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkapi.model.errors import CheckpointError, SettingsError
from topkapi.model.hub.names import meant
from topkapi.model.storage.location import check_directory_target, check_location

if TYPE_CHECKING:
    from topkapi.model.storage.checkpoint import Checkpoint

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
"""How matrices may be stored in a GGUF file."""

_SOURCE = "directory, adapter, .gguf file, or owner/name on the Hugging Face hub"


def add_formats(formats: Any) -> None:
    """Add the commands; each sets `handler`, which takes the parsed namespace and returns an exit code."""
    command = formats.add_parser(
        "safetensors",
        help="a Hugging Face directory in another precision, adapters merged",
        description="Write a checkpoint as a Hugging Face directory, its matrices in another precision: an adapter is "
        "merged into its base, a GGUF file's weights become plain ones. transformers, vLLM and others open it.",
    )
    command.add_argument("checkpoint", help=_SOURCE)
    command.add_argument("out", type=Path, help="the directory to write")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of all tensors [bfloat16]"
    )
    command.set_defaults(handler=_safetensors)

    command = formats.add_parser(
        "average",
        help="the average of a checkpoint and of what it was tuned to",
        description="Write the average of the weights of two checkpoints with the same configuration and vocabulary, "
        "such as one before and after tuning: it often keeps what the second has forgotten.",
    )
    command.add_argument("checkpoint", help=_SOURCE)
    command.add_argument("other", help="the other one, whose chat template and decoding defaults are kept")
    command.add_argument("out", type=Path, help="the directory to write")
    command.add_argument("--part", type=float, default=0.5, metavar="X", help="the other one's part, 0 to 1 [0.5]")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of all tensors [bfloat16]"
    )
    command.set_defaults(handler=_average)

    command = formats.add_parser(
        "ollama",
        help="a GGUF file with the Modelfile that ollama wants beside it",
        description="Write a directory with a GGUF file and a Modelfile: the chat template in ollama's form, the "
        "decoding defaults and what ends an answer. A template that has no such form is refused.",
    )
    command.add_argument("checkpoint", help=_SOURCE)
    command.add_argument("out", type=Path, help="the directory to write")
    command.add_argument("--type", choices=GGUF_TYPES, default="q4_k_m", help="how matrices are stored [q4_k_m]")
    command.set_defaults(handler=_ollama)

    command = formats.add_parser(
        "card",
        help="a README.md for the hub, with evaluations in the hub's form",
        description="Write the README.md of a checkpoint as the Hugging Face hub reads it: how it was made, and its "
        "figures as a model-index.",
    )
    command.add_argument("checkpoint", help="checkpoint directory, or owner/name on the Hugging Face hub")
    command.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help="evaluation.json of topkapi evaluate --out",
    )
    command.add_argument("--name", help="what the model is called [the directory's name]")
    command.add_argument("--license", metavar="ID", help="its licence, as the hub has it: apache-2.0, mit, …")
    command.add_argument("--out", type=Path, metavar="FILE", help="the file to write [README.md in the checkpoint]")
    command.set_defaults(handler=_card)


def _card(arguments: argparse.Namespace) -> int:
    if arguments.out is None and meant(arguments.checkpoint) is not None:
        raise SettingsError("the card of a model of the hub needs a file to go to", field="out", hint="give --out FILE")
    checkpoint = _at_hand(arguments.checkpoint)
    if not checkpoint.is_dir():
        raise SettingsError(f"{checkpoint} is not a directory", field="checkpoint", hint="name a directory")
    out: Path = arguments.out or checkpoint / "README.md"
    if out.exists():
        raise SettingsError(f"{out} is there already", field="out", hint="choose another file with --out")
    from topkapi.training.run.card import card

    name = arguments.name or _plain_name(arguments.checkpoint, checkpoint)
    text = card(checkpoint, name, arguments.evaluation, arguments.license)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{out} cannot be written: {error.strerror}", field="out") from None
    print(f"written: {out}")
    return 0


def _at_hand(given: str) -> Path:
    """Where a checkpoint lies, downloaded if it has to be. Raises `TopkapiError` where it can't be read."""
    from topkapi.model.hub.resolve import local_path

    path = local_path(given)
    check_location(path)
    return path


def _plain_name(given: str, path: Path) -> str:
    """What a checkpoint is called, which on the hub is not what its directory is."""
    name = meant(given)
    return path.resolve().name if name is None else name.repository.partition("/")[2]


def _safetensors(arguments: argparse.Namespace) -> int:
    _check_free(arguments.out)
    checkpoint = _at_hand(arguments.checkpoint)
    import torch

    from topkapi.model.storage.checkpoint import load_checkpoint

    # Merged in float32 and rounded once.
    loaded = load_checkpoint(checkpoint, dtype=torch.float32)
    _save(loaded, arguments, {"exported_from": _plain_name(arguments.checkpoint, checkpoint)})
    return 0


def _average(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.part <= 1:
        raise SettingsError(f"--part must be from 0 to 1, not {arguments.part:g}", field="part")
    _check_free(arguments.out)
    checkpoint, other = _at_hand(arguments.checkpoint), _at_hand(arguments.other)
    import torch

    from topkapi.model.storage.checkpoint import load_checkpoint, weights_digest
    from topkapi.training.data.shards import tokenizer_digest

    first, second = (load_checkpoint(path, dtype=torch.float32) for path in (checkpoint, other))
    if first.config != second.config:
        raise CheckpointError(
            f"{other} has another configuration than {checkpoint}", hint="average a checkpoint tuned from it"
        )
    if tokenizer_digest(first.tokenizer) != tokenizer_digest(second.tokenizer):
        raise CheckpointError(
            f"{other} has another tokenizer than {checkpoint}", hint="average a checkpoint tuned from it"
        )
    before = dict(first.model.named_parameters())
    with torch.no_grad():
        for name, tensor in second.model.named_parameters():
            tensor.copy_(before[name] * (1 - arguments.part) + tensor * arguments.part)
    averaged = {
        "part": round(1 - arguments.part, 9),
        "name": _plain_name(arguments.checkpoint, checkpoint),
        "sha256": weights_digest(checkpoint),
    }
    # Losses were those of the other one alone.
    of_one = ("train_loss", "validation_loss")
    second.details = {name: value for name, value in second.details.items() if name not in of_one}
    _save(second, arguments, {"averaged_with": averaged})
    return 0


def _save(loaded: Checkpoint, arguments: argparse.Namespace, more: dict[str, Any]) -> None:
    """Write a checkpoint in `--dtype`, its details with `more`. Raises `CheckpointError` for what that can't hold."""
    import torch

    from topkapi.model.storage.checkpoint import save_checkpoint

    dtype: torch.dtype = getattr(torch, arguments.dtype)
    limit = torch.finfo(dtype).max
    for name, tensor in loaded.model.named_parameters():
        if tensor.abs().max() > limit:
            raise CheckpointError(
                f"the tensor {name} holds numbers too large for {arguments.dtype}", hint="use --dtype bfloat16"
            )
    details = {name: value for name, value in loaded.details.items() if name not in ("sha256", "base_held_in")}
    save_checkpoint(
        arguments.out,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        chat=loaded.chat,
        generation=loaded.generation,
        details={**details, **more},
        dtype=dtype,
    )
    print(f"{arguments.out}: {_megabytes(arguments.out)}; serve it with: topkapi serve {_quoted(arguments.out)}")


def _ollama(arguments: argparse.Namespace) -> int:
    _check_free(arguments.out)
    checkpoint = _at_hand(arguments.checkpoint)
    import torch

    from topkapi.model.files import write_directory
    from topkapi.model.storage.checkpoint import load_checkpoint
    from topkapi.model.storage.gguf_export import export_gguf, summary
    from topkapi.model.storage.modelfile import modelfile

    loaded = load_checkpoint(checkpoint, dtype=torch.float32)
    file = f"{arguments.out.name}.gguf"
    # What could be refused comes before what takes long.
    said = modelfile(loaded, file)
    with write_directory(arguments.out) as partial:
        stored = export_gguf(loaded, partial / file, arguments.type)
        (partial / "Modelfile").write_text(said, encoding="utf-8")
    where = _quoted(arguments.out)
    name = shlex.quote(arguments.out.name.lower())
    print(summary(stored, arguments.type))
    print(f"{arguments.out}: {_megabytes(arguments.out)}; in ollama: (cd {where} && ollama create {name} -f Modelfile)")
    return 0


def _check_free(out: Path) -> None:
    """Raise `SettingsError` for a directory that can't be made."""
    check_directory_target(out)
    if not out.parent.is_dir():
        raise SettingsError(f"there is no directory {out.parent}", field="out", hint="make it, or choose another")


def _megabytes(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.iterdir()) / 1e6:,.1f} MB"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
