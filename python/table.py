"""Records as a table: a list of dictionaries that shows itself as columns, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import import_module
from typing import Any

MOST_SHOWN = 20
"""Rows that a table shows of itself: the first and the last ones."""


class Table(list[dict[str, Any]]):
    """Rows, each a dictionary. A list in every respect; `columns`, `column` and `to_pandas` read it as a table."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(dict(row) for row in rows)

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in the order in which the rows first have them."""
        return list(dict.fromkeys(name for row in self for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of one column, of the rows that have it. Raises `KeyError` where none has."""
        if name not in self.columns:
            raise KeyError(f"there is no column {name!r}; there are: {', '.join(self.columns)}")
        return [row[name] for row in self if name in row]

    def where(self, name: str) -> Table:
        """The rows that have a value in the column `name`."""
        return Table(row for row in self if row.get(name) is not None)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of the rows; pandas has to be installed."""
        # Nothing here needs it, so it is no dependency: whoever has it may have this.
        return import_module("pandas").DataFrame(list(self), columns=self.columns)

    def __repr__(self) -> str:
        columns = self.columns
        rows = [columns, *([_shown(row.get(name)) for name in columns] for row in self._few())]
        widths = [max(len(row[at]) for row in rows) for at in range(len(columns))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if len(self) > MOST_SHOWN:
            lines.insert(1 + MOST_SHOWN // 2, "…")
        return "\n".join([*lines, f"[{len(self):,} rows]"])

    def _repr_html_(self) -> str:
        columns = self.columns
        rows = [[_shown(row.get(name)) for name in columns] for row in self._few()]
        if len(self) > MOST_SHOWN:
            rows.insert(MOST_SHOWN // 2, ["…"] * len(columns))
        return f"{html_table(columns, rows)}<p>{len(self):,} rows</p>"

    def _few(self) -> Sequence[dict[str, Any]]:
        half = MOST_SHOWN // 2
        return self if len(self) <= MOST_SHOWN else [*self[:half], *self[-half:]]


def html_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells of text as a table for a notebook."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value).replace("\n", "⏎")
    return text if len(text) <= 60 else f"{text[:59]}…"
