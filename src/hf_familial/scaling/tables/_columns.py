"""Selection of the variables of laws from a table: its rows, columns and units."""

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


# the ways to count N, and their columns in runs.jsonl
SIZES = {"total": "N_total", "non_embedding": "N_non_embedding", "active": "N_active"}
# the losses to fit, and their columns in runs.jsonl; `exit0` and `eval_exit2` are items of lists
LOSSES = {
    "mean": "loss_mean",
    "final": "loss_final",
    "eval_mean": "eval_loss_mean",
    "eval_final": "eval_loss_final",
}
EVERY_EXIT = ("exits", "eval_exits")
EPOCHS = ("epochs", "num_epochs", "n_epochs")
# variables that are read if the file has them, even if the law does not use them
COMPANIONS = ("N", "D", "C", "G", "D_unique", "weight", "seed")
VOCABULARY = 50_304  # default vocabulary size; it only widens the allowed range of C

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
EXAMPLE = "Write it like `--where 'optimizer == adamw'` or `--where 'D > 1e9'`"


@dataclass(frozen=True)
class ColumnChoice:
    """A choice of the rows, columns and units to read from a table.

    Attributes:
        size (`str`): The way to count N: `"total"`, `"non_embedding"` or `"active"`. It is used
            only for tables with the columns of runs.jsonl.
        loss (`str`): The loss to fit. `"mean"` is the mean over the exits, `"final"` the loss of
            the deepest exit, `"exit0"` that of exit 0. With the prefix `eval_` it is the loss of
            the last evaluation. `"exits"` and `"eval_exits"` make one row per exit. You can also
            pass the name of a column.
        columns (`Mapping[str, str]`): Column names of variables, such as `{"D": "tok"}`, if the
            reader does not recognise them.
        statuses (`tuple[str, ...]`): Statuses of the runs to keep, if the table has a column
            `status`.
        units (`Mapping[str, str]`): Units of variables, such as `{"N": "1e6"}` or `{"loss":
            "ppl"}`. The unit `"1"` means that the numbers are correct without conversion.
        where (`tuple[str, ...]`): Conditions on the rows, such as `"optimizer == adamw"`.
        runs_are (`str`): `"checkpoints"` if rows with the same name (or N) are checkpoints of one
            run, `"independent"` if they are different runs. Default: decided from the rows.
        last_of_run (`bool`): Whether to keep only the last row of every run.

    Example:
        >>> ColumnChoice(loss="eval_mean", columns={"D": "tok"}, where=("seed == 0",))
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
    """A row of the table, or one exit of a row."""

    index: int
    exit_idx: int = -1
    exits: int = 1


def chosen(columns: Any, labels: Callable[[str], Sequence[Any]], condition: str) -> list[bool]:
    """Return a mask of the rows that meet a condition such as `"D > 1e9 and seed == 0"`."""
    parts = re.split(r"\s+(?:and|&&)\s+", condition.strip())
    met = [_met(list(columns), labels, part) for part in parts]
    return [all(of_row) for of_row in zip(*met, strict=True)]


def _met(names: list[str], labels: Callable[[str], Sequence[Any]], part: str) -> list[bool]:
    found = re.fullmatch(r"\s*(.+?)\s*(==|!=|<=|>=|<|>|=)\s*(.*?)\s*", part)
    if not found:
        raise TableError(f"{part!r} is not a condition. {EXAMPLE}.")
    name, mark, value = found[1].strip("`\"'"), found[2], found[3].strip("\"'")
    if name not in names:
        known = {column.lower(): column for column in reversed(names)}
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f" Did you mean {known[near[0]]!r}?" if near else ""
        raise TableError(
            f"The table has no column {name!r} for the condition {part!r}.{hint} Its columns are "
            f"{', '.join(names[:20])}."
        )
    compare, number = COMPARE[mark], number_of(value)
    if mark in ("==", "!=", "="):
        same = [_same(cell, value, number) for cell in labels(name)]
        return [not equal for equal in same] if mark == "!=" else same
    if number != number:
        raise TableError(f"{part!r} needs a number after {mark!r}. {EXAMPLE}.")
    return [bool(compare(number_of(cell), number)) for cell in labels(name)]


def _same(cell: Any, value: str, number: float) -> bool:
    """Return whether a cell equals a value, as text or as a number."""
    if is_missing(cell):
        return value == ""
    if isinstance(cell, bool):
        return value.lower() == str(cell).lower()
    return str(cell).strip() == value or (number == number and number_of(cell) == number)


class Selection:
    """The variables of laws for the chosen rows of a table.

    Attributes:
        rows (`list[Row]`): The chosen rows.
        names (`dict[str, str]`): Column of each variable, or the formula that computed it.
        values (`dict[str, np.ndarray]`): Values of each variable in the unit of the laws, (rows,).
        notes (`list[str]`): Sentences on data that were left out, converted or assumed.
        epochs (`tuple[str, np.ndarray]`, *optional*): Name and values of the column with the
            number of passes over the data.
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
            # `u` is D_unique if the law uses that, else the number of shallower exits
            other = name == "D_unique" and column.lower() == "u" and not self.needs_unique
            if column and name != target and name not in self.values and not other:
                self._take(name, column)
        unknown = sorted(set(choice.units) - set(self.values))
        if unknown:
            raise TableError(
                f"`--unit` must name one of the variables {some(self.values)}, got {unknown[0]!r}."
            )
        for name in table.columns:
            if plain(name) in EPOCHS and "D_unique" not in self.values:
                self.epochs = name, np.array(numbers_of(self.cells(name)))
        if every_exit:
            self._take_exits()

    def cells(self, column: str) -> list[Any]:
        """Return the values of a column in the chosen rows."""
        cells = self.table.columns[column]
        return [cells[row.index] for row in self.rows]

    def written(self, column: str) -> list[Any]:
        """Return the unconverted cells of a column in the chosen rows."""
        cells = self.table.labels(column)
        return [cells[row.index] for row in self.rows]

    @property
    def lines(self) -> list[int]:
        """The line of every row in the file."""
        return [self.table.lines[row.index] for row in self.rows]

    def keep(self, kept: np.ndarray) -> None:
        """Keep only the rows and values that are marked True."""
        self.rows = [row for row, good in zip(self.rows, kept, strict=True) if good]
        self.values = {name: values[kept] for name, values in self.values.items()}

    def column_of(self, name: str) -> str:
        """Return the column of a variable, `""` if there is none."""
        if name in self.choice.columns:
            return self._checked(self.choice.columns[name], name)
        if name == "N" and self.choice.size not in SIZES:
            raise TableError(
                f"`size` must be total, non_embedding or active, got {self.choice.size!r}."
            )
        if name == "N" and SIZES[self.choice.size] in self.table.columns:
            return SIZES[self.choice.size]
        return find(self.table.columns, name)

    def sizes(self) -> Sizes:
        """Return the sizes of the rows for plausibility checks.

        If a row is one exit of a run, its size is that of the whole run.
        """
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
            self.notes.append(
                f"{len(gone)} rows were left out because they do not meet {condition!r}."
                if gone
                else ""
            )
        column = _status_column(table)
        statuses = table.columns[column] if column else [None] * len(table)
        # rows without a status are kept
        wanted = {word.lower() for word in self.choice.statuses}
        words = [str(status) for status in statuses]
        good = {word for word in set(words) if is_missing(word) or word.lower() in wanted}
        gone_by: dict[str, list[int]] = {}
        for i in rows:
            if words[i] not in good:
                gone_by.setdefault(words[i], []).append(table.lines[i])
        for status, lines in gone_by.items():
            self.notes.append(left_out(lines, f"the status is {status}"))
        kept = [Row(i) for i in rows if words[i] in good]
        if not kept:
            raise TableError(
                f"{table.source} has no run with status {' or '.join(self.choice.statuses)}, only "
                f"{some(gone_by)}. Choose one of these with `--status`."
            )
        return kept

    def _exits(self) -> Iterator[Row]:
        """Yield one row for each exit of each run."""
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
                f"{self.table.source} has no column {column!r} for {name}. Its columns are "
                f"{some(self.table.columns, 20)}."
            )
        return column

    def _take_target(self) -> None:
        """Add the target of the fit (such as the loss) to the variables."""
        asked, target, columns = self.choice.loss, self.target, self.table.columns
        one_exit = re.fullmatch(r"(eval_)?exit[ :]?(\d+)", asked)
        if target in self.choice.columns or target != "loss":
            column = self.column_of(target)
            if not column:
                raise TableError(
                    f"{self.table.source} has no column {target}. Its columns are {some(columns)}."
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
            # a table with a single loss column needs no choice
            column = self.column_of("loss") if asked == "mean" else ""
            if not column:
                raise TableError(
                    f"{self.table.source} has no loss {asked!r}. Its columns are "
                    f"{some(columns, 20)}. Choose {some(LOSSES)}, exit0 (or another exit), or a "
                    "column."
                )
        self._take(target, column)

    def _take(self, name: str, column: str) -> None:
        """Add a column's numbers to the variables, in the unit of the laws."""
        here = self.written(column)
        texts = [c for c in here if isinstance(c, str) and ("," in c or c.count(".") > 1)]
        marks = (marks_of(texts) or self.table.marks) if texts else ""
        if not marks and name == "loss":
            # a loss is never in the thousands, so `2,850` has a decimal comma
            if any(re.fullmatch(r"\d{1,2},\d{3}", text.strip()) for text in texts):
                marks = "comma"
        numbers = np.array(numbers_of(here, marks), dtype=np.float64)
        example = _example(here, numbers)
        if example:
            self.notes.append(f"{name} was read from text in {column!r}: {example}.")
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
            self.notes.append(
                f"{column!r} was used for {name}. You can also use {some(more)} (`{how}`)."
            )
        self.names[name], self.values[name] = column, numbers

    def _take_exits(self) -> None:
        """Add the variables of single exits: U, V, and N as the parameters of the member."""
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
    """Return the column of statuses. `State` counts only if it has words such as `finished`."""
    if "status" in table.columns:
        return "status"
    for column, cells in table.columns.items():
        if plain(column) in ("status", "state"):
            words = {str(cell).lower() for cell in cells}
            return column if words & {"finished", "crashed", "failed", "killed"} else ""
    return ""


def _example(cells: Sequence[Any], numbers: np.ndarray) -> str:
    """Return an example of a cell that was converted to a number, such as `'70M' is 7e+07`."""
    for cell, number in zip(cells, numbers.tolist(), strict=True):
        if isinstance(cell, str) and number == number:
            try:
                if float(cell) == number:
                    continue
            except ValueError:
                pass
            return f"{cell.strip()!r} is {number:g}"
    return ""
