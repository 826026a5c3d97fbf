"""Reads training text: `.txt`, `.jsonl` (plain or compressed), `.parquet` and `.arrow` files, folders of them, globs,
and datasets of Hugging Face."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import io
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from topkapi.model.errors import DataError
from topkapi.model.nearest import nearest
from topkapi.model.user_files import LONGEST_DOCUMENT, LONGEST_TEXT, read_file, too_long, what_it_is

LINES = (".jsonl", ".jsonl.bz2", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".txt", *LINES, ".parquet", ".arrow")
# A dataset by its name, as `datasets.load_dataset` knows it: `hf:NAME:SPLIT`, `hf:OWNER/NAME/CONFIGURATION:SPLIT`.
DATASET = "hf:"
_REACH_SECONDS = 5.0


def find_files(patterns: Sequence[str], hint: str | None = None) -> list[Path]:
    """The files that `patterns` (paths, folders, globs) name, in the order given, folders and globs sorted.

    Raises `DataError` for a pattern that names nothing, with `hint`, and for a file of a kind that is not read.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if pattern.startswith(DATASET):
            found = _dataset_files(pattern.removeprefix(DATASET))
        elif path.is_dir():
            # `datasets` keeps what it computes from a dataset beside it.
            found = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) and not _cached(file))
            if not found:
                raise DataError(f"no training text in the folder {pattern}", field="data", hint=_SUFFIX_HINT)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            if not found:
                raise no_such_file(pattern, "no such file, folder or glob", hint=hint)
        for file in found:
            if not _suffix(file):
                raise DataError(f"{file} is not a kind of file that can be read", field="data", hint=_SUFFIX_HINT)
        files += found
    return list(dict.fromkeys(files))


def no_such_file(
    name: str, message: str = "no such file", *, field: str = "data", hint: str | None = None
) -> DataError:
    """The error for a file that is not there, which names one of nearly the same name, else gives `hint`."""
    path = Path(name).expanduser()
    if other := what_it_is(path):
        return DataError(f"{name} {other}", field=field, hint="name a file")
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := nearest(path.name, beside):
        hint = f"did you mean {path.with_name(near)}?"
    elif hint is None:
        hint = "paths are relative to the folder that the command is given in" if beside else None
        hint = hint or f"there is no folder {path.parent}"
    return DataError(f"{message}: {name}", field=field, hint=hint)


def _cached(file: Path) -> bool:
    return file.suffix == ".arrow" and file.name.startswith(("cache-", "indices-"))


def _dataset_files(name: str) -> list[Path]:
    """The Arrow files of a dataset that `datasets` has on this machine, or can fetch."""
    datasets = extra_package("datasets", "datasets", "a dataset by its name")
    where, _, split = name.partition(":")
    owner, _, rest = where.partition("/")
    dataset, _, configuration = rest.partition("/")
    path = f"{owner}/{dataset}" if rest else owner
    with _offline_if_unreachable(datasets, path) as unreachable:
        try:
            loaded = datasets.load_dataset(path, configuration or None, split=split or "train")
        except Exception as error:  # whatever its loaders and its HTTP client raise
            if unreachable:
                raise DataError(
                    f"the dataset {name} is not on this machine, and the hub cannot be reached: {unreachable}",
                    field="data",
                    hint="connect to the network, or give files or folders instead",
                ) from None
            reason = " ".join(str(error).split())
            raise DataError(
                f"the dataset {name} cannot be loaded: {reason[:300]}",
                field="data",
                hint=f"write {DATASET}NAME:SPLIT or {DATASET}OWNER/NAME/CONFIGURATION:SPLIT",
            ) from None
    return [Path(file["filename"]) for file in loaded.cache_files]


@contextmanager
def _offline_if_unreachable(datasets: Any, path: str) -> Iterator[str | None]:
    """Yield why the hub cannot be reached, None if it can or need not be; then `datasets` looks on this machine only.

    Left to itself its client tries six times, over half a minute.
    """
    if datasets.config.HF_HUB_OFFLINE or Path(path).exists():
        yield None
        return
    hub = extra_package("huggingface_hub", "datasets", "a dataset by its name")
    reason = None
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=_REACH_SECONDS)
    except Exception as error:  # whatever its HTTP client raises
        reason = str(error) or type(error).__name__
    before = hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield reason
    finally:
        datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = before


def extra_package(name: str, extra: str, purpose: str) -> Any:
    """An optional package. Raises `DataError` naming the extra that brings it."""
    try:
        module: ModuleType = importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{purpose} needs the package {name}", field="data", hint=f"pip install 'topkapi[{extra}]'"
        ) from None
    return module


_AGAIN, _REPAIR = "copy or download it again", "repair the row, or take it out"
_SUFFIX_HINT = f"files must end in {', '.join(SUFFIXES)}; a recipe (.yaml) comes before the flags"


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """The documents of one file; blank ones are left out.

    A `.txt` file is one document with line ends as `\\n`. The others hold one per row, in `text_field`.
    Raises `DataError` naming the file and line for invalid UTF-8, NUL characters, broken JSON, a missing field,
    and for a file without any text.
    """
    suffix = _suffix(path)
    if suffix == ".txt":
        documents = _text_file(path)
    elif suffix == ".parquet":
        documents = _parquet_file(path, text_field)
    elif suffix == ".arrow":
        documents = _arrow_file(path, text_field)
    else:
        documents = _json_lines(path, text_field)
    empty = True
    for text in documents:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise DataError(f"{path} holds no text", field="data", hint="take it out of the data, or fill it")


def fields_beside(path: Path, text_field: str = "text") -> set[str]:
    """What else than the text the rows of a file hold, which is not trained on; of JSON lines, by the first row.

    A file that cannot be read has none: that is told where it is read.
    """
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    suffix = _suffix(path)
    names: Iterable[str] = ()
    try:
        if suffix == ".parquet":
            names = pyarrow.parquet.read_schema(path).names
        elif suffix == ".arrow":
            with pyarrow.memory_map(str(path)) as source:
                indexed = source.read(6) == b"ARROW1"
                source.seek(0)
                names = (pyarrow.ipc.open_file(source) if indexed else pyarrow.ipc.open_stream(source)).schema.names
        elif suffix != ".txt":
            first = next((line for _, line in read_lines(path) if line.strip()), b"{}")
            row = json.loads(first)
            names = row if isinstance(row, dict) else ()
    except (DataError, ValueError, OSError, pyarrow.ArrowException):
        return set()
    return set(names) - {text_field}


# After a mark that ends a sentence, before what begins one; not after an initial or a usual abbreviation.
_SENTENCE_END = re.compile(
    r"""(?:(?<=[a-z0-9)][.!?])|(?<=[.!?]["'”’]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=["'“‘]?[A-Z])"""
)
_SENTENCE = re.compile(r"""["'“‘]?[A-Z][^\n]*[.!?]["'”’]?""")
_SENTENCE_CHARACTERS = range(16, 257)


def lone_sentences(text: str, share: float, seed: int) -> list[str]:
    """About the part `share` of the English sentences of `text`, shuffled, so that they seldom continue one another.

    Lines that are no sentences, such as headings, do not count, and neither do very short and very long ones.
    """
    chance = random.Random(seed)
    found = [
        sentence
        for line in text.split("\n")
        for sentence in _SENTENCE_END.split(line.strip())
        if len(sentence) in _SENTENCE_CHARACTERS and chance.random() < share and _SENTENCE.fullmatch(sentence)
    ]
    chance.shuffle(found)
    return found


def decode_utf8(data: bytes, path: Path, line: int = 1) -> str:
    """`data`, which starts at line `line` of `path`, as text; `DataError` names the line at fault."""
    try:
        text = data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        at = line + data[: error.start].count(b"\n")
        raise DataError(
            f"{path}, line {at}: invalid UTF-8 (byte 0x{data[error.start]:02x})",
            field="data",
            hint="convert the file to UTF-8, for example: iconv -f latin1 -t utf-8",
        ) from None
    if "\0" in text:
        raise _binary(path, line + text[: text.index("\0")].count("\n"))
    return text


def _binary(path: Path, line: int) -> DataError:
    return DataError(
        f"{path}, line {line}: a NUL character: this looks like binary data, not text",
        field="data",
        hint="leave the file out; if it is text in UTF-16, convert it: iconv -f utf-16 -t utf-8",
    )


def _text_file(path: Path) -> Iterator[str]:
    yield decode_utf8(_read_bytes(path), path).replace("\r\n", "\n")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file of JSON lines, split on `\\n` alone: texts may hold U+2028 and U+0085."""
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_TEXT + 1), b""), start=1):
                if len(line) > LONGEST_TEXT:
                    raise too_long(f"{path}, line {number}", LONGEST_TEXT, field="data", hint=_REPAIR)
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", field="data", hint=_AGAIN) from None


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """A file of JSON lines, decompressed as it is read."""
    name = path.name.lower()
    if name.endswith(".bz2"):
        return bz2.open(path, "rb")
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        import pyarrow

        # Also of several frames, as files that were put together have; a truncated one is an error.
        raw: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(raw)
    return path.open("rb")


_CONVERSATION = {"messages", "completion", "answer", "output", "chosen"}


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = parse_json(decode_utf8(line, path, number), path, number)
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            names = ", ".join(row) if isinstance(row, dict) else "no fields"
            if isinstance(row, dict) and _CONVERSATION & row.keys():
                names += " (topkapi finetune trains on questions and answers)"
            raise DataError(
                f"{path}, line {number}: no text in the field {text_field!r}",
                field="text_field",
                hint=f"the line has: {names}; choose one with --text-field",
            )
        if "\0" in text:
            raise _binary(path, number)
        if b"\\ud" in line.lower() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(
                f"{path}, line {number}: half of a character (a lone surrogate)", field="data", hint=_REPAIR
            )
        yield text


def parse_json(text: str, path: Path, line: int) -> object:
    """One line's JSON value; `DataError` names the line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}, line {line}: not valid JSON ({error})",
            field="data",
            hint="every line must be one whole JSON value; a file that is one list is called .json",
        ) from None


def _parquet_file(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(path, text_field, file.schema_arrow.names)
        yield from _column(path, text_field, (batch.column(0) for batch in file.iter_batches(columns=[text_field])))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}", field="data", hint=_AGAIN) from None


def _arrow_file(path: Path, text_field: str) -> Iterator[str]:
    """A file as `datasets` stores it: an Arrow stream, or the format with an index."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            indexed = source.read(6) == b"ARROW1"
            source.seek(0)
            file = pyarrow.ipc.open_file(source) if indexed else pyarrow.ipc.open_stream(source)
            batches = (file.get_batch(at) for at in range(file.num_record_batches)) if indexed else file
            _check_column(path, text_field, file.schema.names)
            yield from _column(path, text_field, (batch.column(text_field) for batch in batches))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Arrow: {error}", field="data", hint=_AGAIN) from None


def _check_column(path: Path, text_field: str, names: Sequence[str]) -> None:
    if text_field not in names:
        raise DataError(
            f"{path} has no column {text_field!r}",
            field="text_field",
            hint=f"it has: {', '.join(names)}; choose one with --text-field",
        )


def _column(path: Path, text_field: str, batches: Iterable[Any]) -> Iterator[str]:
    row = 0
    for batch in batches:
        for text in batch.to_pylist():
            row += 1
            if not isinstance(text, str):
                raise DataError(f"{path}, row {row}: no text in the column {text_field!r}", field="data", hint=_REPAIR)
            if "\0" in text:
                raise _binary(path, row)
            yield text


def _read_bytes(path: Path) -> bytes:
    hint = "split it, or give its documents as the lines of a .jsonl file"
    return read_file(path, LONGEST_DOCUMENT, field="data", hint=hint)
