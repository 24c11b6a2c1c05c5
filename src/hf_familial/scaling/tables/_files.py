"""Read a table of training runs from a file: CSV, JSON lines, a JSON list or parquet."""

from __future__ import annotations

import bz2
import gzip
import io
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
from . import _json as js
from ._csv import Grid, columns_of_grid


KINDS = "runs come as CSV, JSON lines or parquet"

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


def read_content(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file, decompressed if it is compressed."""
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


def as_text(source: str, content: bytes) -> tuple[str, str]:
    """Return the text of some bytes, and a note if its encoding is not UTF-8."""
    text, note = _decoded(content)
    if text is None or "\0" in text:
        raise TableError(f"{source} is binary; {KINDS}.")
    if text.lstrip()[:9].lower().startswith(PAGES):
        raise TableError(f"{source} is a web page; {KINDS}.")
    return text, note


def _decoded(content: bytes) -> tuple[str | None, str]:
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        return text, "" if encoding == "utf-8-sig" else f"Read as {encoding}, not UTF-8."
    return None, ""


SHOWN = 8  # lines or names listed before "and 12 more"


@dataclass(frozen=True)
class Table:
    """Rows of a file, by column, as the file has them."""

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
    """Read a file of runs; its bytes say which kind it is, not its name."""
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
