"""Reads the files of training data: texts, lines of JSON, tables, columns, plain or compressed, in UTF-8 or, where its
mark says so, in UTF-16."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from topkapi.model.errors import DataError
from topkapi.model.user_files import LONGEST_DOCUMENT, LONGEST_TEXT, read_stream, too_long
from topkapi.training.data.finding import LINES, PLAIN, TABLES, TEXTS

_AGAIN, _REPAIR = "copy or download it again", "repair the row, or take it out"
_SPLIT_UP = "split it, or give its documents as the lines of a .jsonl file"


def read_documents(path: Path, text_field: str = "text", beside: set[str] | None = None) -> Iterator[str]:
    """The documents of one file; blank ones are left out.

    A text file is one document with line ends as `\\n`. The others hold one per row, in `text_field`; the names of
    what else their rows hold are added to `beside`.
    Raises `DataError` naming the file and line for invalid UTF-8, NUL characters, broken JSON, a missing field,
    and for a file without any text.
    """
    ending = TEXTS.of(path)
    if ending in PLAIN:
        documents = _text_file(path)
    elif ending in LINES:
        documents = _json_lines(path, text_field, beside)
    else:
        if beside is not None:
            beside |= fields_beside(path, text_field)
        documents = _cells(path, text_field, read_columns(path, text_field))
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

    ending = TEXTS.of(path)
    names: Iterable[str] = ()
    try:
        if ending == ".parquet":
            names = pyarrow.parquet.read_schema(path).names
        elif ending == ".arrow":
            with pyarrow.memory_map(str(path)) as source:
                indexed = source.read(6) == b"ARROW1"
                source.seek(0)
                names = (pyarrow.ipc.open_file(source) if indexed else pyarrow.ipc.open_stream(source)).schema.names
        elif ending in TABLES:
            names = next(read_table(path), (0, {}))[1]
        elif ending in LINES:
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


def encoding_of(start: bytes) -> str:
    """The encoding that a file's first bytes tell by their mark, else UTF-8."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_utf8(data: bytes, path: Path, line: int = 1) -> str:
    """`data`, which starts at line `line` of `path`, as text; `DataError` names the line at fault.

    A file whose mark says that it is in UTF-16 or UTF-32 is read so.
    """
    encoding = encoding_of(data[:4]) if line == 1 else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding in ("utf-16", "utf-32"):
            raise _invalid(path, encoding, error) from None
        at = line + data[: error.start].count(b"\n")
        raise DataError(
            f"{path}, line {at}: invalid UTF-8 (byte 0x{data[error.start]:02x})",
            field="data",
            hint="convert the file to UTF-8, for example: iconv -f latin1 -t utf-8",
        ) from None
    if "\0" in text:
        raise _binary(path, line + text[: text.index("\0")].count("\n"))
    return text


def _invalid(path: Path, encoding: str, error: UnicodeError) -> DataError:
    name = {"utf-16": "UTF-16", "utf-32": "UTF-32"}.get(encoding, "UTF-8")
    reason = error.reason if isinstance(error, UnicodeDecodeError) else error
    return DataError(f"{path}: invalid {name} ({reason})", field="data", hint=_AGAIN)


def _binary(path: Path, number: int, unit: str = "line") -> DataError:
    return DataError(
        f"{path}, {unit} {number}: a NUL character: this looks like binary data, not text",
        field="data",
        hint="leave the file out; if it is text in UTF-16, convert it: iconv -f utf-16 -t utf-8",
    )


def _text_file(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            content = read_stream(file, str(path), LONGEST_DOCUMENT, field="data", hint=_SPLIT_UP)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", field="data", hint=_AGAIN) from None
    yield decode_utf8(content, path).replace("\r\n", "\n")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file of JSON lines in UTF-8, split on `\\n` alone: texts may hold U+2028 and U+0085."""
    encoding = "utf-8-sig"
    try:
        with _open(path) as file:
            encoding = encoding_of(file.peek(4)[:4])
            lines: Iterator[bytes] = iter(lambda: file.readline(LONGEST_TEXT + 1), b"")
            if encoding != "utf-8-sig":
                text = io.TextIOWrapper(file, encoding, newline="\n")
                lines = (line.encode() for line in iter(lambda: text.readline(LONGEST_TEXT + 1), ""))
            for number, line in enumerate(lines, start=1):
                if len(line) > LONGEST_TEXT:
                    raise too_long(f"{path}, line {number}", LONGEST_TEXT, field="data", hint=_REPAIR)
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", field="data", hint=_AGAIN) from None
    except UnicodeError as error:
        raise _invalid(path, encoding, error) from None


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table in CSV or, where its name says so, separated by tabs, each by the names in the first row and
    with the number of the line that it ends in; before them, as row 0, the names themselves, each for itself.

    Raises `DataError` naming the line for rows of another length, and for names that are missing or said twice.
    """
    encoding = "utf-8-sig"
    csv.field_size_limit(LONGEST_TEXT)
    try:
        with _open(path) as file:
            encoding = encoding_of(file.peek(4)[:4])
            text = io.TextIOWrapper(file, encoding, newline="")
            rows = csv.reader(text, delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
            names = next(rows, [])
            if len(set(names)) < len(names) or not all(name.strip() for name in names):
                raise DataError(
                    f"{path}, line 1: the names of columns must all be there and be different, and are "
                    f"{', '.join(names)}",
                    field="data",
                    hint="the first line of a table names its columns",
                )
            yield 0, {name: name for name in names}
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"{path}, line {rows.line_num}: {len(row)} cells where the first line names {len(names)} "
                        "columns",
                        field="data",
                        hint="put a cell that holds the separator in double quotes",
                    )
                if any("\0" in cell for cell in row):
                    raise _binary(path, rows.line_num)
                yield rows.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: no valid CSV ({error})", field="data", hint=_REPAIR) from None
    except UnicodeError as error:
        raise _invalid(path, encoding, error) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", field="data", hint=_AGAIN) from None


def _open(path: Path) -> Any:
    """A file that can be looked at ahead, decompressed as it is read."""
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


def _json_lines(path: Path, text_field: str, beside: set[str] | None) -> Iterator[str]:
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
        if beside is not None and isinstance(row, dict):
            beside |= row.keys() - {text_field}
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


def read_columns(path: Path, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, an Arrow file as `datasets` stores it (a stream, or the format with an index) or a
    table, each with its place: of one `column` the values, else objects of all.

    Raises `DataError` for a file that cannot be read, or has no such column.
    """
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    ending = TEXTS.of(path)
    if ending in TABLES:
        rows = read_table(path)
        _check_column(path, column, list(next(rows, (0, {}))[1]))
        yield from ((f"{path}, line {line}", row if column is None else row[column]) for line, row in rows)
        return
    wanted = None if column is None else [column]
    kind = "Parquet" if ending == ".parquet" else "Arrow"
    try:
        if ending == ".parquet":
            parquet = pyarrow.parquet.ParquetFile(path)
            _check_column(path, column, parquet.schema_arrow.names)
            yield from _values(path, column, parquet.iter_batches(columns=wanted))
            return
        with pyarrow.memory_map(str(path)) as source:
            indexed = source.read(6) == b"ARROW1"
            source.seek(0)
            file = pyarrow.ipc.open_file(source) if indexed else pyarrow.ipc.open_stream(source)
            _check_column(path, column, file.schema.names)
            batches = (file.get_batch(at) for at in range(file.num_record_batches)) if indexed else file
            yield from _values(path, column, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}", field="data", hint=_AGAIN) from None


def _values(path: Path, column: str | None, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for value in (batch if column is None else batch.column(column)).to_pylist():
            number += 1
            yield f"{path}, row {number}", value


def _check_column(path: Path, column: str | None, names: Sequence[str]) -> None:
    if column is not None and column not in names:
        raise DataError(
            f"{path} has no column {column!r}",
            field="text_field",
            hint=f"it has: {', '.join(names)}; choose one with --text-field",
        )


def _cells(path: Path, column: str, rows: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for place, text in rows:
        if not isinstance(text, str):
            raise DataError(f"{place}: no text in the column {column!r}", field="data", hint=_REPAIR)
        if "\0" in text:
            raise _binary(path, int(place.rpartition(" ")[2]), "row")
        yield text
