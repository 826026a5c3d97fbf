"""`topkapi import`: what another trainer wrote, as a checkpoint of ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import CheckpointError
from topkapi.model.files import sha256
from topkapi.model.hub.files import PICKLED, PICKLED_INDEX
from topkapi.model.importing.gpt2_layouts import is_book, is_nanogpt, read_book, read_nanogpt
from topkapi.model.importing.llama2c import is_llama2c, read_llama2c
from topkapi.model.importing.llama_layouts import is_litgpt, is_meta, read_litgpt, read_meta
from topkapi.model.importing.nanochat import is_nanochat, read_nanochat
from topkapi.model.importing.options import Network, Options
from topkapi.model.importing.source import Source, several
from topkapi.model.importing.vocabulary import vocabulary
from topkapi.model.reading import member, read_json
from topkapi.model.storage.building import build
from topkapi.model.storage.checkpoint import save_checkpoint
from topkapi.model.storage.location import check_directory_target
from topkapi.model.storage.tensors import from_hugging_face
from topkapi.model.user_files import expanded

KINDS = (
    "the book's state dict (.pth), nanoGPT's or llama2.c's ckpt.pt, litgpt's lit_model.pth, llama2.c's .bin, "
    "nanochat's model_N.pt, or a Hugging Face directory with pytorch_model.bin"
)


@dataclass(frozen=True)
class Imported:
    """What was made of what: the kind of source, its vocabulary and what was taken for granted, in words."""

    kind: str
    vocabulary: str
    assumed: tuple[str, ...]
    parameters: int
    chat: bool


def import_checkpoint(source: Path, out: Path, options: Options) -> Imported:
    """Make a checkpoint directory at `out` of the file or directory `source`, whole or not at all.

    Raises `CheckpointError` for what is not recognised, or not computed as where it was trained, by its name.
    """
    check_directory_target(out)
    files = _files(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{out.parent} cannot be made: {error.strerror}", field="out", hint="choose another place"
        ) from None
    with _network(source, files, out.parent, options) as network:
        config = ModelConfig.from_hugging_face(network.config)
        tokenizer, origin = vocabulary(network, options)
        chat = _template(options.chat_template)
        if chat is None and network.folder is not None and options.tokenizer is None:
            chat = ChatTemplate.from_directory(network.folder)
        with _shapes_as_expected(source):
            model = build(config, network.tensors(), source, None, torch.device("cpu"))
        model.config = model.config.with_end_tokens(_ends(model.config, tokenizer.end_token_id))
        save_checkpoint(
            out,
            model=model,
            tokenizer=tokenizer,
            chat=chat,
            generation=network.generation,
            details={
                "imported": {
                    "kind": network.kind,
                    "vocabulary": origin,
                    "assumed": list(network.assumed),
                    "sha256": {file.name: sha256(file) for file in files},
                }
            },
        )
        return Imported(network.kind, origin, network.assumed, model.config.parameter_count(), chat is not None)


@contextmanager
def _shapes_as_expected(path: Path) -> Iterator[None]:
    """What tensors of other dimensions than a layout has make of reading it, as a `CheckpointError`."""
    try:
        yield
    except (IndexError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} begins like a known layout, but its tensors are not those of one ({type(error).__name__}: "
            f"{str(error)[:200]!r})",
            hint=f"what is imported: {KINDS}",
        ) from error


def _ends(config: ModelConfig, end: int | None) -> tuple[int, ...]:
    return config.end_token_ids or (() if end is None else (end,))


def _files(source: Path) -> list[Path]:
    """The files that hold the weights. Raises `CheckpointError` where there are none."""
    if not source.exists():
        raise CheckpointError(f"there is nothing at {source}", field="source", hint=f"give {KINDS}")
    if source.is_file():
        return [source]
    for name in ("lit_model.pth", "ckpt.pt", PICKLED, "consolidated.00.pth"):
        if (source / name).is_file():
            if name.startswith("consolidated") and (source / "consolidated.01.pth").exists():
                raise CheckpointError(
                    f"{source} holds a network cut in several parts, which are not put together",
                    hint="import the model's Hugging Face directory",
                )
            return [source / name]
    if steps := sorted(source.glob("model_[0-9]*.pt")):
        return steps[-1:]
    if (source / PICKLED_INDEX).is_file():
        weight_map = read_json(source / PICKLED_INDEX).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        if parts := sorted({member(source, name, PICKLED_INDEX) for name in names}):
            return parts
    if (source / "model.safetensors").is_file() or (source / "model.safetensors.index.json").is_file():
        raise CheckpointError(f"{source} needs no import", hint=f"serve it as it is: topkapi serve {source}")
    raise CheckpointError(f"{source} holds nothing to import", field="source", hint=f"give {KINDS}")


@contextmanager
def _network(source: Path, files: list[Path], scratch: Path, options: Options) -> Iterator[Network]:
    if files[0].suffix in (".gguf", ".safetensors"):
        raise CheckpointError(f"{files[0]} needs no import", hint="topkapi serve takes .gguf files and directories")
    if len(files) == 1 and is_llama2c(files[0]):
        yield read_llama2c(files[0])
        return
    needed = sum(file.stat().st_size for file in files)
    if needed * 2 > (free := shutil.disk_usage(scratch).free):
        raise CheckpointError(
            f"importing {source} takes {needed * 2 / 1e9:,.1f} GB of disk, and {scratch} has {free / 1e9:,.1f} GB free",
            hint="free some, or choose another place for OUT",
        )
    with several(files, scratch) as opened:
        with _shapes_as_expected(opened.path):
            recognised = _recognised(opened, options)
        yield recognised


def _recognised(source: Source, options: Options) -> Network:
    if is_book(source):
        return read_book(source, options)
    if is_meta(source):
        return read_meta(source, options)
    if is_litgpt(source):
        return read_litgpt(source, options)
    if is_nanochat(source):
        return read_nanochat(source)
    if is_nanogpt(source):
        return read_nanogpt(source, options)
    place = source.path.parent
    config = read_json(place / "config.json")
    if config:
        return _hugging_face(source, config, place)
    some = ", ".join(list(source.shapes)[:4])
    raise CheckpointError(
        f"{source.path} holds a network in a layout that is not known (its tensors: {some}, …)",
        hint=f"what is imported: {KINDS}",
    )


def _hugging_face(source: Source, raw: dict[str, Any], place: Path) -> Network:
    """`pytorch_model.bin` beside `config.json`, as transformers wrote them before safetensors."""
    config = ModelConfig.from_hugging_face(raw)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from from_hugging_face(config, ((name, source.tensor(name)) for name in source.shapes))

    return Network(
        "pytorch_model.bin of a Hugging Face directory", raw, tensors, folder=place,
        generation=read_json(place / "generation_config.json"),
    )  # fmt: skip


def _template(name: str | None) -> ChatTemplate | None:
    if name is None:
        return None
    path = expanded(name)
    if path.is_file():
        try:
            return ChatTemplate(path.read_text("utf-8"), path.stem)
        except UnicodeDecodeError:
            raise CheckpointError(f"the chat template {name} is not UTF-8", field="chat_template") from None
    return ChatTemplate.built_in(name)
