"""Take the variables of laws from a table: which rows, which columns, which units."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import TableError
from .._cells import is_missing, marks_of, number_of, numbers_of
from ._files import Table, left_out, some
from ._names import UNITED, Unit, find, others, parse_unit, plain, unit_in
from ._plausible import Sizes


# what N may count, and its column in runs.jsonl
SIZES = {"total": "N_total", "non_embedding": "N_non_embedding", "active": "N_active"}
# what may be fitted, and its column there; `exit0`, `eval_exit2` are items of lists
LOSSES = {
    "mean": "loss_mean",
    "final": "loss_final",
    "eval_mean": "eval_loss_mean",
    "eval_final": "eval_loss_final",
}
EVERY_EXIT = ("exits", "eval_exits")
EPOCHS = ("epochs", "num_epochs", "n_epochs")
# what comes along where it is there, whatever the law reads
COMPANIONS = ("N", "D", "C", "G", "D_unique", "weight", "seed")
VOCABULARY = 50_304  # rows of a head, where a table does not tell: it only widens what is allowed

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
EXAMPLE = "write it as `--where 'optimizer == adamw'` or `--where 'D > 1e9'`"


@dataclass(frozen=True)
class ColumnChoice:
    """The columns to take from a table that offers more than one.

    Attributes:
        size (`str`): What N counts, where the table has the columns of runs.jsonl: `"total"`,
            `"non_embedding"` or `"active"`.
        loss (`str`): `"mean"` over the exits, `"final"`, `"exit0"` and so on, each with `eval_`
            before it for the last evaluation; `"exits"` or `"eval_exits"` for one row per exit;
            or the name of a column.
        columns (`Mapping[str, str]`): Column of a variable, for names that are not understood.
        statuses (`tuple[str, ...]`): Runs to keep, where the table has a column `status`.
        units (`Mapping[str, str]`): Unit of a variable's column, such as `{"N": "1e6"}` or
            `{"loss": "ppl"}`; a unit of `"1"` says that the numbers are right as they are.
        where (`tuple[str, ...]`): Conditions that rows must meet, such as `"optimizer == adamw"`.
        runs_are (`str`): Whether rows that share a name (or an N) are `"checkpoints"` of one run or
            `"independent"` runs; empty to judge by the rows.
        last_of_run (`bool`): Keep only the last row of every run.
    """

    size: str = "total"
    loss: str = "mean"
    columns: Mapping[str, str] = field(default_factory=dict)
    statuses: tuple[str, ...] = ("finished",)
    units: Mapping[str, str] = field(default_factory=dict)
    where: tuple[str, ...] = ()
    runs_are: str = ""
    last_of_run: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table, or one exit of it."""

    index: int
    exit_idx: int = -1
    exits: int = 1


def chosen(columns: Any, labels: Callable[[str], Sequence[Any]], condition: str) -> list[bool]:
    """Return which rows meet a condition: column, operator, value; several joined by `and`."""
    parts = re.split(r"\s+(?:and|&&)\s+", condition.strip())
    met = [_met(list(columns), labels, part) for part in parts]
    return [all(of_row) for of_row in zip(*met, strict=True)]


def _met(names: list[str], labels: Callable[[str], Sequence[Any]], part: str) -> list[bool]:
    found = re.fullmatch(r"\s*(.+?)\s*(==|!=|<=|>=|<|>|=)\s*(.*?)\s*", part)
    if not found:
        raise TableError(f"{part!r} is no condition; {EXAMPLE}.")
    name, mark, value = found[1].strip("`\"'"), found[2], found[3].strip("\"'")
    if name not in names:
        known = {column.lower(): column for column in reversed(names)}
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {known[near[0]]!r}? " if near else ""
        raise TableError(
            f"no column {name!r} for the condition {part!r}; {hint}it has {', '.join(names[:20])}."
        )
    compare, number = COMPARE[mark], number_of(value)
    if mark in ("==", "!=", "="):
        same = [_same(cell, value, number) for cell in labels(name)]
        return [not equal for equal in same] if mark == "!=" else same
    if number != number:
        raise TableError(f"{part!r} compares with no number; {EXAMPLE}.")
    return [bool(compare(number_of(cell), number)) for cell in labels(name)]


def _same(cell: Any, value: str, number: float) -> bool:
    """Return whether a cell equals a value, as text or as a number."""
    if is_missing(cell):
        return value == ""
    if isinstance(cell, bool):
        return value.lower() == str(cell).lower()
    return str(cell).strip() == value or (number == number and number_of(cell) == number)


class Selection:
    """Variables of laws at the chosen rows of a table.

    Attributes:
        rows (`list[Row]`): The rows.
        names (`dict[str, str]`): Column of each variable, or the formula it came from.
        values (`dict[str, np.ndarray]`): Each in the unit of the laws, (rows,).
        notes (`list[str]`): What was left out, converted or assumed.
        epochs (`tuple[str, np.ndarray]`, *optional*): Column of the passes over the data.
    """

    def __init__(
        self, table: Table, choice: ColumnChoice, variables: Sequence[str], target: str
    ) -> None:
        self.table, self.choice, self.target = table, choice, target
        self.notes = list(table.notes)
        self.rows = self._rows()
        self.names: dict[str, str] = {}
        self.values: dict[str, np.ndarray] = {}
        self.epochs: tuple[str, np.ndarray] | None = None
        self.needs_unique = "D_unique" in variables
        every_exit = target == "loss" and choice.loss in EVERY_EXIT
        if every_exit:
            self.rows = list(self._exits())
        self._take_target()
        wanted = dict.fromkeys([*variables, *COMPANIONS, *(() if target == "loss" else ("loss",))])
        for name in wanted:
            column = self.column_of(name)
            # `u` is D_unique for a law that reads it, else the exits shallower than this one
            other = name == "D_unique" and column.lower() == "u" and not self.needs_unique
            if column and name != target and name not in self.values and not other:
                self._take(name, column)
        unknown = sorted(set(choice.units) - set(self.values))
        if unknown:
            raise TableError(f"`--unit {unknown[0]}` has no column; there are {some(self.values)}.")
        for name in table.columns:
            if plain(name) in EPOCHS and "D_unique" not in self.values:
                self.epochs = name, np.array(numbers_of(self.cells(name)))
        if every_exit:
            self._take_exits()

    def cells(self, column: str) -> list[Any]:
        """Return the values of a column at the rows."""
        cells = self.table.columns[column]
        return [cells[row.index] for row in self.rows]

    def written(self, column: str) -> list[Any]:
        """Return the cells of a column at the rows as the file has them."""
        cells = self.table.labels(column)
        return [cells[row.index] for row in self.rows]

    @property
    def lines(self) -> list[int]:
        """Line of every row in the file."""
        return [self.table.lines[row.index] for row in self.rows]

    def keep(self, kept: np.ndarray) -> None:
        """Cut rows and values to those marked."""
        self.rows = [row for row, good in zip(self.rows, kept, strict=True) if good]
        self.values = {name: values[kept] for name, values in self.values.items()}

    def column_of(self, name: str) -> str:
        """Return the column that holds a variable, empty if there is none."""
        if name in self.choice.columns:
            return self._checked(self.choice.columns[name], name)
        if name == "N" and self.choice.size not in SIZES:
            raise TableError(f"N is one of {some(SIZES)}, got {self.choice.size!r}.")
        if name == "N" and SIZES[self.choice.size] in self.table.columns:
            return SIZES[self.choice.size]
        return find(self.table.columns, name)

    def sizes(self) -> Sizes:
        """Return the sizes of the rows, to be judged; of exits those of the whole run."""
        columns = {name: self.values[name] for name in "NDC" if name in self.values}
        whole = self.column_of("N")
        if any(row.exits > 1 for row in self.rows) and whole:
            columns["N"] = np.array(numbers_of(self.cells(whole)))
        ones, active = np.ones(len(self.rows)), None
        if "N_active" in self.table.columns and self.choice.size != "non_embedding":
            active = np.array(numbers_of(self.cells("N_active")))
        elif "N" in columns and {"E", "S"} & set(self.values):
            share = 1 / np.maximum(self.values.get("E", ones), 1.0)
            idle = np.clip(self.values.get("S", 0 * ones), 0, 0.999)
            active = columns["N"] * share * (1 - idle)
        G = np.maximum(np.nan_to_num(self.values.get("G", ones), nan=1.0), 1.0)
        vocabularies = [number_of(v) for v in self.table.columns.get("vocab_size", ())]
        largest = max((v for v in vocabularies if v == v), default=0)
        vocab = int(largest) or VOCABULARY
        return Sizes(columns, active, G, vocab, set(self.choice.units), self.lines)

    def _rows(self) -> list[Row]:
        """Choose rows by conditions and by status."""
        table, rows = self.table, list(range(len(self.table)))
        for condition in self.choice.where:
            met = chosen(list(table.columns), table.labels, condition)
            gone = [i for i in rows if not met[i]]
            rows = [i for i in rows if met[i]]
            if not rows:
                raise TableError(f"{table.source} has no row where {condition}.")
            self.notes.append(f"{len(gone)} rows left out, where not {condition}." if gone else "")
        column = _status_column(table)
        statuses = table.columns[column] if column else [None] * len(table)
        # a table without statuses, or a row without one, says nothing against its runs
        wanted = {word.lower() for word in self.choice.statuses}
        words = [str(status) for status in statuses]
        good = {word for word in set(words) if is_missing(word) or word.lower() in wanted}
        gone_by: dict[str, list[int]] = {}
        for i in rows:
            if words[i] not in good:
                gone_by.setdefault(words[i], []).append(table.lines[i])
        for status, lines in gone_by.items():
            self.notes.append(left_out(lines, f"status {status}"))
        kept = [Row(i) for i in rows if words[i] in good]
        if not kept:
            raise TableError(
                f"{table.source} has no run of status {' or '.join(self.choice.statuses)}, only "
                f"{some(gone_by)}. Choose by `--status`."
            )
        return kept

    def _exits(self) -> Iterator[Row]:
        """Make every exit of every run a row of its own."""
        lists = self.table.columns[self._checked(self._list_of(self.choice.loss), "loss")]
        for row in self.rows:
            losses = lists[row.index] or []
            yield from (Row(row.index, k, len(losses)) for k in range(len(losses)))

    @staticmethod
    def _list_of(loss: str) -> str:
        return "eval_loss_exits" if loss.startswith("eval_") else "loss_exits"

    def _checked(self, column: str, name: str) -> str:
        if column not in self.table.columns:
            raise TableError(
                f"{self.table.source} has no column {column!r} for {name}; it has "
                f"{some(self.table.columns, 20)}."
            )
        return column

    def _take_target(self) -> None:
        """Put what is fitted among the variables."""
        asked, target, columns = self.choice.loss, self.target, self.table.columns
        one_exit = re.fullmatch(r"(eval_)?exit[ :]?(\d+)", asked)
        if target in self.choice.columns or target != "loss":
            column = self.column_of(target)
            if not column:
                raise TableError(
                    f"{self.table.source} has no column {target}; it has {some(columns)}."
                )
        elif asked in EVERY_EXIT or one_exit:
            column = self._checked(self._list_of(asked), "loss")
            picks = [int(one_exit[2]) if one_exit else row.exit_idx for row in self.rows]
            items = [
                losses[k] if isinstance(losses, Sequence) and k < len(losses) else None
                for losses, k in zip(self.cells(column), picks, strict=True)
            ]
            self.names[target] = f"{column}[{one_exit[2]}]" if one_exit else column
            self.values[target] = np.array(numbers_of(items), dtype=np.float64)
            return
        elif asked in columns or LOSSES.get(asked) in columns:
            column = LOSSES[asked] if LOSSES.get(asked) in columns else asked
        else:
            # a table of one loss needs no choice
            column = self.column_of("loss") if asked == "mean" else ""
            if not column:
                raise TableError(
                    f"{self.table.source} has no loss {asked!r}; it has {some(columns, 20)}. Ask "
                    f"for {some(LOSSES)}, exit0 and so on, or a column."
                )
        self._take(target, column)

    def _take(self, name: str, column: str) -> None:
        """Put a column's numbers among the variables, in the unit of the laws."""
        here = self.written(column)
        texts = [c for c in here if isinstance(c, str) and ("," in c or c.count(".") > 1)]
        marks = (marks_of(texts) or self.table.marks) if texts else ""
        if not marks and name == "loss":
            # no loss is in the thousands: `2,850` has a decimal comma
            if any(re.fullmatch(r"\d{1,2},\d{3}", text.strip()) for text in texts):
                marks = "comma"
        numbers = np.array(numbers_of(here, marks), dtype=np.float64)
        example = _example(here, numbers)
        if example:
            self.notes.append(f"Read {name} from text in {column!r}: {example}.")
        unit: Unit | None = unit_in(column, name)[1] if name in UNITED else None
        if name in self.choice.units:
            unit = parse_unit(self.choice.units[name], name)
        if unit is not None and unit != Unit():
            numbers = unit.convert(numbers)
            self.notes.append(unit.sentence(name, column))
        more = others(list(self.table.columns), name, column) if name in ("N", "loss") else []
        ours = column in (*LOSSES.values(), *SIZES.values())
        if more and name not in self.choice.columns and not ours:
            how = f"--column {name}={more[0]}"
            self.notes.append(f"Took {column!r} for {name}; {some(more)} would do too (`{how}`).")
        self.names[name], self.values[name] = column, numbers

    def _take_exits(self) -> None:
        """Add the variables of single exits: neighbours, and parameters of the member."""
        self.names |= {"U": "shallower exits", "V": "deeper exits"}
        self.values["U"] = np.array([row.exit_idx for row in self.rows], float)
        self.values["V"] = np.array([row.exits - 1 - row.exit_idx for row in self.rows], float)
        size, columns = self.choice.size, self.table.columns
        if size == "active" or not {"N_total", "N_non_embedding", "exits"} <= set(columns):
            return
        whole, inner, depths = (columns[n] for n in ("N_total", "N_non_embedding", "exits"))
        sizes = []
        for row in self.rows:
            layers = inner[row.index] * depths[row.index][row.exit_idx] / depths[row.index][-1]
            around = whole[row.index] - inner[row.index] if size == "total" else 0
            sizes.append(layers + around)
        self.names["N"] = f"{SIZES[size]}, layers in proportion to the exit's depth"
        self.values["N"] = np.array(sizes, float)


def _status_column(table: Table) -> str:
    """Return the column of statuses; `State` is one if its words are those of a run."""
    if "status" in table.columns:
        return "status"
    for column, cells in table.columns.items():
        if plain(column) in ("status", "state"):
            words = {str(cell).lower() for cell in cells}
            return column if words & {"finished", "crashed", "failed", "killed"} else ""
    return ""


def _example(cells: Sequence[Any], numbers: np.ndarray) -> str:
    """Return the first cell that is no plain number and was read as one, in words."""
    for cell, number in zip(cells, numbers.tolist(), strict=True):
        if isinstance(cell, str) and number == number:
            try:
                if float(cell) == number:
                    continue
            except ValueError:
                pass
            return f"{cell.strip()!r} is {number:g}"
    return ""
