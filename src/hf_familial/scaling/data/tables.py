"""Read a table of training runs from a file: CSV, JSON lines, a JSON list or parquet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...errors import TableError
from . import json_tables as js
from .cells import Marks, marks_of
from .csv_tables import Grid, columns_of_grid
from .files import as_text, read_content


SHOWN = 8  # lines or names listed before "and 12 more"


@dataclass(frozen=True)
class Table:
    """Rows of a file, by column, as the file has them.

    Attributes:
        source (`str`): Where it was read from.
        columns (`dict[str, list]`): One value per row; `None` where a row has none.
        lines (`tuple[int, ...]`): Where each row stands in the file, from 1.
        notes (`tuple[str, ...]`): What was left out in reading, and why.
        written (`Mapping[str, list[str]]`): Cells of a file of text, as they are written.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    lines: tuple[int, ...]
    notes: tuple[str, ...] = ()
    written: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    def labels(self, name: str) -> Sequence[Any]:
        """Return a column as its file has it: `1e5` and `100000` are two names of runs."""
        return self.written.get(name, self.columns[name])

    @cached_property
    def marks(self) -> Marks:
        """Which mark parts the decimals of the cells, where the cells tell."""
        return marks_of(
            cell
            for column in self.columns.values()
            for cell in column
            if type(cell) is str and ("," in cell or cell.count(".") > 1)
        )


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a file of runs; its bytes say which kind it is, not its name.

    Lines that are no rows (cut off by a crash, of a wrong number of cells) are left out and named
    in `notes`; nothing else is judged here.

    Args:
        path (`str` or `os.PathLike`): CSV (cells parted by `,`, tab, `;`, `|`, `&` or blanks, names
            in the first line), JSON lines, a JSON list of objects, what pandas writes as JSON, or
            parquet; gzip, bzip2, xz and zip are undone.

    Returns:
        [`Table`]: With at least one row.

    Raises:
        OSError: If the file cannot be read.
        TableError: If it is empty, binary, without names, or has no row.
    """
    source, content = str(path), read_content(path)
    if content[:4] == b"PAR1":
        return _parquet(source, content)
    text, note = as_text(source, content)
    start = text.lstrip()[:1]
    if not start:
        raise TableError(f"{source} is empty.")
    if start == "[":
        table = _json_list(source, text)
    else:
        table = _json_lines(source, text) if start == "{" else _csv(source, text)
    notes = tuple(filter(None, (note, *table.notes)))
    return Table(source, table.columns, table.lines, notes, table.written)


def some(items: Iterable[Any], shown: int = SHOWN) -> str:
    """The first few of many, and how many more there are."""
    words = [str(item) for item in items]
    more = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {more} more" if more > 0 else "")


def left_out(numbers: Sequence[int], reason: str, unit: str = "line") -> str:
    """A sentence on what was left out; empty if nothing was."""
    if not numbers:
        return ""
    plural = "s" if len(numbers) > 1 else ""
    return f"Left out {unit}{plural} {some(numbers)}: {reason}."


def _of_rows(source: str, rows: Sequence[Mapping[str, Any]], lines: list[int], wrong: str) -> Table:
    """Rows as columns; names in the order in which they first appear."""
    if not rows:
        raise TableError(f"{source} holds no row. {wrong}".rstrip())
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {str(name): [row.get(name) for row in rows] for name in names}
    return Table(source, _flat(columns), tuple(lines), (wrong,) if wrong else ())


def _flat(columns: dict[str, Any], depth: int = 3) -> dict[str, Any]:
    """Columns with those of their objects in the place of these, as `config.n_params`."""
    found: dict[str, Any] = {}
    for name, cells in columns.items():
        if not depth or name == "backbone" or dict not in set(map(type, cells)):
            found[name] = cells
            continue
        objects = [cell if isinstance(cell, dict) else {} for cell in cells]
        keys = dict.fromkeys(key for cell in objects for key in cell)
        if not all(cell is None or isinstance(cell, dict) for cell in cells):
            found[name] = cells
        found |= _flat({f"{name}.{key}": [o.get(key) for o in objects] for key in keys}, depth - 1)
    return found


def _json_lines(source: str, text: str) -> Table:
    (rows, lines), bad = js.lines_of(text)
    if len(rows) < 2:
        value = js.whole(text)
        if isinstance(value, dict):
            items = js.unfolded(value)
            if items is not None:
                (rows, lines), bad = js.objects_of(items)
                return _of_rows(source, rows, lines, left_out(bad, "not an object", "item"))
            if not rows:
                raise js.missing_table(source, value, some(value))
    return _of_rows(source, rows, lines, left_out(bad, "not one JSON object"))


def _json_list(source: str, text: str) -> Table:
    try:
        items = js.parse(text)
    except ValueError as error:
        raise TableError(f"{source} is not JSON: {error}.") from None
    if items and all(isinstance(item, list) for item in items):
        names, *cells = items
        if not names or not all(isinstance(name, str) for name in names):
            raise TableError(f"{source} is lists without names; write objects, or names first.")
        items = [dict(zip(names, row, strict=False)) for row in cells]
    (rows, good), bad = js.objects_of(items)
    return _of_rows(source, rows, good, left_out(bad, "not an object", "item"))


def _csv(source: str, text: str) -> Table:
    grid = Grid(source, text)
    wrong = left_out(grid.bad, grid.why_bad())
    if not grid.rows:
        raise TableError(f"{source} holds no row. {wrong}".rstrip())
    columns, written = columns_of_grid(source, grid)
    notes = tuple(filter(None, (*grid.notes, wrong)))
    return Table(source, columns, tuple(grid.lines), notes, written)


def _parquet(source: str, content: bytes) -> Table:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise TableError(f"{source} is parquet, which takes `pip install pyarrow`.") from None
    try:
        table = parquet.read_table(BufferReader(content))
    except (ArrowException, OSError) as error:
        raise TableError(f"{source} is broken parquet: {error}".splitlines()[0]) from None
    if not table.num_rows:
        raise TableError(f"{source} holds no row.")
    lines = tuple(range(1, table.num_rows + 1))
    return Table(source, _flat(dict(table.to_pydict())), lines)


__all__ = ["Table", "TableError", "left_out", "read_table", "some"]
