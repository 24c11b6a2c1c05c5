"""Reader of text tables: CSV with any common delimiter, and tables copied from papers."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...errors import TableError
from .._cells import is_missing, number_of


DELIMITERS = ",\t;|&"
BLANK = " "  # one or more blanks, used if no line has another delimiter
LOOKED_AT = 20  # number of lines used to find the delimiter
LONGEST = 50  # largest number of lines in one quoted cell
RULES = re.compile(r"[|+:\-=\s]+|\\(?:hline|(?:top|mid|bottom)rule|begin\{.*|end\{.*)[\s\\]*")


class Grid:
    """A text table, split into column names and cells."""

    def __init__(self, source: str, text: str) -> None:
        self.names: list[str] = []
        self.rows: list[list[str]] = []
        self.lines: list[int] = []
        self.bad: list[int] = []
        self.notes: list[str] = []
        self.counts: Counter[int] = Counter()
        told, lines = _numbered(text)
        self.delimiter = told or _delimiter([line for _, line in lines])
        self.options: dict[str, Any] = {
            "delimiter": self.delimiter,
            "strict": True,
            "skipinitialspace": True,
        }
        start = self._skip_titles(lines)
        if start == len(lines):
            raise TableError(f"{source} has no rows.")
        self.names = _header(source, self.split(lines[start][1].lstrip("#% ")))
        self._read(lines[start + 1 :])

    def split(self, line: str) -> list[str]:
        """Return the cells of a line, or no cells if a quote is not closed."""
        if self.delimiter == BLANK:
            return line.split()
        if self.delimiter in "|&":
            line = line.strip().removesuffix(r"\\").strip()
            if self.delimiter == "|" and line.startswith("|"):
                line = line.removeprefix("|").removesuffix("|")
        if '"' not in line:
            return line.split(self.delimiter)
        try:
            return next(csv.reader([line], **self.options))
        except csv.Error:
            return []

    def _skip_titles(self, lines: Sequence[tuple[int, str]]) -> int:
        """Return the index of the line with the column names, after comments and titles."""
        for place in range(min(len(lines) - 1, LOOKED_AT)):
            number, line = lines[place]
            cells, below = (
                [cell for cell in self.split(text.lstrip("#% ")) if cell.strip()]
                for text in (line, lines[place + 1][1])
            )
            comment = line.startswith(("#", "%")) and len(cells) != len(below)
            if not comment and not (len(cells) == 1 and len(below) > 1):
                return place
            self.notes.append(f"Line {number} was skipped as a title or comment above the names.")
        return 0 if lines else len(lines)

    def _read(self, lines: Sequence[tuple[int, str]]) -> None:
        width, place = len(self.names), 0
        indexed = self.delimiter == BLANK and _is_indexed(lines, width)
        while place < len(lines):
            number, line = lines[place]
            place += 1
            if line.startswith(("#", "\\")) or self.delimiter == "|" and RULES.fullmatch(line):
                continue
            # lines are parsed one by one, so that an open quote does not consume the whole file
            cells = self.split(line)
            if line.count('"') % 2 and (ahead := self._joined(lines, place, width)):
                cells, place = ahead
            cells = cells[1:] if indexed else cells
            while len(cells) > width and not cells[-1].strip():
                cells = cells[:-1]
            self.counts[len(cells)] += 1
            if len(cells) != width:
                self.bad.append(number)
            elif any(cell.strip() for cell in cells):
                self.rows.append(cells)
                self.lines.append(number)

    def _joined(
        self, lines: Sequence[tuple[int, str]], place: int, width: int
    ) -> tuple[list[str], int] | None:
        """Join lines while a quoted cell is open. Return the cells and the next index."""
        text = lines[place - 1][1]
        for end in range(place, min(place + LONGEST, len(lines))):
            text += "\n" + lines[end][1]
            if lines[end][1].count('"') % 2:
                cells = self.split_whole(text)
                return (cells, end + 1) if len(cells) == width else None
        return None

    def split_whole(self, text: str) -> list[str]:
        """Return the cells of a row of several lines, or no cells if it is not one row."""
        try:
            rows = list(csv.reader(text.splitlines(True), **self.options))
        except csv.Error:
            return []
        return rows[0] if len(rows) == 1 else []

    def why_bad(self) -> str:
        """Return the reason why the bad lines were left out."""
        reason = f"expected {len(self.names)} cells"
        if self.bad and not self.rows and self.delimiter == ",":
            reason += (
                f", got {self.counts.most_common(1)[0][0]}. If numbers are written as 2,85 or "
                "1,000,000, put them in quotes or separate the cells with `;`"
            )
        return reason


def _numbered(text: str) -> tuple[str, list[tuple[int, str]]]:
    """Return the delimiter of a `sep=` line of Excel, else `""`, and all other lines with numbers.

    Blank lines are left out.
    """
    lines = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    told = re.fullmatch(r'"?sep=(.)"?', lines[0][1].strip()) if lines else None
    while lines and (lines[0][1].startswith("\\") or RULES.fullmatch(lines[0][1].strip())):
        lines = lines[1:]
    return (told[1], lines[1:]) if told else ("", lines)


def _delimiter(lines: Sequence[str]) -> str:
    """Return the mark that splits most of the first lines into the same number of cells."""
    shown = [line for line in lines[:LOOKED_AT] if not RULES.fullmatch(line.strip())]
    best, score = ",", (0.0, 0)
    for mark in DELIMITERS:
        counts = Counter(line.count(mark) for line in shown)
        number, often = max(counts.items(), key=lambda item: (item[0] > 0, item[1]))
        if number and (often / len(shown), number) > score:
            best, score = mark, (often / len(shown), number)
    if score[1] or not shown:
        head = shown[0] if shown else ""
        # decimal commas can mislead the count, so a single mark in the line of names decides
        marks = [mark for mark in DELIMITERS if mark in head]
        return marks[0] if len(marks) == 1 else best
    wide = Counter(len(line.split()) for line in shown[1:])
    first = len(shown[0].lstrip("# ").split())
    return BLANK if first > 1 and (wide[first] or wide[first + 1]) else ","


def _is_indexed(lines: Sequence[tuple[int, str]], width: int) -> bool:
    """Return whether rows start with a row number without a name, like printed pandas frames."""
    cells = [line.split() for _, line in lines]
    firsts = [row[0] for row in cells if len(row) == width + 1]
    if len(firsts) != len(cells) or not all(word.isdigit() for word in firsts):
        return False
    return [int(word) for word in firsts] == list(
        range(int(firsts[0]), int(firsts[0]) + len(cells))
    )


def _header(source: str, cells: Sequence[str]) -> list[str]:
    names = [cell.strip().strip("*").strip() for cell in cells]
    if all(number_of(name) == number_of(name) for name in names):
        raise TableError(
            f"{source} must have column names in its first line, got {', '.join(names[:8])}. Add a "
            "line of names above it, such as N,D,loss."
        )
    return names


def columns_of_grid(source: str, grid: Grid) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
    """Return the columns of a grid, as values and as unconverted text."""
    texts = [list(column) for column in zip(*grid.rows, strict=True)]
    raw: dict[str, list[str]] = {}
    for name, column in zip(grid.names, texts, strict=True):
        if not name:
            continue  # the row numbers of a frame, or an empty column of a spreadsheet
        if raw.setdefault(name, column) != column:
            raise TableError(f"{source} has two columns with the name {name}. Rename one of them.")
    return {name: values_of(column) for name, column in raw.items()}, raw


def values_of(texts: Sequence[str]) -> list[Any]:
    """Convert cells to numbers or JSON lists where possible. Other cells stay text."""
    try:
        return [float(text) if text else None for text in texts]
    except ValueError:
        return [_value(text.strip()) for text in texts]


def _value(cell: str) -> Any:
    if is_missing(cell):
        return None
    try:
        return float(cell)
    except ValueError:
        pass
    if cell[0] == "[":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return cell
