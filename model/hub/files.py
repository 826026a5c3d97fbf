"""Which files of a repository make up a checkpoint: never more than those, never code, never pickles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from topkapi.model.errors import CheckpointError
from topkapi.model.hub.names import HubName

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
TEXTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "topkapi.json",
)  # fmt: skip
"""What is read of a checkpoint beside its weights."""

_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja")
_FOR_PEOPLE = re.compile(r"(README|LICEN[CS]E|NOTICE|USE_POLICY)(\.\w+)?", re.IGNORECASE)
_QUANTISATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d[A-Z0-9_]*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|FP?16|FP?32))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
PREFERRED = (
    "Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "Q5_K_S", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q3_K_M", "IQ4_XS",
    "F16", "BF16", "F32",
)  # fmt: skip
"""Quantisations in the order in which one is taken where none was asked for: small and hardly worse first."""


@dataclass(frozen=True)
class Choice:
    """The files of one checkpoint: `texts` first, then `weights`; `gguf` where these are the one file to load.

    With `index`, the weights are those that this text lists, and are known once it is there.
    """

    texts: tuple[str, ...]
    weights: tuple[str, ...]
    gguf: str | None = None
    index: str | None = None
    pickled: bool = False


def choose(name: HubName, files: Iterable[str], *, pickles: bool = False) -> Choice:
    """The files of a repository with these `files` that make up the checkpoint that is meant.

    With `pickles`, weights that `topkapi import` reads are taken where there are no others. Raises `CheckpointError`
    with the way out where nothing is there to be loaded, or where it cannot be told what is meant.
    """
    names = set(files)
    people = tuple(sorted(file for file in names if _FOR_PEOPLE.fullmatch(file)))
    ggufs = {file for file in names if file.lower().endswith(".gguf") and not _NO_MODEL.search(file)}
    if name.variant is not None:
        return Choice(people, (), _of_variant(name, ggufs))
    templates = sorted(file for file in names if _TEMPLATE.fullmatch(file))
    texts = (*(text for text in TEXTS if text in names), *templates, *people)
    if WEIGHTS in names or INDEX in names:
        _check_texts(name, names)
        if WEIGHTS in names:
            return Choice(texts, (WEIGHTS,))
        return Choice((*texts, INDEX), (), index=INDEX)
    if ADAPTER in names and ADAPTER_WEIGHTS in names:
        return Choice((ADAPTER, *texts), (ADAPTER_WEIGHTS,))
    if ggufs:
        return Choice(people, (), _usual(name, ggufs))
    if PICKLED in names or PICKLED_INDEX in names:
        if not pickles:
            raise CheckpointError(
                f"{name} has pickled weights only, which are not loaded",
                hint=f"make a checkpoint of them first: topkapi import {name} {name.repository.partition('/')[2]}",
            )
        if PICKLED in names:
            return Choice(texts, (PICKLED,), pickled=True)
        return Choice((*texts, PICKLED_INDEX), (), index=PICKLED_INDEX, pickled=True)
    raise CheckpointError(
        f"{name} has no weights that are read: {_some(names) or 'it is empty'}",
        hint=f"needed are {WEIGHTS} (or its index), an adapter or a .gguf file; see whether another repository of the "
        "model has one",
    )


def quantisation(file: str) -> str | None:
    """The quantisation that a GGUF file's name tells, in capitals."""
    stem = _PART.sub("", file.rpartition("/")[2][: -len(".gguf")])
    found = _QUANTISATION.findall(stem)
    return _as_written(found[-1]) if found else None


def _as_written(text: str) -> str:
    return re.sub(r"^FP(?=16|32)", "F", text.upper())


def variants(name: HubName, ggufs: Iterable[str]) -> list[str]:
    """How each GGUF file of a repository is asked for."""
    files = sorted(ggufs)
    kinds = [quantisation(file) for file in files]
    plain = HubName(name.repository, name.revision)
    return [
        f"{plain}:{kind if kind and kinds.count(kind) == 1 else file}" for file, kind in zip(files, kinds, strict=True)
    ]


def _of_variant(name: HubName, ggufs: set[str]) -> str:
    if not ggufs:
        plain = HubName(name.repository, name.revision)
        raise CheckpointError(f"{name}: the repository has no GGUF files to choose from", hint=f"ask for {plain}")
    asked = str(name.variant)
    if asked in ggufs:
        found = [asked]
    else:
        found = [file for file in ggufs if quantisation(file) == _as_written(asked)]
    return _single(name, found, ggufs, f"{name}: there is no such GGUF file")


def _usual(name: HubName, ggufs: set[str]) -> str:
    for kind in PREFERRED:
        found = [file for file in ggufs if quantisation(file) == kind and not _is_part(file)]
        if found:
            return _single(name, found, ggufs, "")
    return _single(name, list(ggufs), ggufs, "")


def _single(name: HubName, found: list[str], ggufs: set[str], none: str) -> str:
    if len(found) == 1 and not _is_part(found[0]):
        return found[0]
    whole = {file for file in ggufs if not _is_part(file)}
    hint = (
        f"ask for one of: {', '.join(variants(name, whole)[:12])}"
        if whole
        else "see whether another repository has one"
    )
    if found and all(map(_is_part, found)):
        raise CheckpointError(f"{name} is split into {len(found)} files, which are not read together", hint=hint)
    raise CheckpointError(none if not found else f"several GGUF files of {name} could be meant", hint=hint)


def _is_part(file: str) -> bool:
    return _PART.search(file[: -len(".gguf")]) is not None


def _check_texts(name: HubName, names: set[str]) -> None:
    if "config.json" not in names:
        raise CheckpointError(
            f"{name} has weights but no config.json, which says what network they are of",
            hint="see whether another repository of the model has one",
        )
    if not has_tokenizer(names):
        raise CheckpointError(
            f"{name} has no tokenizer.json (nor vocab.json and merges.txt), so its texts cannot be read",
            hint="have transformers write one (AutoTokenizer.from_pretrained(…).save_pretrained(…)), or use another "
            "repository of the model",
        )


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether the files of one of the kinds of vocabulary that are read are among `names`."""
    found = set(names)
    return any(found.issuperset(files) for files in TOKENIZERS)


def indexed(index: Mapping[str, object], name: HubName) -> tuple[str, ...]:
    """The weight files that an index of tensors lists. Raises `CheckpointError` for one that lists none."""
    weight_map = index.get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not files or not all(isinstance(file, str) and re.fullmatch(r"\w[\w.-]*", file) for file in files):
        raise CheckpointError(
            f"{name}: its index of tensors must hold a weight_map of the tensors' files by name",
            field="weight_map",
            hint="the repository is damaged; use another one of the model",
        )
    return tuple(sorted(files))


def _some(names: set[str]) -> str:
    shown = sorted(file for file in names if not file.startswith("."))
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")
