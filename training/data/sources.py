"""Reads training text: `.txt`, `.jsonl`, `.jsonl.bz2` and `.parquet` files, folders of them, and globs."""

from __future__ import annotations

import bz2
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.bz2", ".parquet")


def find_files(patterns: Sequence[str], hint: str | None = None) -> list[Path]:
    """The files that `patterns` (paths, folders, globs) name, in the order given, folders and globs sorted.

    Raises `DataError` for a pattern that names nothing, with `hint`, and for a file of a kind that is not read.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file))
            if not found:
                raise DataError(f"no training text in the folder {pattern}", field="data", hint=_SUFFIX_HINT)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            if not found:
                raise DataError(f"no such file, folder or glob: {pattern}", field="data", hint=hint)
        for file in found:
            if not _suffix(file):
                raise DataError(f"{file} is not a kind of file that can be read", field="data", hint=_SUFFIX_HINT)
        files += found
    return list(dict.fromkeys(files))


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
    else:
        documents = _json_lines(path, text_field)
    empty = True
    for text in documents:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise DataError(f"{path} holds no text", field="data", hint="take it out of the data, or fill it")


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
    return DataError(f"{path}, line {line}: a NUL character: this looks like binary data, not text", field="data")


def _text_file(path: Path) -> Iterator[str]:
    yield decode_utf8(_read_bytes(path), path).replace("\r\n", "\n")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a `.jsonl` or `.jsonl.bz2` file, split on `\\n` alone: texts may hold U+2028 and U+0085."""
    try:
        with bz2.open(path, "rb") if path.name.lower().endswith(".bz2") else path.open("rb") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}", field="data", hint="copy or download it again") from None


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = parse_json(decode_utf8(line, path, number), path, number)
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            names = ", ".join(row) if isinstance(row, dict) else "no fields"
            raise DataError(
                f"{path}, line {number}: no text in the field {text_field!r}",
                field="text_field",
                hint=f"the line has: {names}; choose one with --text-field",
            )
        if "\0" in text:
            raise _binary(path, number)
        if b"\\ud" in line.lower() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{path}, line {number}: half of a character (a lone surrogate)", field="data")
        yield text


def parse_json(text: str, path: Path, line: int) -> object:
    """One line's JSON value; `DataError` names the line."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}, line {line}: not valid JSON ({error})", field="data") from None


def _parquet_file(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if text_field not in names:
            raise DataError(
                f"{path} has no column {text_field!r}",
                field="text_field",
                hint=f"it has: {', '.join(names)}; choose one with --text-field",
            )
        row = 0
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise DataError(f"{path}, row {row}: no text in the column {text_field!r}", field="data")
                if "\0" in text:
                    raise _binary(path, row)
                yield text
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}", field="data") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", field="data") from None
