"""Turns text files into memory-mapped token ids, cached under a digest of what they were made from.

A cache entry is a directory with `train.bin` and `validation.bin` (little-endian uint16, or uint32 for vocabularies
above 65,536), `train.documents.npy` and `validation.documents.npy` (int64, where each document begins) and
`data.json` (digests and counts). Every document ends with the tokenizer's end token. Sentences that stand alone follow
the documents of their file, as if together they were one more.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from topkapi.model.errors import DataError
from topkapi.model.files import sha256, write_directory
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data.duplicates import Deduplicate, Signature, repeated, signature
from topkapi.training.data.finding import named
from topkapi.training.data.sources import fields_beside, lone_sentences, read_documents

Split = Literal["auto", "documents", "characters"]
ShardProgress = Callable[[str, int, int], None]

_FORMAT = 1
# Files below this size are tokenized in this process: starting another costs more.
_PARALLEL_BYTES = 4_000_000


@dataclass(frozen=True)
class TokenData:
    """The token streams of a run. `info` is `data.json`: sources with their digests, tokens, documents, bytes;
    `unused_fields` are what rows hold beside their texts."""

    train: NDArray[np.unsignedinteger[Any]]
    validation: NDArray[np.unsignedinteger[Any]]
    train_documents: NDArray[np.int64]
    validation_documents: NDArray[np.int64]
    info: dict[str, Any]
    unused_fields: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Encoded:
    """One file's tokens and the fields of its rows `beside` the text, with the tokens, the bytes and a digest of each
    document, to find near duplicates also a signature, and which of them are `kept`; and the tokens of sentences that
    stand alone, with how many are from each document."""

    tokens: Path
    sentences: Path
    lengths: NDArray[np.int64]
    sentence_lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    digests: NDArray[np.uint64]
    signatures: list[Signature]
    kept: NDArray[np.bool_]
    beside: set[str]


def prepare_tokens(
    files: Sequence[Path],
    validation_files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    cache: Path,
    text_field: str = "text",
    validation_fraction: float = 0.1,
    split: Split = "auto",
    deduplicate: Deduplicate = "none",
    alone: float = 0.0,
    groups: Sequence[int] | None = None,
    progress: ShardProgress | None = None,
) -> TokenData:
    """Tokenize `files` and set a validation part aside, or reuse the cache entry that holds exactly that.

    `split` "documents" holds out whole documents, chosen by a digest of their text so that equal texts fall on the
    same side; "characters" (for a single text) holds out its last part, as the textbooks do; "auto" takes the
    second for a single document. With `validation_files` nothing is split off. `deduplicate` leaves out documents that
    repeat an earlier one, and from training those that are in `validation_files`. Of the sentences of what is trained,
    the part `alone` comes once more, each as a document. `groups` says how many of `files`
    belong to each source of a mixture; `info` then has `train_parts`, the tokens of each. Raises `DataError` for text
    that cannot be read and where a part comes out empty.
    """
    if tokenizer.end_token_id is None:
        raise DataError(
            "the tokenizer has no end token, so documents cannot be told apart",
            field="tokenizer",
            hint="leave out --tokenizer, and one is trained; or train one with: topkapi tokenizer train",
        )
    read = list(dict.fromkeys((*files, *validation_files)))
    sources = {str(file): sha256(file) for file in read}
    key = {
        "format": _FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "train": [sources[str(file)] for file in files],
        "validation": [sources[str(file)] for file in validation_files],
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "split": split,
    }
    # Only where they are asked for: what was tokenized before stays as it is.
    key |= {"deduplicate": deduplicate} if deduplicate != "none" else {}
    key |= {"lone_sentences": alone} if alone else {}
    key |= {"groups": list(groups)} if groups is not None else {}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    directory = cache / digest[:32]
    if not (directory / "data.json").is_file():
        with write_directory(directory) as partial:
            builder = _Builder(partial, tokenizer, text_field, deduplicate, alone, groups, progress)
            builder.build(files, validation_files, validation_fraction, split)
    counts = json.loads((directory / "data.json").read_text("utf-8"))
    dtype = np.dtype(counts["dtype"])

    def stream(part: str) -> NDArray[np.unsignedinteger[Any]]:
        path = directory / f"{part}.bin"
        if path.stat().st_size != counts[f"{part}_tokens"] * dtype.itemsize:
            raise DataError(f"{path} is truncated", field="cache", hint=f"delete {directory}; it is made again")
        return np.memmap(path, dtype=dtype, mode="r") if counts[f"{part}_tokens"] else np.empty(0, dtype)

    return TokenData(
        train=stream("train"),
        validation=stream("validation"),
        train_documents=np.load(directory / "train.documents.npy"),
        validation_documents=np.load(directory / "validation.documents.npy"),
        info={"digest": digest, "sources": dict(zip(named(read), sources.values(), strict=True)), **counts},
        unused_fields=_unused(directory, read, text_field),
    )


def _unused(directory: Path, files: Sequence[Path], text_field: str) -> list[str]:
    """What the rows hold beside the text, as the cache entry says, or in one that is older, their first rows."""
    if (directory / "fields.json").is_file():
        fields: list[str] = json.loads((directory / "fields.json").read_text("utf-8"))
        return fields
    return sorted({name for file in files for name in fields_beside(file, text_field)})


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer as it is saved."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder), None)
        return sha256(Path(folder) / "tokenizer.json")


class _Builder:
    """Writes one cache entry into a directory."""

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        text_field: str,
        deduplicate: Deduplicate,
        alone: float,
        groups: Sequence[int] | None,
        progress: ShardProgress | None,
    ) -> None:
        self.directory, self.tokenizer, self.text_field, self.progress = directory, tokenizer, text_field, progress
        self.deduplicate, self.alone, self.groups = deduplicate, alone, groups
        self.dtype = _dtype(tokenizer)
        self.counts: dict[str, Any] = {"dtype": self.dtype.str}
        self.beside: set[str] = set()

    def build(
        self, files: Sequence[Path], validation_files: Sequence[Path], validation_fraction: float, split: Split
    ) -> None:
        """Fill the directory."""
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            scratch = Path(folder)
            if validation_files:
                parts = self._encode([*files, *validation_files], scratch)
                held_out = self._distinct(parts[len(files) :], [])
                self._write("train", [(part, part.kept) for part in self._distinct(parts[: len(files)], held_out)])
                self._write("validation", [(part, part.kept) for part in held_out])
            elif split != "documents" and (text := self._single_document(files)) is not None:
                if self.alone:
                    raise DataError(
                        "sentences can stand alone where the data holds several documents, and here is one",
                        field="lone_sentences",
                        hint="leave out --lone-sentences, or give the text as several files",
                    )
                self._split_characters(text, validation_fraction)
            elif split == "characters":
                raise DataError(
                    "the data holds several documents, so it cannot be split by characters",
                    field="split",
                    hint="use --split documents",
                )
            else:
                self._split_documents(self._distinct(self._encode(files, scratch), []), validation_fraction)
        (self.directory / "fields.json").write_text(json.dumps(sorted(self.beside)) + "\n", "utf-8")
        (self.directory / "data.json").write_text(json.dumps(self.counts, indent=2) + "\n", "utf-8")

    def _single_document(self, files: Sequence[Path]) -> str | None:
        if len(files) != 1:
            return None
        first = list(islice(read_documents(files[0], self.text_field, self.beside), 2))
        return first[0] if len(first) == 1 else None

    def _split_characters(self, text: str, validation_fraction: float) -> None:
        at = int((1 - validation_fraction) * len(text))
        for part, piece in (("train", text[:at]), ("validation", text[at:])):
            ids = self.tokenizer.encode(piece)
            # The text is cut in the middle, so only its last part ends a document.
            if piece and len(text) == (at if part == "train" else at + len(piece)):
                ids = [*ids, self._end]
            np.asarray(ids, dtype=self.dtype).tofile(self.directory / f"{part}.bin")
            self._count(part, len(ids), np.zeros(1 if ids else 0, dtype=np.int64), len(piece.encode()))

    def _split_documents(self, parts: list[_Encoded], validation_fraction: float) -> None:
        digests = np.concatenate([part.digests[part.kept] for part in parts])
        different = np.unique(digests)
        held_out = math.ceil(validation_fraction * len(digests))
        if held_out and len(different) < 2:
            raise DataError(
                "all documents are the same, so no validation part can be set aside",
                field="validation_fraction",
                hint="give more text, or --validation-fraction 0",
            )
        # Equal texts share a digest and so a side; at least one text stays for training.
        limit = min(np.sort(digests)[held_out - 1], different[-2]) if held_out else None
        masks = [np.zeros(len(part.digests), np.bool_) if limit is None else part.digests <= limit for part in parts]
        self._write("train", [(part, ~mask & part.kept) for part, mask in zip(parts, masks, strict=True)])
        self._write("validation", [(part, mask & part.kept) for part, mask in zip(parts, masks, strict=True)])

    def _distinct(self, parts: list[_Encoded], before: list[_Encoded]) -> list[_Encoded]:
        """`parts` without the documents that repeat an earlier one, of `before` or of themselves."""
        if self.deduplicate == "none":
            return parts
        everything = [*before, *parts]
        digests = [digest for part in everything for digest in part.digests.tolist()]
        signatures = [each for part in everything for each in part.signatures]
        again = repeated(digests, signatures if self.deduplicate == "near" else None)
        counts = [len(part.digests) for part in everything]
        marks = np.split(again, np.cumsum(counts)[:-1])[len(before) :]
        self.counts["repeated_documents"] = self.counts.get("repeated_documents", 0) + sum(int(m.sum()) for m in marks)
        return [replace(part, kept=~mark) for part, mark in zip(parts, marks, strict=True)]

    @property
    def _end(self) -> int:
        end = self.tokenizer.end_token_id
        assert end is not None, "checked by prepare_tokens"
        return end

    def _encode(self, files: Sequence[Path], scratch: Path) -> list[_Encoded]:
        """Tokenize every file into `scratch`, in parallel where that pays."""
        total = sum(file.stat().st_size for file in files)
        near = self.deduplicate == "near"
        jobs = [(file, self.text_field, scratch / f"{index}.bin", near, self.alone) for index, file in enumerate(files)]
        parts: list[_Encoded] = []
        workers = min(len(files), os.cpu_count() or 1)
        if workers == 1 or total < _PARALLEL_BYTES:
            for job in jobs:
                parts.append(_encode_file(*job, self.tokenizer))
                self.beside |= parts[-1].beside
                self._report(len(parts), len(files))
            return parts
        self.tokenizer.save(scratch / "tokenizer", None)
        # Spawned, not forked: this process may hold threads of torch and of tokenizers.
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _load_worker_tokenizer, (scratch / "tokenizer",)
        ) as pool:
            for part in pool.map(_encode_in_worker, jobs):
                parts.append(part)
                self.beside |= part.beside
                self._report(len(parts), len(files))
        return parts

    def _report(self, done: int, total: int) -> None:
        if self.progress:
            self.progress("tokenizing", done, total)

    def _write(self, name: str, parts: Sequence[tuple[_Encoded, NDArray[np.bool_]]]) -> None:
        starts: list[NDArray[np.int64]] = []
        ends = []
        total = size = 0
        with (self.directory / f"{name}.bin").open("wb") as out:
            for part, keep in parts:
                tokens = np.fromfile(part.tokens, dtype=self.dtype)[np.repeat(keep, part.lengths)]
                lengths = part.lengths[keep]
                tokens.tofile(out)
                starts.append(total + np.cumsum(lengths) - lengths)
                total += len(tokens)
                size += int(part.sizes[keep].sum())
                if name == "train" and self.alone:
                    alone = np.fromfile(part.sentences, dtype=self.dtype)[np.repeat(keep, part.sentence_lengths)]
                    alone.tofile(out)
                    starts.append(np.full(min(1, len(alone)), total))
                    total += len(alone)
                ends.append(total)
        self._count(name, total, np.concatenate(starts), size)
        if self.groups is not None and name == "train":
            borders = [ends[at - 1] for at in np.cumsum(self.groups).tolist()]
            self.counts["train_parts"] = np.diff(borders, prepend=0).tolist()

    def _count(self, part: str, tokens: int, documents: NDArray[np.int64], size: int) -> None:
        np.save(self.directory / f"{part}.documents.npy", documents)
        self.counts |= {f"{part}_tokens": tokens, f"{part}_documents": len(documents), f"{part}_bytes": size}


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _encode_file(file: Path, text_field: str, out: Path, near: bool, alone: float, tokenizer: Tokenizer) -> _Encoded:
    lengths, sentence_lengths, sizes, digests, signatures = [], [], [], [], []
    sentences, fields = out.with_suffix(".sentences"), set[str]()

    def append(texts: Sequence[str], stream: IO[bytes]) -> int:
        ids: list[int] = []
        for text in texts:
            ids += tokenizer.encode(text)
            ids.append(tokenizer.end_token_id)  # type: ignore[arg-type]  # prepare_tokens has checked it
        np.asarray(ids, dtype=_dtype(tokenizer)).tofile(stream)
        return len(ids)

    with out.open("wb") as stream, sentences.open("wb") as beside:
        for text in read_documents(file, text_field, fields):
            raw = text.encode()
            digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest())
            lengths.append(append([text], stream))
            sentence_lengths.append(append(lone_sentences(text, alone, seed=digest), beside) if alone else 0)
            sizes.append(len(raw))
            digests.append(digest)
            if near:
                signatures.append(signature(text))
    return _Encoded(
        tokens=out,
        sentences=sentences,
        lengths=np.array(lengths, dtype=np.int64),
        sentence_lengths=np.array(sentence_lengths, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        digests=np.array(digests, dtype=np.uint64),
        signatures=signatures,
        kept=np.ones(len(lengths), dtype=np.bool_),
        beside=fields,
    )


_worker_tokenizer: Tokenizer


def _load_worker_tokenizer(directory: Path) -> None:
    global _worker_tokenizer  # noqa: PLW0603  # a worker process has one tokenizer
    _worker_tokenizer = Tokenizer.from_directory(directory)


def _encode_in_worker(job: tuple[Path, str, Path, bool, float]) -> _Encoded:
    return _encode_file(*job, _worker_tokenizer)
