"""Load the runs of a file: names, choices, and rows left out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import TableError
from ..data import RunTable, at_edge, best_of_each
from ..flop_models import six_nd
from ..laws.law import Law
from ._columns import (
    EVERY_EXIT,
    SIZES,
    ColumnChoice,
    Gathered,
    Row,
    gather,
    one_per_exit,
    rows_of,
    sizes_of,
)
from ._files import Table, left_out, read_table, some
from ._names import log_of
from ._plausible import check_fall, check_loss, check_share, check_sizes
from ._runs import check_runs_are, guessed_runs, last_of_each, named_runs, split_by_size
from .facts import Facts, facts_of


@dataclass(frozen=True)
class LoadedRuns:
    """Rows to fit, and how they were had from the file.

    Attributes:
        data ([`RunTable`]): The rows.
        source (`str`): The file.
        columns (`Mapping[str, str]`): For every variable its column, or the formula it came from.
        found (`int`): Rows of the file.
        used (`int`): Those of them that are among the rows to fit.
        notes (`tuple[str, ...]`): What was left out, converted, derived or assumed; one sentence
            each.
        facts ([`Facts`]): What the runs tell of their setting.
    """

    data: RunTable
    source: str
    columns: Mapping[str, str]
    found: int
    used: int
    notes: tuple[str, ...] = ()
    facts: Facts = field(default_factory=Facts)


def load_runs(
    path: str | os.PathLike[str], laws: Law | Sequence[Law], choice: ColumnChoice | None = None
) -> LoadedRuns:
    """Read the runs of a file as rows that a law, or each of several, can take.

    Runs whose status is not asked for, rows without a lawful number where a law needs one, and
    copies of a row are left out and named in the notes. Of several rows of one run at the same N,
    D and G the last one counts, for a run taken up again writes another line. Numbers that no
    model has are refused, with the unit that they look like.

    Args:
        path (`str` or `os.PathLike`): CSV, JSON lines, a JSON list or parquet.
        laws ([`Law`] or several): What will be fitted. N, D, C and G come along where they are
            there; one of N, D and C is had from the others by C = 6 N D where it is missing.
        choice ([`ColumnChoice`], *optional*): Which N, which loss, which columns, units and rows.

    Returns:
        [`LoadedRuns`]

    Raises:
        OSError: If the file cannot be read.
        TableError: If it is no table, lacks a column, or holds what no model has.
        ScalingError: If no row is left.
    """
    several = (laws,) if isinstance(laws, Law) else tuple(laws)
    return select(read_table(path), several, choice or ColumnChoice())


@np.errstate(all="ignore")  # cells may hold anything; what is no number is left out by name
def select(table: Table, laws: Sequence[Law], choice: ColumnChoice) -> LoadedRuns:
    """The rows of laws in a table that was read; see [`load_runs`]."""
    notes, target = list(table.notes), laws[0].target.name
    variables = list(dict.fromkeys(name for law in laws for name in law.variable_names))
    runs_are = check_runs_are(choice.runs_are)
    rows = rows_of(table, choice, notes)
    if target == "loss" and choice.loss in EVERY_EXIT:
        rows = one_per_exit(table, rows, choice)
    found = gather(table, rows, variables, choice, target)
    notes += found.notes
    sizes = sizes_of(table, rows, found, choice)
    _derive(found, notes)
    missing = [name for name in variables if name not in found.values]
    for name in missing:
        column = log_of(table.columns, name)
        if column:
            raise TableError(
                f"{table.source} has no {name} but {column!r}: say `--column '{name}={column}'` "
                f"with `--unit {name}=log10` or `--unit {name}=ln`."
            )
    if missing:
        raise TableError(
            f"{table.source} has no column for {some(missing)}; it has {some(table.columns, 20)}. "
            f"Name one with `--column {missing[0]}=COLUMN`, or in `columns` of `ColumnChoice`."
        )
    check_sizes(sizes, table.source)
    if "S" in variables and "S" not in choice.units:
        check_share(found.values["S"], "S", table.source)
    labels, named = _runs(table, rows, found, choice, runs_are, notes)
    if choice.last_of_run:
        rows, labels = _last(table, rows, labels, found, notes)
    kept = sorted(_latest(rows, labels, found, named))
    lines = [table.lines[row.index] for row in rows]
    copies = sorted({lines[i] for i in set(range(len(rows))) - set(kept)})
    again = "the same run comes again later" if named else "a copy of a later row"
    notes.append(left_out(copies, again))
    if target != "loss":
        kept = _best(kept, found, laws[0], notes, lines)
    elif laws[0].target.unit.startswith("nats"):
        at = {name: found.values[name] for name in "ND" if name in found.values}
        if "loss" not in choice.units:
            check_loss(found.values[target], at, found.names[target], table.source)
            check_fall(found.values[target], at, found.names[target], table.source)
    values = {name: column[kept] for name, column in found.values.items()}
    for name in (target, *variables):
        if not np.isfinite(values[name]).any():
            raise TableError(_no_number(table, rows, found, name))
    data = _observe(values, [labels[i] for i in kept], variables, laws, target)
    for reason, of_reason in _by_reason(data).items():
        gone = sorted({lines[kept[row]] for row in of_reason})
        notes.append(left_out(gone, reason))
    found.names.pop("seed", None)
    shown = dict.fromkeys(("N", "D", "C", "G", *variables, target, *found.names))
    used = {n: found.names[n] for n in shown if n in (*data.columns, target, "run_id") and (
        n in found.names)}  # fmt: skip
    indices = [rows[kept[row]].index for row in data.rows]
    size = choice.size if found.names.get("N", "").startswith(SIZES[choice.size]) else ""
    known = dict(data.columns)
    if any(found.names.get(name) not in table.columns for name in "NDC"):
        known.pop("C", None)  # a C that was had from N and D does not tell how it is counted
    facts, more = facts_of(table, indices, known, found.names[target], size)
    notes = list(dict.fromkeys(filter(None, [*notes, *more])))
    return LoadedRuns(data, table.source, used, len(table), len(set(indices)), tuple(notes), facts)


def _derive(found: Gathered, notes: list[str]) -> None:
    """Fill in the one of N, D and C that is missing."""
    values = found.values
    for name, formula, of in COMPUTE:
        others = [other for other in "NDC" if other != name]
        if name not in values and all(other in values for other in others):
            found.names[name] = formula
            with np.errstate(all="ignore"):
                values[name] = of(*(values[other] for other in others))
            notes.append(f"{name} is not in the file: {formula}.")
    if found.names.get("C") not in (None, "6 N D") and {"N", "D"} <= set(values):
        gaps = ~np.isfinite(values["C"]) & np.isfinite(values["N"]) & np.isfinite(values["D"])
        if gaps.any() and not gaps.all():
            values["C"] = np.where(gaps, six_nd(values["N"], values["D"]), values["C"])
            notes.append(f"C is missing in {int(gaps.sum())} rows: 6 N D there.")
    epochs = found.epochs
    if epochs is not None and "D" in values and "D_unique" not in values:
        column, numbers = epochs
        formula = f"D / {column}"
        found.names["D_unique"] = formula
        values["D_unique"] = values["D"] / np.maximum(numbers, 1.0)
        notes.append(f"D_unique is not in the file: {formula}.")
    if "D_unique" in values and not found.needs_unique and "D" in values:
        # nothing is said of these rows' data: they are taken for new
        values["D_unique"] = np.where(
            np.isfinite(values["D_unique"]), values["D_unique"], values["D"]
        )


# what follows from the two others, in the order N, D, C of those that are given
COMPUTE: tuple[tuple[str, str, Callable[..., np.ndarray]], ...] = (
    ("D", "C / (6 N)", lambda n, c: c / (6 * n)),
    ("N", "C / (6 D)", lambda d, c: c / (6 * d)),
    ("C", "6 N D", lambda n, d: 6 * n * d),
)


def _runs(
    table: Table,
    rows: Sequence[Row],
    found: Gathered,
    choice: ColumnChoice,
    runs_are: Any,
    notes: list[str],
) -> tuple[list[str], bool]:
    """The run of every row, and whether a column names it for certain."""
    own = [f"line {table.lines[row.index]}" for row in rows]
    names = list(table.columns)
    cells = _Cells(table, rows)
    asked = choice.columns.get("run_id", "")
    if asked and asked not in table.columns:
        raise TableError(f"{table.source} has no column {asked!r} for run_id.")
    if runs_are == "independent":
        notes.append("Every row counts as a run of its own (`--runs-are independent`).")
        return own, False
    runs = named_runs(names, cells, own, asked)
    per_exit = any(row.exits > 1 for row in rows)
    if runs.named and not per_exit:
        runs = split_by_size(runs, found.values)
    if not runs.named and not runs.column:
        first = runs.notes
        runs = runs if per_exit else guessed_runs(names, cells, own, found.values, runs_are)
        notes += first
    if runs.column in table.columns:
        found.names["run_id"] = runs.column
    notes += runs.notes
    return runs.labels, runs.named


class _Cells(Mapping[str, Sequence[Any]]):
    """Cells of the columns of a table at some rows, as they are written."""

    def __init__(self, table: Table, rows: Sequence[Row]) -> None:
        self.table, self.rows = table, rows

    def __getitem__(self, name: str) -> Sequence[Any]:
        cells = self.table.labels(name)
        return [cells[row.index] for row in self.rows]

    def __iter__(self) -> Any:
        return iter(self.table.columns)

    def __len__(self) -> int:
        return len(self.table.columns)


def _last(
    table: Table, rows: list[Row], labels: list[str], found: Gathered, notes: list[str]
) -> tuple[list[Row], list[str]]:
    """The last rows of the runs; columns are cut to them."""
    if "D" not in found.values:
        raise TableError("`--last-of-run` needs a column of training tokens, D.")
    keep = last_of_each(labels, found.values["D"], [row.exit_idx for row in rows])
    for name in found.values:
        found.values[name] = found.values[name][keep]
    gone = int((~keep).sum())
    notes.append(f"Kept the last row of each of {int(keep.sum())} runs; {gone} earlier left out.")
    return (
        [row for row, kept in zip(rows, keep, strict=True) if kept],
        [label for label, kept in zip(labels, keep, strict=True) if kept],
    )


def _latest(rows: Sequence[Row], labels: Sequence[str], found: Gathered, named: bool) -> set[int]:
    """Positions of the rows that no later row replaces."""
    keys = ("N", "D", "G", "seed") if named else tuple(found.values)
    columns = [found.values[name].tolist() for name in keys if name in found.values]
    names: Sequence[Any] = labels if named else [""] * len(rows)
    exits = [row.exit_idx for row in rows]
    # NaN is not itself: as text it is
    columns = [[v if v == v else "nan" for v in column] for column in columns]
    last = {key: i for i, key in enumerate(zip(exits, names, *columns, strict=True))}
    return set(last.values())


def _best(
    kept: list[int], found: Gathered, law: Law, notes: list[str], lines: Sequence[int]
) -> list[int]:
    """Select the best of the tried settings of a rule for each size."""
    if "loss" not in found.values:
        return kept
    columns = {name: column[kept] for name, column in found.values.items()}
    best = best_of_each(columns, law.variable_names, columns["loss"])
    target = law.target.name
    if best.all():
        return kept
    notes.append(
        f"Fitted the best {target} of each size by {found.names['loss']!r}: {int(best.sum())} of "
        f"{len(best)} rows; the other tried ones are left out."
    )
    edges = at_edge(columns, law.variable_names, columns[target], best)
    if edges:
        notes.append(
            f"At {edges} of {int(best.sum())} sizes the best {target} is the smallest or largest "
            "tried: the true best may lie beyond."
        )
    return [row for row, good in zip(kept, best, strict=True) if good]


def _observe(
    values: Mapping[str, np.ndarray],
    labels: Sequence[str],
    variables: Sequence[str],
    laws: Sequence[Law],
    target: str,
) -> RunTable:
    """The rows that every law can take, those left out recorded."""
    data = RunTable.read(
        {**values, "run_id": labels},
        loss=target,
        weight="weight" if "weight" in values else None,
        run_id="run_id",
        needed=variables,
        bad_rows="drop",
        duplicates="drop",
    )
    for law in laws:
        data = data.for_law(law, "drop")
    return data


def _no_number(table: Table, rows: Sequence[Row], found: Gathered, name: str) -> str:
    column = found.names[name]
    words = f"{table.source} has no number in {column!r}, taken for {name}"
    if column in table.columns:
        cells = _Cells(table, rows)[column]
        shown = dict.fromkeys(repr(cell) for cell in cells if cell not in (None, ""))
        words += f": {some(shown, 3)}" if shown else ": it is empty"
    return f"{words}. Name another with `--column {name}=COLUMN`."


def _by_reason(data: RunTable) -> dict[str, list[int]]:
    """Rows that [`RunTable`] left out, by why."""
    reasons: dict[str, list[int]] = {}
    for gone in data.dropped:
        reason = re.sub(r"copy of row \d+", "a copy of another row", gone.reason)
        reasons.setdefault(reason, []).append(gone.row)
    return reasons
