"""The rows of instructions and preferences in files of every kind, each with its place, under the names used here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from topkapi.model.errors import DataError
from topkapi.model.user_files import LONGEST_DOCUMENT, read_file
from topkapi.training.data.finding import EXAMPLES, LINES, TABLES
from topkapi.training.data.rows import FORMATS
from topkapi.training.data.sources import decode_utf8, parse_json, read_columns, read_lines
from topkapi.training.data.weights import name_and_meaning

_AS_LINES = "give its rows as the lines of a .jsonl file"
_IN_MESSAGES = "messages[]."
# What a table says in words and other files as what it is.
_TYPED = ("label", "weight")


def read_rows(path: Path, formats: str = FORMATS) -> Iterator[tuple[str, object]]:
    """The rows of a `.json` list, JSON lines, a table, a Parquet or an Arrow file, each with its place for messages.

    `formats` says what the rows are, as a hint. Raises `DataError` naming the row (from 1) or line.
    """
    ending = EXAMPLES.of(path)
    if ending is None:
        raise EXAMPLES.error(path)
    if ending in LINES:
        for number, line in read_lines(path):
            if line.strip():
                yield f"{path}, line {number}", parse_json(decode_utf8(line, path, number), path, number)
    elif ending in TABLES:
        for place, row in read_columns(path):
            yield place, row | {name: _typed(row[name]) for name in _TYPED if name in row}
    elif ending != ".json":
        # A column of objects has every field that one of them has, so what is null was never said.
        yield from ((place, _said(row)) for place, row in read_columns(path))
    else:
        try:
            content = json.loads(decode_utf8(read_file(path, LONGEST_DOCUMENT, field="data", hint=_AS_LINES), path))
        except (ValueError, RecursionError) as error:
            hint = "a file with one JSON value per line is called .jsonl" if "Extra data" in str(error) else None
            raise DataError(
                f"{path} is not valid JSON ({error})", field="data", hint=hint or "repair it, or copy it again"
            ) from None
        if not isinstance(content, list):
            raise DataError(f"{path} must hold a list of examples", field="data", hint=formats)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(content, start=1))


def _typed(cell: str) -> object:
    try:
        value = json.loads(cell.strip().lower())
    except ValueError:
        return cell
    return value if isinstance(value, bool | int | float) else cell


def _said(value: Any) -> Any:
    """A value without what is null in its objects."""
    if isinstance(value, dict):
        return {name: _said(each) for name, each in value.items() if each is not None}
    return [_said(each) for each in value] if isinstance(value, list) else value


class Names:
    """What fields of rows are called elsewhere, and here: `["Question=prompt", "messages[].speaker=role"]`."""

    def __init__(self, entries: Sequence[str]) -> None:
        pairs = [name_and_meaning(entry) for entry in entries]
        inner = [(name.removeprefix(_IN_MESSAGES), here) for name, here in pairs if name.startswith(_IN_MESSAGES)]
        self._fields = {name: here for name, here in pairs if not name.startswith(_IN_MESSAGES)}
        self._of_messages = dict(inner)
        self._unseen = {name for name, _ in pairs}

    def applied(self, row: object, origin: str) -> object:
        """The row under the names used here. Raises `DataError` where a field has that name already."""
        if not (self._fields or self._of_messages) or not isinstance(row, dict):
            return row
        row = self._renamed(row, self._fields, "", origin)
        if not self._of_messages:
            return row
        return {
            name: [self._renamed(each, self._of_messages, _IN_MESSAGES, origin) for each in value]
            if isinstance(value, list) and all(isinstance(each, dict) for each in value)
            else value
            for name, value in row.items()
        }

    def check(self, what: str) -> None:
        """Raise `DataError` for a name that no row of `what` has."""
        if self._unseen:
            raise DataError(
                f"no row of {what} has the field {min(self._unseen)}", field="map", hint="check its spelling in --map"
            )

    def _renamed(self, row: Mapping[str, Any], names: Mapping[str, str], prefix: str, origin: str) -> dict[str, Any]:
        self._unseen -= {prefix + name for name in names if name in row}
        for name, here in names.items():
            if name in row and here in row and here not in names:
                raise DataError(
                    f"{origin}: {prefix}{name} is to be read as {here}, and there is a field {here}, too",
                    field="map",
                    hint=f"map {here} to another name as well, or leave {name} out of --map",
                )
        return {names.get(name, name): value for name, value in row.items()}
