"""The tables of a simulation: plain text of at most 100 columns, and one JSON object for each row.

- Used by: `report`.
- Invariant: text and JSON come from the same rows, and JSON has the numbers without rounding.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 100
Value = str | float | int | None

FORMATS: Mapping[str, Callable[[Any], str]] = {
    "text": str,
    "count": lambda value: f"{value:,}",
    "seconds": lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}",
    "share": lambda value: f"{value:.0%}",
    "rate": lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}",
    "change": lambda value: f"{value:+.0%}",
}


@dataclass(frozen=True)
class Column:
    """A column: its key in JSON, its title, and the format of its values."""

    key: str
    title: str
    form: str = "text"

    def show(self, value: Value) -> str:
        return "-" if value is None else FORMATS[self.form](value)


@dataclass
class Table:
    """A table of rows by the keys of its columns; `notes` stand below it."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: list[dict[str, Value]] = field(default_factory=list[dict[str, Value]])
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return title, columns and rows. Numbers are aligned to the right; the last column's texts may take lines."""
        cells = [[column.title for column in self.columns]]
        cells += [[column.show(row[column.key]) for column in self.columns] for row in self.rows]
        widths = [max(len(line[place]) for line in cells) for place in range(len(self.columns))]
        lines = [part for line in cells for part in self._lines(line, widths)]
        return "\n".join([self.title, *lines, *(f"  {note}" for note in self.notes)])

    def _lines(self, cells: Sequence[str], widths: Sequence[int]) -> list[str]:
        shown = [
            f"{cell:<{width}}" if column.form == "text" else f"{cell:>{width}}"
            for cell, width, column in zip(cells, widths, self.columns, strict=True)
        ]
        head = "  " + "  ".join(shown[:-1]) + "  "
        if self.columns[-1].form != "text":
            return [head + shown[-1]]
        last = textwrap.wrap(cells[-1], WIDTH - len(head), break_on_hyphens=False) or [""]
        return [f"{head if number == 0 else ' ' * len(head)}{part}".rstrip() for number, part in enumerate(last)]

    def records(self) -> list[str]:
        """Return one JSON object for each row, with the table's name."""
        return [json.dumps({"table": self.name, **row}) for row in self.rows]
