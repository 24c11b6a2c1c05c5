"""Read a table of training runs from a file: CSV, JSON lines, a JSON list or parquet."""

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


KINDS = "runs come as CSV, JSON lines or parquet"
SHOWN = 8  # lines or names listed before "and 12 more"

# first bytes -> name, and what undoes it
COMPRESSED: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
)
# first bytes of files that hold tables which this room does not read, and what to do instead
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\xd0\xcf\x11\xe0", "an Excel workbook: save the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: decompress it first (`zstd -d`)"),
    (b"ARROW1", "an Arrow file: save it as parquet or CSV"),
    (b"SQLite format 3", "a database: export the table as CSV"),
    (b"\x93NUMPY", "an array of numpy, without names: save it as CSV with a line of names"),
    (b"%PDF", "a PDF: copy its table into a CSV file"),
)
PAGES = ("<!doctype", "<html", "<table", "<?xml")


@dataclass(frozen=True)
class Table:
    """Rows of a file, by column, as the file has them."""

    source: str
    columns: Mapping[str, Sequence[Any]]  # one value per row; `None` where a row has none
    lines: tuple[int, ...]  # where each row is in the file, from 1
    notes: tuple[str, ...] = ()  # what was left out in reading, and why
    written: Mapping[str, Sequence[str]] = field(default_factory=dict)  # cells of a file of text

    def __len__(self) -> int:
        return len(self.lines)

    def labels(self, name: str) -> Sequence[Any]:
        """Return a column as its file has it: `1e5` and `100000` are two names of runs."""
        return self.written.get(name, self.columns[name])

    @cached_property
    def marks(self) -> Marks:
        """The mark that parts the decimals of the cells, where the cells tell."""
        return marks_of(
            cell
            for column in self.columns.values()
            for cell in column
            if type(cell) is str and ("," in cell or cell.count(".") > 1)
        )


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a file of runs; its bytes say which kind it is, not its name.

    Lines that are no rows (cut off by a crash, of a wrong number of cells) are left out and named
    in `notes`; nothing else is judged here. `TableError` is raised if the file is empty, binary,
    without names, or has no row.
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
    """Return the first few of many, and how many more there are."""
    words = [str(item) for item in items]
    more = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {more} more" if more > 0 else "")


def left_out(numbers: Sequence[int], reason: str, unit: str = "line") -> str:
    """Return a sentence on what was left out; empty if nothing was."""
    if not numbers:
        return ""
    plural = "s" if len(numbers) > 1 else ""
    return f"Left out {unit}{plural} {some(numbers)}: {reason}."


def _content(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file, decompressed."""
    content = Path(path).read_bytes()
    for magic, name, undo in COMPRESSED:
        if content.startswith(magic):
            try:
                content = undo(content)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
                raise TableError(f"{path} is broken {name}, or was cut off.") from None
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
                raise TableError(f"{source} is an Excel workbook: save the sheet as CSV.")
            if len(names) != 1:
                raise TableError(f"{source} is a zip of {len(names)} files: unzip it, name one.")
            return archive.read(names[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError):
        raise TableError(f"{source} is a zip file that cannot be opened: unzip it.") from None


def _text(source: str, content: bytes) -> tuple[str, str]:
    """Return the text of some bytes, and a note if its encoding is not UTF-8."""
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    text, note = "\0", ""
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        note = "" if encoding == "utf-8-sig" else f"Read as {encoding}, not UTF-8."
        break
    if "\0" in text:
        raise TableError(f"{source} is binary; {KINDS}.")
    if text.lstrip()[:9].lower().startswith(PAGES):
        raise TableError(f"{source} is a web page; {KINDS}.")
    return text, note


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


def _json_lines(source: str, text: str) -> Table:
    numbered = enumerate(text.split("\n"), start=1)
    items = [(number, _json(line)) for number, line in numbered if line.strip()]
    rows = sum(isinstance(item, dict) for _, item in items)
    value = _json(text) if rows < 2 else None
    if isinstance(value, dict):
        unfolded = _unfolded(value)
        if unfolded is not None:
            return _of_items(source, enumerate(unfolded, start=1), "not an object", "item")
        if not rows:
            raise TableError(
                f"{source} is one JSON object with {some(value)}; runs come one object per line, "
                "or as a list of objects."
            )
    return _of_items(source, items, "not one JSON object")


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
            raise TableError(f"{source} is lists without names; write objects, or names first.")
        items = [dict(zip(names, row, strict=False)) for row in cells]
    return _of_items(source, enumerate(items, start=1), "not an object", "item")


def _json(text: str) -> Any:
    """Return the value of a text of JSON, `None` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_items(
    source: str, items: Iterable[tuple[int, Any]], reason: str, unit: str = "line"
) -> Table:
    """Return objects as columns, named in the order in which they first appear."""
    numbered = list(items)
    rows = [(number, item) for number, item in numbered if isinstance(item, dict)]
    bad = [number for number, item in numbered if not isinstance(item, dict)]
    wrong = left_out(bad, reason, unit)
    if not rows:
        raise TableError(f"{source} holds no row. {wrong}".rstrip())
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = {str(name): [row.get(name) for _, row in rows] for name in names}
    lines = tuple(number for number, _ in rows)
    return Table(source, _flat(columns), lines, (wrong,) if wrong else ())


def _flat(columns: dict[str, Any], depth: int = 3) -> dict[str, Any]:
    """Put columns of objects in the place of the objects, as `config.n_params`."""
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
    """Return the rows of an object that holds a table; `None` if it holds none.

    By column (`DataFrame.to_json()`, or lists), by row (`orient="index"`), as names and rows
    (`"split"`), as `data` beside a schema (`"table"`), or as the only list of objects in it.
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
    """Return rows by column if the inner keys number rows, else one object per row."""
    keys = dict.fromkeys(key for part in value.values() for key in part)
    inner, outer = (all(key.lstrip("-").isdigit() for key in names) for names in (keys, value))
    # the values of one part are of one kind: a column's are, a row's rarely
    named = len(value) > 1 and sum(map(is_variable, value)) > sum(map(is_variable, keys))
    nested = any(isinstance(v, dict) for part in value.values() for v in part.values())
    if inner or named and not outer and not nested:
        return [{name: part.get(key) for name, part in value.items()} for key in keys]
    return [dict(part) if outer else {"name": key, **part} for key, part in value.items()]
