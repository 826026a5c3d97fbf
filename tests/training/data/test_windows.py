"""Text files to token streams to batches: nothing lost, nothing invented, every bad file named."""

import bz2
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topkapi.model.errors import DataError
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data import shards
from topkapi.training.data.finding import find_files
from topkapi.training.data.shards import TokenData, prepare_tokens
from topkapi.training.data.sources import read_documents
from topkapi.training.data.windows import WindowLoader, permutation

# U+2028 and U+0085 end lines for str.splitlines(), but not in JSONL.
TEXTS = ["One.\nTwo lines.", "Three\u2028still three\u0085and still", "Vier Füße, 五, 🙂"]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path.write_bytes(bz2.compress(content) if path.suffix == ".bz2" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.bz2", "a.parquet"])
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), path)
    else:
        write_jsonl(path, [{"id": 1, "text": text} for text in TEXTS])
    assert list(read_documents(path)) == TEXTS


def test_a_text_file_is_one_document_with_unix_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne\r\ntwo\u2028three\r\n".encode())
    assert list(read_documents(path)) == ["One\ntwo\u2028three\n"]


def test_folders_and_globs_are_read_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path), str(tmp_path / "*.txt")])
    assert [path.name for path in found] == ["a.txt", "b.txt", "c.jsonl"]


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "latin1.txt": (b"fine\nalso fine\ncaf\xe9\n", "line 3: invalid UTF-8 (byte 0xe9)"),
    "binary.txt": (b"\x7fELF\0\0\0", "line 1: a NUL character"),
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n ", "holds no text"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2: invalid UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "a"}\n', "line 2: no text in the field 'text'"),
    "list.jsonl": (b"[1]\n", "line 1: no text in the field 'text'"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: half of a character"),
    "nul.jsonl": (b'{"text": "\\u0000"}\n', "line 1: a NUL character"),
    "truncated.jsonl.bz2": (bz2.compress(b'{"text": "a"}\n' * 999)[:-20], "cannot be read"),
    "not.parquet": (b"PAR1 no", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_documents(tmp_path / name))
    assert str(tmp_path / name) in caught.value.message
    assert message in caught.value.message and caught.value.hint


def test_a_missing_field_is_answered_with_those_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"title": "t", "body": "b"}])
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert caught.value.hint == "the line has: title, body; choose one with --text-field"
    assert list(read_documents(path, "body")) == ["b"]


@pytest.mark.parametrize("pattern", ["nothing.txt", "*.jsonl", "recipe.yaml"])
def test_what_names_no_text_is_refused(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    with pytest.raises(DataError, match=pattern.replace("*", r"\*")) as caught:
        find_files([str(tmp_path / pattern)])
    assert caught.value.hint


@pytest.fixture
def prepare(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Callable[..., TokenData]:
    def run(files: list[Path], **options: object) -> TokenData:
        options.setdefault("validation_files", [])
        return prepare_tokens(files, tokenizer=tiny_tokenizer, cache=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return run


def documents(stream: np.ndarray, starts: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts of a stream; asserts that each ends with one end token and begins where `starts` says."""
    ends = np.flatnonzero(stream == tokenizer.end_token_id)
    assert starts.tolist() == [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(stream[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def test_documents_are_split_whole_and_equal_ones_stay_together(
    prepare: Callable[..., TokenData], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [f"document {number % 20} <|endoftext|>" for number in range(60)]
    files = [
        write_jsonl(tmp_path / f"{half}.jsonl", [{"text": text} for text in texts[30 * half : 30 * half + 30]])
        for half in (0, 1)
    ]
    data = prepare(files, validation_fraction=0.2)
    train = documents(data.train, data.train_documents, tiny_tokenizer)
    validation = documents(data.validation, data.validation_documents, tiny_tokenizer)
    assert sorted(train + validation) == sorted(texts)
    assert len(validation) == 12 and not set(train) & set(validation)
    assert data.info["train_bytes"] + data.info["validation_bytes"] == sum(len(text.encode()) for text in texts)
    assert data.info["train_documents"] == 48 and data.info["train_tokens"] == len(data.train)


def test_a_single_text_is_split_by_characters(
    prepare: Callable[..., TokenData], tiny_tokenizer: Tokenizer, tmp_path: Path, english: str
) -> None:
    text = english[:5000]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = prepare([tmp_path / "a.txt"], validation_fraction=0.1)
    # No end token where the text was cut, one where it ended.
    assert data.train.tolist() == tiny_tokenizer.encode(text[:4500])
    assert data.validation.tolist() == [*tiny_tokenizer.encode(text[4500:]), tiny_tokenizer.end_token_id]
    whole = prepare([tmp_path / "a.txt"], validation_fraction=0.0)
    assert whole.train.tolist() == [*tiny_tokenizer.encode(text), tiny_tokenizer.end_token_id]
    assert len(whole.validation) == 0


def test_tokenizing_in_parallel_changes_nothing(
    prepare: Callable[..., TokenData], tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write_jsonl(tmp_path / f"{part}.jsonl", [{"text": text} for text in english[part::50].split(".")])
        for part in range(3)
    ]
    alone = prepare(files, validation_fraction=0.1)
    monkeypatch.setattr(shards, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(shards, "_FORMAT", -1)
    together = prepare(files, validation_fraction=0.1)
    assert together.info["digest"] != alone.info["digest"]
    assert np.array_equal(alone.train, together.train) and np.array_equal(alone.validation, together.validation)
    assert np.array_equal(alone.train_documents, together.train_documents)


def test_the_cache_is_used_until_something_changes(prepare: Callable[..., TokenData], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {number}"} for number in range(10)])

    def entries() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}

    prepare([path])
    before = entries()
    prepare([path])
    assert entries() == before
    write_jsonl(path, [{"text": f"text {number}"} for number in range(11)])
    prepare([path])
    assert len(entries()) == 2 * len(before)


def test_windows_are_those_of_the_book() -> None:
    # "The Verdict" in GPT-2's tokens: 4,612 to train on and 534 to validate.
    train = WindowLoader(np.arange(4612), context=256, stride=256, batch_size=2, seed=123)
    validation = WindowLoader(np.arange(534), context=256, stride=256, batch_size=2, seed=123, validation=True)
    assert train.steps_per_epoch == 9
    assert [len(batch.tokens) for batch in validation.first(None)] == [2]


@given(
    size=st.integers(60, 300),
    context=st.integers(2, 9),
    stride=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
def test_an_epoch_visits_every_window_once_with_targets_one_ahead(
    size: int, context: int, stride: int, batch_size: int, seed: int
) -> None:
    stream = np.arange(size, dtype=np.uint16)
    loader = WindowLoader(stream, context=context, stride=stride, batch_size=batch_size, seed=seed)
    windows = list(range(0, size - context, stride))
    steps = loader.steps_per_epoch
    assert steps == len(windows) // batch_size
    for epoch in (0, 1):
        rows = torch.cat([loader.batch(epoch * steps + step).tokens for step in range(steps)])
        starts = rows[:, 0].tolist()
        assert len(set(starts)) == len(starts) == steps * batch_size and set(starts) <= set(windows)
        assert torch.equal(rows - rows[:, :1], torch.arange(context).expand_as(rows))
    batch = loader.batch(steps - 1)
    assert torch.equal(batch.targets, batch.tokens + 1)
    # A loader that begins anywhere gives the same batch: this is what exact resuming rests on.
    again = WindowLoader(stream, context=context, stride=stride, batch_size=batch_size, seed=seed)
    assert torch.equal(again.batch(2 * steps - 1).tokens, loader.batch(2 * steps - 1).tokens)


def test_no_document_of_a_window_sees_another() -> None:
    """Of 9 the stream's documents end; each is read from the 9 before it."""
    stream = np.array([1, 2, 9, 3, 9, 9, 4, 5, 6, 9, 7, 8, 9], dtype=np.uint16)
    loader = WindowLoader(stream, context=6, stride=6, batch_size=2, seed=0, separator=9)
    (batch,) = loader.first(None)
    assert batch.tokens.tolist() == [stream[:12].tolist()]
    assert batch.targets.tolist() == [stream[1:13].tolist()]
    assert batch.texts == ((2, 2, 1, 1), (3, 3))
    assert [part.tokens.tolist() for part in batch.split(1)] == [[stream[:6].tolist()], [stream[6:12].tolist()]]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize(("validation", "remedy"), [(False, "--batch-size"), (True, "--validation-fraction")])
def test_too_little_text_is_named_with_what_it_takes(validation: bool, remedy: str) -> None:
    with pytest.raises(DataError) as caught:
        WindowLoader(
            np.arange(8), context=8, stride=8, batch_size=1, seed=0, sources="short.txt", validation=validation
        )
    assert "short.txt: 8 tokens" in caught.value.message and "need 9" in caught.value.message
    assert remedy in (caught.value.hint or "")
