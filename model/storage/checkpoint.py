"""Checkpoints: Hugging Face directories, written whole, verified when read; and GGUF files, read only.

Beside the standard files lies `topkapi.json`: the format version, how the checkpoint was made, and the SHA-256 of
every other file. Weights are safetensors; nothing is ever unpickled. An adapter's directory is a checkpoint, too: it
names its base, and is merged into that while it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.decoding.parameters import check_generation_config
from topkapi.model.errors import CheckpointError
from topkapi.model.files import sha256, write_directory
from topkapi.model.hub.cache import cached
from topkapi.model.hub.names import meant
from topkapi.model.nf4 import NF4
from topkapi.model.quantize import int8_product, quantize
from topkapi.model.reading import check_memory, check_place, confined, is_confined, read_json
from topkapi.model.storage.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_settings,
    adapter_tensors,
    read_adapter,
    read_settings,
)
from topkapi.model.storage.building import build
from topkapi.model.storage.generation_config import check_defaults
from topkapi.model.storage.location import check_location, checkpoint_name, is_adapter, unreadable
from topkapi.model.storage.tensors import from_hugging_face, read_safetensors, to_hugging_face
from topkapi.model.storage.verification import FORMAT_VERSION, check_sizes, read_details, verify_digests
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder

_LONGEST_MESSAGE = 900
"""Characters of an error that are told, beside the path."""


@dataclass
class Checkpoint:
    """A loaded checkpoint. `details` is `topkapi.json` (empty for foreign ones), `generation` the decoding defaults."""

    name: str
    path: Path
    config: ModelConfig
    model: Decoder
    tokenizer: Tokenizer
    chat: ChatTemplate | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def load_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
    base: str | Path | None = None,
    within: str | Path | None = None,
    blocks: bool = False,
) -> Checkpoint:
    """Load a checkpoint directory, an adapter's or a GGUF file for inference.

    Matrices are held in `dtype` (None: as each is stored, see `model.storage.building`; `torch.int8`: see
    `model.quantize`), vectors in float32. With `blocks`, a GGUF file's matrices stay in the blocks they are stored in,
    with which the native core alone computes. `verify` compares every file with the digests in `topkapi.json`. An
    adapter is merged into `base`, by default the checkpoint that it names. A load that somebody else asked for is
    confined to the directory `within`: nothing is read that lies elsewhere, links followed, and its tokenizer is tried
    in a process of its own first. Raises `CheckpointError` naming the file for what is missing, unreadable, truncated,
    altered, ambiguous or not supported, whatever the files hold.
    """
    with telling(path), confined(None if within is None else Path(within)):
        return _load(Path(path), dtype, torch.device(device), verify, None if base is None else Path(base), blocks)


@contextmanager
def telling(path: str | Path) -> Iterator[None]:
    """Within the block, what goes wrong while `path` is read is raised as a `CheckpointError` that names it."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
    except CheckpointError as error:
        if str(path) not in error.message:
            error.message = f"{path}: {error.message}"
        # Libraries quote what they could not read, however long it is.
        longest = len(str(path)) + _LONGEST_MESSAGE
        if len(error.message) > longest:
            error.message = f"{error.message[:longest]} …"
        error.args = (error.message,)
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what a damaged file makes libraries raise; a panic of theirs is no Exception
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(
            f"{path} cannot be loaded ({problem})", hint="one of its files is damaged: copy or download it again"
        ) from error


@dataclass
class _Stored:
    """A checkpoint as it is stored; `tensors`, by names of `Decoder`'s parameters, are read one by one."""

    raw_config: dict[str, Any]
    tensors: Iterator[tuple[str, Tensor]]
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    generation: dict[str, Any]
    details: dict[str, Any]


def _load(
    path: Path, dtype: torch.dtype | None, device: torch.device, verify: bool, base: Path | None, blocks: bool
) -> Checkpoint:
    if dtype == torch.int8:
        int8_product(device.type)  # where this machine has none, that is said before anything is read
    stored = _read(path, verify, base, blocks)
    config, tokenizer = ModelConfig.from_hugging_face(stored.raw_config), stored.tokenizer
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} entries but the network only {config.vocab_size}",
            hint="the two files belong to different models",
        )
    at = path / "generation_config.json" if path.is_dir() else path
    check_defaults(stored.generation, tokenizer, path)
    check_generation_config(stored.generation, config.vocab_size, str(at))
    config = config.with_end_tokens(end_tokens(config, tokenizer, stored.chat, stored.generation))
    model = build(config, stored.tensors, path, None if dtype == torch.int8 else dtype, device)
    if dtype == torch.int8:
        quantize(model)
    return Checkpoint(
        checkpoint_name(path), path, model.config, model, tokenizer, stored.chat, stored.generation, stored.details
    )


def _read(path: Path, verify: bool, base: Path | None = None, blocks: bool = False) -> _Stored:
    check_location(path, base)
    if is_adapter(path):
        return _read_adapted(path, verify, base)
    if path.is_file():
        from topkapi.model.storage.gguf import read_gguf

        check_memory(path, path.stat().st_size)
        raw_config, tensors, tokenizer, template, generation = read_gguf(path, blocks=blocks)
        details: dict[str, Any] = {}
        chat = ChatTemplate.of(template)
        config = ModelConfig.from_hugging_face(raw_config)
    else:
        raw_config = read_json(path / "config.json")
        # The family and the sizes are checked before anything slow is read.
        config = ModelConfig.from_hugging_face(raw_config)
        check_sizes(path, config)
        details = read_details(path)
        if verify:
            verify_digests(path, details)
        generation = read_json(path / "generation_config.json")
        tokenizer = Tokenizer.from_directory(path)
        chat = ChatTemplate.from_directory(path)
        tensors = read_safetensors(path)
    return _Stored(raw_config, from_hugging_face(config, tensors), tokenizer, chat, generation, details)


def _read_adapted(path: Path, verify: bool, base: Path | None) -> _Stored:
    check_memory(path, sum(file.stat().st_size for file in path.glob("*.safetensors")))
    details = read_details(path)
    if verify:
        verify_digests(path, details)
    named = read_settings(path).get("base_model_name_or_path")
    if base is None:
        base = _base_named(named) if isinstance(named, str) else Path()
        if named and is_confined():
            # Whether it is there is for nobody to learn who may not load it.
            base = check_place(path / base)
        if not named or not base.exists():
            raise CheckpointError(
                f"the adapter {path} was trained on {named or 'a base that it does not name'}, which is not there",
                hint=f"{_fetch_hint(named)}give its base: topkapi merge BASE {path} --out DIRECTORY makes a whole "
                "checkpoint of the two",
            )
    stored = _read(base, verify)
    tensors = stored.tensors
    if details.get("base_held_in") == "nf4":
        # What is served is what was trained and evaluated: the base as its 4-bit numbers were.
        tensors = _as_nf4(tensors)
    digest = (details.get("parent") or {}).get("sha256")
    if digest is not None and digest != weights_digest(base):
        raise CheckpointError(
            f"{base} is not what the adapter {path} was trained on: its weights have changed",
            hint="bring the earlier base back, or train the adapter anew on this one",
        )
    adapter = read_adapter(path, ModelConfig.from_hugging_face(stored.raw_config))
    changes: dict[str, Any] = {"vocab_size": adapter.vocabulary_size(stored.raw_config["vocab_size"])}
    if adapter.untied:
        changes["tie_word_embeddings"] = False
    return _Stored(
        stored.raw_config | changes,
        adapter.merged(tensors),
        Tokenizer.from_directory(path) if (path / "tokenizer.json").is_file() else stored.tokenizer,
        ChatTemplate.from_directory(path) or stored.chat,
        read_json(path / "generation_config.json") or stored.generation,
        details,
    )


def _base_named(named: str) -> Path:
    """Where the base lies that an adapter names: a path, or a model of the hub that is in its cache."""
    name = None if is_confined() else meant(named)
    found = None if name is None else cached(name)
    return Path(named) if found is None else found.path


def _fetch_hint(named: object) -> str:
    name = meant(named) if isinstance(named, str) and named and not is_confined() else None
    return "" if name is None else f"fetch it with topkapi pull {name}, or "


def _as_nf4(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        matrix = tensor.ndim == 2 and name.startswith("layers.")
        yield name, NF4(tensor).matrix(tensor.dtype) if matrix else tensor


def weights_digest(path: str | Path) -> str:
    """SHA-256 of a checkpoint's weights: of its file, or over the digests of several."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digests = [sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def save_checkpoint(
    directory: str | Path,
    *,
    model: Decoder,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    generation: Mapping[str, Any],
    details: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a checkpoint that Topkapi, transformers, vLLM and llama.cpp's converter open.

    `dtype` is what matrices are stored in (None: as they are); vectors stay float32 unless `dtype` says otherwise.
    Raises `CheckpointError` when the disk is full, leaving an earlier checkpoint at `directory` as it was.
    """
    config = model.config
    # Not `state_dict`, which would let go of a network that is gathered from several processes for the moment.
    state = {name: tensor.detach().cpu() for name, tensor in model.named_parameters(remove_duplicate=False)}
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in to_hugging_face(config, state).items()}
    stored = str(dtype or model.embed_tokens.weight.dtype).removeprefix("torch.")
    # Under the second name it is looked for by transformers before 4.56, and by what is built on it.
    config_json = config.to_hugging_face() | {"dtype": stored, "torch_dtype": stored}
    return _write(
        directory, "model.safetensors", tensors, "config.json", config_json, tokenizer, chat, generation, details
    )


def save_adapter(
    directory: str | Path,
    *,
    model: Decoder,
    base: str | Path,
    rank: int,
    alpha: float,
    dropout: float,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    generation: Mapping[str, Any],
    details: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the adapters of `model`, trained on the checkpoint `base`, so that PEFT opens them; see `model.adapter`.

    `dtype` is what they are stored in. Raises `CheckpointError` as `save_checkpoint` does.
    """
    # A file of the hub's cache is a link to one without a name; a run's `best` leads to what will stay.
    place = os.path.realpath(base) if Path(base).is_dir() else os.path.abspath(base)
    settings = adapter_settings(model, base=place, rank=rank, alpha=alpha, dropout=dropout)
    tensors = {name: tensor.to(dtype) for name, tensor in adapter_tensors(model).items()}
    return _write(directory, WEIGHTS_FILE, tensors, CONFIG_FILE, settings, tokenizer, chat, generation, details)


def _write(
    directory: str | Path,
    weights_file: str,
    tensors: dict[str, Tensor],
    config_file: str,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    generation: Mapping[str, Any],
    details: Mapping[str, Any],
) -> Path:
    with write_directory(directory) as partial:
        try:
            save_file(tensors, partial / weights_file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error
        _write_json(partial / config_file, config)
        _write_json(partial / "generation_config.json", dict(generation))
        tokenizer.save(partial, chat.stored if chat else None)
        digests = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        _write_json(partial / "topkapi.json", {"format_version": FORMAT_VERSION, **details, "sha256": digests})
    return Path(directory)


def end_tokens(
    config: ModelConfig, tokenizer: Tokenizer, chat: ChatTemplate | None, generation: Mapping[str, Any]
) -> tuple[int, ...]:
    """Every id that ends a text or a turn, wherever the checkpoint says so."""
    ends = generation.get("eos_token_id")
    found = [*config.end_token_ids, *(ends if isinstance(ends, list) else [ends]), tokenizer.end_token_id]
    if chat is not None:
        found += chat.turn_end(tokenizer)
    # An id that no token has never ends anything; some configurations write -1 for none.
    return tuple(dict.fromkeys(end for end in found if end is not None and 0 <= end < config.vocab_size))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
