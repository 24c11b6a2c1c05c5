"""Read a table of training runs from a file: CSV, JSON lines, a JSON list or parquet."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


DELIMITERS = ",\t;|"
SHOWN = 8  # lines or names listed before "and 12 more"


class TableError(ValueError):
    """A file or its columns cannot be read as a table of runs."""


@dataclass(frozen=True)
class Table:
    """Rows of a file, by column, as the file has them.

    Attributes:
        source (`str`): Where it was read from.
        columns (`dict[str, list]`): One value per row; `None` where a row has none.
        lines (`tuple[int, ...]`): Where each row stands in the file, from 1.
        notes (`tuple[str, ...]`): What was left out in reading, and why.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    lines: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a file of runs; its bytes say which kind it is, not its name.

    Lines that are no rows (cut off by a crash, of a wrong number of cells) are left out and named
    in `notes`; nothing else is judged here.

    Args:
        path (`str` or `os.PathLike`): CSV (cells parted by `,`, tab, `;` or `|`, names in the first
            line), JSON lines, a JSON list of objects, or parquet.

    Returns:
        [`Table`]: With at least one row.

    Raises:
        OSError: If the file cannot be read.
        TableError: If it is empty, binary, without names, or has no row.
    """
    source, content = str(path), Path(path).read_bytes()
    if content[:4] == b"PAR1":
        return _parquet(source, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise TableError(f"{source} is binary; runs come as CSV, JSON lines or parquet.")
    start = text.lstrip()[:1]
    if not start:
        raise TableError(f"{source} is empty.")
    if start == "[":
        return _json_list(source, text)
    return _json_lines(source, text) if start == "{" else _csv(source, text)


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
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(source, columns, tuple(lines), (wrong,) if wrong else ())


def _json_lines(source: str, text: str) -> Table:
    rows, lines, bad = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
            lines.append(number)
        else:
            bad.append(number)
    if not rows:
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None
        if isinstance(whole, dict):
            raise TableError(
                f"{source} is one JSON object with {some(whole)}; runs come one object per line."
            )
    return _of_rows(source, rows, lines, left_out(bad, "not one JSON object"))


def _json_list(source: str, text: str) -> Table:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{source} is not JSON: {error}.") from None
    good = [i for i, item in enumerate(items, start=1) if isinstance(item, dict)]
    bad = sorted(set(range(1, len(items) + 1)) - set(good))
    rows = [items[i - 1] for i in good]
    return _of_rows(source, rows, good, left_out(bad, "not an object", "item"))


def _csv(source: str, text: str) -> Table:
    names: list[str] = []
    rows, lines, bad = [], [], []
    delimiter = ","
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if not names:
            counts = Counter(line)
            delimiter = max(DELIMITERS, key=lambda mark: counts[mark])
            names = _header(source, _split(line, delimiter))
            continue
        # each line alone: a quote left open must not swallow the rest of the file
        cells = _split(line, delimiter)
        if len(cells) == len(names):
            rows.append(dict(zip(names, map(_cell, cells), strict=True)))
            lines.append(number)
        else:
            bad.append(number)
    return _of_rows(source, rows, lines, left_out(bad, f"not {len(names)} cells"))


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return []


def _header(source: str, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if all(isinstance(_cell(name), float) for name in names):
        raise TableError(f"{source} has no names in its first line, got {some(names)}.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise TableError(f"{source} names a column twice: {some(twice)}.")
    return names


def _cell(cell: str) -> Any:
    """A number where the cell is one, a list where it is one of JSON, otherwise its text."""
    cell = cell.strip()
    if not cell:
        return None
    try:
        return float(cell)
    except ValueError:
        pass
    if cell[0] == "[":
        try:
            return json.loads(cell)
        except ValueError:
            pass
    return cell


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
    return Table(source, dict(table.to_pydict()), lines)


__all__ = ["Table", "TableError", "left_out", "read_table", "some"]
