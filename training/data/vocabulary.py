"""`topkapi tokenizer train`, and the tokenizer that `pretrain` trains when none is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from topkapi.model.errors import DataError
from topkapi.model.files import write_directory
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data.finding import find_files
from topkapi.training.data.sources import read_documents

# The end of a document comes first; the next two are ChatML's; the rest wait for what a fine-tune may need.
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{index}|>" for index in range(5)))


def train_tokenizer(patterns: Sequence[str], vocab_size: int, out: Path, text_field: str, megabytes: int) -> None:
    """Train a vocabulary on files, folders or globs and write it to `out`."""
    files = find_files(patterns)
    print(f"training a tokenizer of {vocab_size:,} entries on {len(files)} file{'s' * (len(files) != 1)}", flush=True)
    tokenizer = Tokenizer.train(training_texts(files, text_field, megabytes << 20), vocab_size, CONTROL_TOKENS)
    with write_directory(out) as partial:
        tokenizer.save(partial)
    print(f"{out}: {tokenizer.vocab_size:,} entries", flush=True)


def tokenizer_for(files: Sequence[Path], vocab_size: int | None, text_field: str, megabytes: int) -> Tokenizer:
    """A tokenizer trained on `files`; without `vocab_size` as large as the amount of text can fill."""

    def train(size: int) -> Tokenizer:
        return Tokenizer.train(training_texts(files, text_field, megabytes << 20), size, CONTROL_TOKENS)

    if vocab_size is not None:
        return train(vocab_size)
    total = sum(file.stat().st_size for file in files)
    size = 1024 if total < 1 << 20 else 4096 if total < 20 << 20 else 8192
    while True:
        try:
            return train(size)
        except DataError as error:
            if error.field != "vocab_size" or size <= 256 + len(CONTROL_TOKENS):
                raise
            size = max(size // 2, 256 + len(CONTROL_TOKENS))


def training_texts(files: Sequence[Path], text_field: str, limit: int) -> Iterator[str]:
    """About `limit` bytes of text: of every file its share, from its beginning."""
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        share = limit * size / max(1, sum(sizes))
        for text in read_documents(file, text_field):
            yield text[: max(1, int(share))]
            share -= len(text)
            if share <= 0:
                break
