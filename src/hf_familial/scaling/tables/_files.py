"""Readers of files with training runs: CSV, JSON lines, JSON and parquet."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import TableError
from .._cells import Marks, marks_of
from ._csv import Grid, columns_of_grid
from ._names import is_variable


KINDS = "Save the runs as CSV, JSON lines or parquet"
SHOWN = 8  # number of lines or names listed before "and 12 more"

# first bytes, name, and function to decompress
COMPRESSED: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
)
# first bytes of other file types, and what to do with such a file
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\xd0\xcf\x11\xe0", "an Excel workbook. Save the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd. Decompress it first (`zstd -d`)"),
    (b"ARROW1", "an Arrow file. Save it as parquet or CSV"),
    (b"SQLite format 3", "a database. Export the table as CSV"),
    (b"\x93NUMPY", "a numpy array without column names. Save it as CSV with a line of names"),
    (b"%PDF", "a PDF. Copy its table into a CSV file"),
)
PAGES = ("<!doctype", "<html", "<table", "<?xml")


@dataclass(frozen=True)
class Table:
    """The rows of a file, by column."""

    source: str
    columns: Mapping[str, Sequence[Any]]  # one value per row, `None` where it is missing
    lines: tuple[int, ...]  # line (or item) number of each row, from 1
    notes: tuple[str, ...] = ()  # sentences on lines that were left out
    written: Mapping[str, Sequence[str]] = field(default_factory=dict)  # cells as text, by column

    def __len__(self) -> int:
        return len(self.lines)

    def labels(self, name: str) -> Sequence[Any]:
        """Return the unconverted cells of a column. As names, `1e5` and `100000` differ."""
        return self.written.get(name, self.columns[name])

    @cached_property
    def marks(self) -> Marks:
        """The decimal mark of the cells, `""` if they do not show it."""
        return marks_of(
            cell
            for column in self.columns.values()
            for cell in column
            if type(cell) is str and ("," in cell or cell.count(".") > 1)
        )


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a file of runs. Its content decides the format, not its name.

    Lines that are not rows, for example cut off by a crash, are left out and named in `notes`.
    `TableError` is raised if the file is empty or binary, or has no column names or rows.
    """
    source, content = str(path), _content(path)
    if content[:4] == b"PAR1":
        return _parquet(source, content)
    text, note = _text(source, content)
    start = text.lstrip()[:1]
    if not start:
        raise TableError(f"{source} is empty.")
    read = {"[": _json_list, "{": _json_lines}.get(start, _csv)
    table = read(source, text)
    notes = tuple(filter(None, (note, *table.notes)))
    return Table(source, table.columns, table.lines, notes, table.written)


def some(items: Iterable[Any], shown: int = SHOWN) -> str:
    """Return a list of items as text, such as `"1, 2, 3 and 12 more"`."""
    words = [str(item) for item in items]
    more = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {more} more" if more > 0 else "")


def left_out(numbers: Sequence[int], reason: str, unit: str = "line") -> str:
    """Return a sentence that names the lines left out and the reason, `""` for no lines."""
    if not numbers:
        return ""
    verb = "s %s were" if len(numbers) > 1 else " %s was"
    return f"{unit.capitalize()}{verb % some(numbers)} left out: {reason}."


def _content(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file, decompressed."""
    content = Path(path).read_bytes()
    for magic, name, undo in COMPRESSED:
        if content.startswith(magic):
            try:
                content = undo(content)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
                raise TableError(f"{path} is a damaged or incomplete {name} file.") from None
            break
    if content.startswith(b"PK\x03\x04"):
        content = _unzipped(str(path), content)
    for magic, words in OTHERS:
        if content.startswith(magic):
            raise TableError(f"{path} is {words}.")
    return content


def _unzipped(source: str, content: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if any(name.startswith("xl/") for name in names):
                raise TableError(f"{source} is an Excel workbook. Save the sheet as CSV.")
            if len(names) != 1:
                raise TableError(
                    f"{source} is a zip of {len(names)} files. Unzip it and pass one of them."
                )
            return archive.read(names[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError):
        raise TableError(f"{source} is a zip file that cannot be opened. Unzip it first.") from None


def _text(source: str, content: bytes) -> tuple[str, str]:
    """Decode bytes to text. Also return a note if the encoding is not UTF-8."""
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    text, note = "\0", ""
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        note = "" if encoding == "utf-8-sig" else f"The file was read as {encoding}, not UTF-8."
        break
    if "\0" in text:
        raise TableError(f"{source} is a binary file. {KINDS}.")
    if text.lstrip()[:9].lower().startswith(PAGES):
        raise TableError(f"{source} is a web page. {KINDS}.")
    return text, note


def _csv(source: str, text: str) -> Table:
    grid = Grid(source, text)
    wrong = left_out(grid.bad, grid.why_bad())
    if not grid.rows:
        raise TableError(f"{source} has no rows. {wrong}".rstrip())
    columns, written = columns_of_grid(source, grid)
    notes = tuple(filter(None, (*grid.notes, wrong)))
    return Table(source, columns, tuple(grid.lines), notes, written)


def _parquet(source: str, content: bytes) -> Table:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise TableError(
            f"{source} is a parquet file, which needs pyarrow. Run `pip install pyarrow`."
        ) from None
    try:
        table = parquet.read_table(BufferReader(content))
    except (ArrowException, OSError) as error:
        raise TableError(f"{source} is a damaged parquet file: {error}".splitlines()[0]) from None
    if not table.num_rows:
        raise TableError(f"{source} has no rows.")
    lines = tuple(range(1, table.num_rows + 1))
    return Table(source, _flat(dict(table.to_pydict())), lines)


def _json_lines(source: str, text: str) -> Table:
    numbered = enumerate(text.split("\n"), start=1)
    items = [(number, _json(line)) for number, line in numbered if line.strip()]
    rows = sum(isinstance(item, dict) for _, item in items)
    value = _json(text) if rows < 2 else None
    if isinstance(value, dict):
        unfolded = _unfolded(value)
        if unfolded is not None:
            return _of_items(source, enumerate(unfolded, start=1), "expected an object", "item")
        if not rows:
            raise TableError(
                f"{source} is one JSON object with {some(value)}. Write one object per line and "
                "run, or a list of objects."
            )
    return _of_items(source, items, "expected one JSON object")


def _json_list(source: str, text: str) -> Table:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if deep else error
        raise TableError(f"{source} is not JSON: {reason}.") from None
    if items and all(isinstance(item, list) for item in items):
        names, *cells = items
        if not names or not all(isinstance(name, str) for name in names):
            raise TableError(
                f"{source} has lists without names. Write objects, or put the column names in the "
                "first list."
            )
        items = [dict(zip(names, row, strict=False)) for row in cells]
    return _of_items(source, enumerate(items, start=1), "expected an object", "item")


def _json(text: str) -> Any:
    """Parse JSON, and return `None` if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_items(
    source: str, items: Iterable[tuple[int, Any]], reason: str, unit: str = "line"
) -> Table:
    """Build a table from objects. Its columns are in order of first appearance."""
    numbered = list(items)
    rows = [(number, item) for number, item in numbered if isinstance(item, dict)]
    bad = [number for number, item in numbered if not isinstance(item, dict)]
    wrong = left_out(bad, reason, unit)
    if not rows:
        raise TableError(f"{source} has no rows. {wrong}".rstrip())
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = {str(name): [row.get(name) for _, row in rows] for name in names}
    lines = tuple(number for number, _ in rows)
    return Table(source, _flat(columns), lines, (wrong,) if wrong else ())


def _flat(columns: dict[str, Any], depth: int = 3) -> dict[str, Any]:
    """Replace columns of objects by one column per key, such as `config.n_params`."""
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


def _unfolded(value: Mapping[str, Any]) -> list[Any] | None:
    """Return the rows of a JSON object that contains a table, `None` if it does not.

    The table can be written by column (`DataFrame.to_json()`, or lists) or by row
    (`orient="index"`). It can be names and rows (`"split"`), or `data` next to a schema
    (`"table"`). It can also be the only list of objects in the JSON object.
    """
    names, data, parts = value.get("columns"), value.get("data"), list(value.values())
    lists = [part for part in parts if isinstance(part, list)]
    if isinstance(names, list) and isinstance(data, list):
        if all(isinstance(row, list) for row in data):
            return [dict(zip(map(str, names), row, strict=False)) for row in data]
    if len(parts) > 1 and len(lists) == len(parts) and len(set(map(len, lists))) == 1 and lists[0]:
        return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    of_objects = [part for part in lists if any(isinstance(item, dict) for item in part)]
    if len(of_objects) == 1:
        return list(of_objects[0])
    if parts and all(isinstance(part, dict) and part for part in parts):
        return _of_objects(value)
    return None


def _of_objects(value: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Return the rows of an object of objects. Its keys are columns or rows."""
    keys = dict.fromkeys(key for part in value.values() for key in part)
    inner, outer = (all(key.lstrip("-").isdigit() for key in names) for names in (keys, value))
    # the outer keys are columns if more of them than of the inner keys are names of variables
    named = len(value) > 1 and sum(map(is_variable, value)) > sum(map(is_variable, keys))
    nested = any(isinstance(v, dict) for part in value.values() for v in part.values())
    if inner or named and not outer and not nested:
        return [{name: part.get(key) for name, part in value.items()} for key in keys]
    return [dict(part) if outer else {"name": key, **part} for key, part in value.items()]
