"""Take the variables of a law from the columns of a table: conditions, names, units."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import TableError
from .._cells import is_missing, marks_of, number_of, numbers_of
from ._files import Table, left_out, some
from ._names import Unit, find, others, parse_unit, plain, unit_in
from ._plausible import Sizes


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


def chosen(columns: Any, labels: Callable[[str], Sequence[Any]], condition: str) -> list[bool]:
    """Return which rows meet a condition."""
    answer: list[bool] | None = None
    for part in re.split(r"\s+(?:and|&&)\s+", condition.strip()):
        met = _met(list(columns), labels, part)
        answer = met if answer is None else [a and b for a, b in zip(answer, met, strict=True)]
    return answer or []


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
    """Whether a cell is a value, as text or as a number."""
    if is_missing(cell):
        return value == ""
    if isinstance(cell, bool):
        return value.lower() == str(cell).lower()
    return str(cell).strip() == value or (number == number and number_of(cell) == number)


# what N may count, and its column in runs.jsonl
SIZES = {"total": "N_total", "non_embedding": "N_non_embedding", "active": "N_active"}
# what may be fitted, and its column there; `exit0`, `eval_exit2` are items of lists
LOSSES = {
    "mean": "loss_mean",
    "final": "loss_final",
    "eval_mean": "eval_loss_mean",
    "eval_final": "eval_loss_final",
}
LISTS = {"": "loss_exits", "eval_": "eval_loss_exits"}
EVERY_EXIT = ("exits", "eval_exits")
EPOCHS = ("epochs", "num_epochs", "n_epochs")

# what comes along where it is there, whatever the law reads
COMPANIONS = ("N", "D", "C", "G", "D_unique", "weight", "seed")
VOCABULARY = 50_304  # rows of a head, where a table does not tell: it only widens what is allowed


STATUSES = ("finished",)


@dataclass(frozen=True)
class ColumnChoice:
    """What to take from a table where it offers more than one thing.

    Attributes:
        size (`str`): What N counts, where the table says it in the columns of runs.jsonl:
            `"total"`, `"non_embedding"` or `"active"`.
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
    statuses: tuple[str, ...] = STATUSES
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


@dataclass
class Gathered:
    """Variables at the rows of a table."""

    names: dict[str, str] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    epochs: tuple[str, np.ndarray] | None = None
    needs_unique: bool = False


def rows_of(table: Table, choice: ColumnChoice, notes: list[str]) -> list[Row]:
    """Return the rows that are asked for, by conditions and by status."""
    rows = list(range(len(table)))
    for condition in choice.where:
        met = chosen(list(table.columns), table.labels, condition)
        gone = [i for i in rows if not met[i]]
        rows = [i for i in rows if met[i]]
        if not rows:
            raise TableError(f"{table.source} has no row where {condition}.")
        notes.append(f"{len(gone)} rows left out, where not {condition}." if gone else "")
    column = _status_column(table)
    statuses = table.columns[column] if column else [None] * len(table)
    # a table without statuses, or a row without one, says nothing against its runs
    wanted = {word.lower() for word in choice.statuses}
    words = [str(status) for status in statuses]
    good = {word for word in set(words) if is_missing(word) or word.lower() in wanted}
    kept = [i for i in rows if words[i] in good]
    gone_by: dict[str, list[int]] = {}
    for i in sorted(set(rows) - set(kept)):
        gone_by.setdefault(str(statuses[i]), []).append(table.lines[i])
    for status, lines in gone_by.items():
        notes.append(left_out(lines, f"status {status}"))
    if not kept:
        raise TableError(
            f"{table.source} has no run of status {' or '.join(choice.statuses)}, only "
            f"{some(gone_by)}. Choose by `--status`."
        )
    return [Row(i) for i in kept]


def _status_column(table: Table) -> str:
    """The column of statuses; `State` is one if its words are those of a run."""
    if "status" in table.columns:
        return "status"
    for column, cells in table.columns.items():
        if plain(column) in ("status", "state"):
            words = {str(cell).lower() for cell in cells}
            return column if words & {"finished", "crashed", "failed", "killed"} else ""
    return ""


def one_per_exit(table: Table, rows: Sequence[Row], choice: ColumnChoice) -> list[Row]:
    """Return every exit of every run as a row of its own."""
    column = _checked(table, LISTS["eval_" if choice.loss == "eval_exits" else ""], "loss")
    lists = {row.index: table.columns[column][row.index] or [] for row in rows}
    return [
        Row(index, k, len(losses)) for index, losses in lists.items() for k in range(len(losses))
    ]


def gather(
    table: Table, rows: Sequence[Row], variables: Sequence[str], choice: ColumnChoice, target: str
) -> Gathered:
    """Return the variables of a law and their companions at some rows."""
    found = Gathered(needs_unique="D_unique" in variables)
    _take_target(table, rows, choice, target, found)
    wanted = dict.fromkeys([*variables, *COMPANIONS, *(() if target == "loss" else ("loss",))])
    for name in wanted:
        column = column_of(table, name, choice)
        if not column or name == target or name in found.values:
            continue
        if name == "D_unique" and column.lower() == "u" and not found.needs_unique:
            continue  # exits shallower than this one
        _take(table, rows, choice, found, name, column)
    unknown = sorted(set(choice.units) - set(found.values))
    if unknown:
        raise TableError(f"`--unit {unknown[0]}` has no column; there are {some(found.values)}.")
    for name in table.columns:
        if plain(name) in EPOCHS and "D_unique" not in found.values:
            found.epochs = (
                name,
                np.array(numbers_of([table.columns[name][r.index] for r in rows])),
            )
    if target == "loss" and choice.loss in EVERY_EXIT:
        _take_exits(table, rows, choice, found)
    return found


def column_of(table: Table, name: str, choice: ColumnChoice) -> str | None:
    """Return the column that holds a variable, if there is one."""
    if name in choice.columns:
        return _checked(table, choice.columns[name], name)
    if name == "N" and choice.size not in SIZES:
        raise TableError(f"N is one of {some(SIZES)}, got {choice.size!r}.")
    if name == "N" and SIZES[choice.size] in table.columns:
        return SIZES[choice.size]
    found = find(table.columns, name)
    return found.column if found else None


def _take(
    table: Table, rows: Sequence[Row], choice: ColumnChoice, found: Gathered, name: str, column: str
) -> None:
    """Put a column's numbers among the variables, in the unit of the laws."""
    cells = table.labels(column)
    here = [cells[row.index] for row in rows]
    texts = [c for c in here if isinstance(c, str) and ("," in c or c.count(".") > 1)]
    marks = (marks_of(texts) or table.marks) if texts else ""
    if (
        not marks
        and name == "loss"
        and any(
            isinstance(cell, str) and re.fullmatch(r"\d{1,2},\d{3}", cell.strip()) for cell in here
        )
    ):
        marks = "comma"
    numbers = np.array(numbers_of(here, marks), dtype=np.float64)
    example = _example(here, numbers)
    if example:
        found.notes.append(f"Read {name} from text in {column!r}: {example}.")
    unit = _unit_of(choice, name, column)
    if unit is not None and unit != Unit():
        numbers = unit.convert(numbers)
        found.notes.append(unit.sentence(name, column))
    more = others(list(table.columns), name, column) if name in ("N", "loss") else []
    if more and name not in choice.columns and column not in (*LOSSES.values(), *SIZES.values()):
        how = f"--column {name}={more[0]}"
        found.notes.append(f"Took {column!r} for {name}; {some(more)} would do too (`{how}`).")
    found.names[name], found.values[name] = column, numbers


def _example(cells: Sequence[Any], numbers: np.ndarray) -> str:
    """The first cell that is no plain number and was read as one."""
    for cell, number in zip(cells, numbers.tolist(), strict=True):
        if isinstance(cell, str) and number == number:
            try:
                if float(cell) == number:
                    continue
            except ValueError:
                pass
            return f"{cell.strip()!r} is {number:g}"
    return ""


def _unit_of(choice: ColumnChoice, name: str, column: str) -> Unit | None:
    if name in choice.units:
        return parse_unit(choice.units[name], name)
    if name in ("N", "D", "C", "D_unique", "loss", "S"):
        return unit_in(column, name)[1]
    return None


def _checked(table: Table, column: str, name: str) -> str:
    if column not in table.columns:
        raise TableError(
            f"{table.source} has no column {column!r} for {name}; it has {some(table.columns, 20)}."
        )
    return column


def _take_target(
    table: Table, rows: Sequence[Row], choice: ColumnChoice, target: str, found: Gathered
) -> None:
    """Put what is fitted among the variables."""
    asked = choice.loss
    one_exit = re.fullmatch(r"(eval_)?exit[ :]?(\d+)", asked)
    if target in choice.columns or target != "loss":
        column = column_of(table, target, choice)
        if column is None:
            raise TableError(
                f"{table.source} has no column {target}; it has {some(table.columns)}."
            )
    elif asked in EVERY_EXIT or one_exit:
        prefix = "eval_" if asked.startswith("eval_") else ""
        column = _checked(table, LISTS[prefix], "loss")
        exits = [int(one_exit[2])] * len(rows) if one_exit else [row.exit_idx for row in rows]
        lists = [table.columns[column][row.index] for row in rows]
        found.names[target] = f"{column}[{one_exit[2]}]" if one_exit else column
        items = [_item(items, k) for items, k in zip(lists, exits, strict=True)]
        found.values[target] = np.array(numbers_of(items), dtype=np.float64)
        return
    elif asked in table.columns or LOSSES.get(asked) in table.columns:
        column = LOSSES[asked] if LOSSES.get(asked) in table.columns else asked
    else:
        # a table of one loss needs no choice
        column = column_of(table, "loss", choice) if asked == "mean" else None
        if column is None:
            raise TableError(
                f"{table.source} has no loss {asked!r}; it has {some(table.columns, 20)}. Ask for "
                f"{some(LOSSES)}, exit0 and so on, or a column."
            )
    _take(table, rows, choice, found, target, column)


def _item(items: Any, index: int) -> Any:
    return items[index] if isinstance(items, Sequence) and index < len(items) else None


def _take_exits(table: Table, rows: Sequence[Row], choice: ColumnChoice, found: Gathered) -> None:
    """Put variables of single exits among the others: neighbours, and parameters of the member."""
    found.names |= {"U": "shallower exits", "V": "deeper exits"}
    found.values["U"] = np.array([row.exit_idx for row in rows], float)
    found.values["V"] = np.array([row.exits - 1 - row.exit_idx for row in rows], float)
    if choice.size == "active" or not {"N_total", "N_non_embedding", "exits"} <= set(table.columns):
        return
    whole, inner, depths = (table.columns[n] for n in ("N_total", "N_non_embedding", "exits"))
    sizes = []
    for row in rows:
        layers = inner[row.index] * depths[row.index][row.exit_idx] / depths[row.index][-1]
        around = whole[row.index] - inner[row.index] if choice.size == "total" else 0
        sizes.append(layers + around)
    name = SIZES[choice.size]
    found.names["N"] = f"{name}, layers in proportion to the exit's depth"
    found.values["N"] = np.array(sizes, float)


def sizes_of(table: Table, rows: Sequence[Row], found: Gathered, choice: ColumnChoice) -> Sizes:
    """Return the sizes of some rows, to be judged; of exits those of the whole run."""
    columns = {name: found.values[name] for name in "NDC" if name in found.values}
    whole = column_of(table, "N", choice)
    if any(row.exits > 1 for row in rows) and whole:
        cells = table.columns[whole]
        columns["N"] = np.array(numbers_of([cells[row.index] for row in rows]))
    count = len(rows)
    active = None
    if "N_active" in table.columns and choice.size != "non_embedding":
        cells = table.columns["N_active"]
        active = np.array(numbers_of([cells[row.index] for row in rows]))
    elif "N" in columns and {"E", "S"} & set(found.values):
        share = 1 / np.maximum(found.values.get("E", np.ones(count)), 1.0)
        active = (
            columns["N"] * share * (1 - np.clip(found.values.get("S", np.zeros(count)), 0, 0.999))
        )
    G = np.nan_to_num(found.values.get("G", np.ones(count)), nan=1.0)
    vocabularies = [number_of(v) for v in table.columns.get("vocab_size", ())]
    largest = max((v for v in vocabularies if v == v), default=0)
    lines = [table.lines[row.index] for row in rows]
    return Sizes(
        columns, active, np.maximum(G, 1.0), int(largest) or VOCABULARY, set(choice.units), lines
    )
