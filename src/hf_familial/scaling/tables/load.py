"""Load the runs of a file as rows that laws can be fitted to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import TableError
from ..data import RunTable, best_of_each, settings_of
from ..flop_models import six_nd
from ..laws.law import Law
from ._columns import SIZES, ColumnChoice, Selection
from ._files import Table, left_out, read_table, some
from ._names import log_of
from ._plausible import check_fall, check_loss, check_share, check_sizes
from ._runs import check_runs_are, guessed_runs, last_of_each, named_runs, split_by_size
from .facts import Facts, facts_of


@dataclass(frozen=True)
class LoadedRuns:
    """Rows to fit, and how they were read from the file.

    Attributes:
        data ([`RunTable`]): The rows.
        source (`str`): The file.
        columns (`Mapping[str, str]`): Column of every variable, or the formula it came from.
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
    """Load the runs of a file as rows that a law, or each of several, can take.

    Runs of another status, rows without a lawful number where a law needs one, and copies of a row
    are left out and named in the notes. Of several rows of one run at the same N, D and G the last
    one counts. Numbers that no model has are rejected, with the unit that they look like.

    Args:
        path (`str` or `os.PathLike`): CSV, JSON lines, a JSON list or parquet.
        laws ([`Law`] or several): What will be fitted. N, D, C and G come along where they are
            there; one of N, D and C follows from the others by C = 6 N D where it is missing.
        choice ([`ColumnChoice`]): Which N, which loss, which columns, units and rows.

    Raises:
        TableError: If it is no table, lacks a column, or holds what no model has.
        ScalingError: If no row is left.

    Example:
        >>> load_runs("runs.jsonl", get_law("familial")).data
    """
    several = (laws,) if isinstance(laws, Law) else tuple(laws)
    return select(read_table(path), several, choice or ColumnChoice())


@np.errstate(all="ignore")  # cells may hold anything; what is no number is left out by name
def select(table: Table, laws: Sequence[Law], choice: ColumnChoice) -> LoadedRuns:
    """Select the rows of laws from a table that was read; see `load_runs`."""
    law, target, source = laws[0], laws[0].target.name, table.source
    variables = list(dict.fromkeys(name for each in laws for name in each.variable_names))
    check_runs_are(choice.runs_are)
    found = Selection(table, choice, variables, target)
    sizes = found.sizes()
    _derive(found)
    _check_columns(found, variables)
    check_sizes(sizes, source)
    if "S" in variables and "S" not in choice.units:
        check_share(found.values["S"], "S", source)
    labels, named = _runs(found)
    if choice.last_of_run:
        labels = _last(found, labels)
    kept, lines = _latest(found, labels, named), found.lines
    copies = sorted({lines[i] for i in set(range(len(lines))) - set(kept)})
    again = "the same run comes again later" if named else "a copy of a later row"
    found.notes.append(left_out(copies, again))
    if target != "loss":
        kept = _best(found, kept, law)
    elif law.target.unit.startswith("nats"):
        at = {name: found.values[name] for name in "ND" if name in found.values}
        if "loss" not in choice.units:
            check_loss(found.values[target], at, found.names[target], source)
            check_fall(found.values[target], at, found.names[target], source)
    values = {name: column[kept] for name, column in found.values.items()}
    for name in (target, *variables):
        if not np.isfinite(values[name]).any():
            raise TableError(_no_number(found, name))
    data = RunTable.read(
        {**values, "run_id": [labels[i] for i in kept]},
        loss=target,
        weight="weight" if "weight" in values else None,
        run_id="run_id",
        needed=variables,
        bad_rows="drop",
        duplicates="drop",
    )
    for each in laws:
        data = data.for_law(each, "drop")
    for reason, rows in _by_reason(data).items():
        found.notes.append(left_out(sorted({lines[kept[row]] for row in rows}), reason))
    found.names.pop("seed", None)
    shown = dict.fromkeys(("N", "D", "C", "G", *variables, target, *found.names))
    there = (*data.columns, target, "run_id")
    used = {n: found.names[n] for n in shown if n in there and n in found.names}
    indices = [found.rows[kept[row]].index for row in data.rows]
    size = choice.size if found.names.get("N", "").startswith(SIZES[choice.size]) else ""
    known = dict(data.columns)
    if any(found.names.get(name) not in table.columns for name in "NDC"):
        known.pop("C", None)  # a C that follows from N and D does not tell how it is counted
    facts, more = facts_of(table, indices, known, found.names[target], size)
    notes = tuple(dict.fromkeys(filter(None, [*found.notes, *more])))
    return LoadedRuns(data, source, used, len(table), len(set(indices)), notes, facts)


# what follows from the two others, in the order N, D, C of those that are given
COMPUTE: tuple[tuple[str, str, Callable[..., np.ndarray]], ...] = (
    ("D", "C / (6 N)", lambda n, c: c / (6 * n)),
    ("N", "C / (6 D)", lambda d, c: c / (6 * d)),
    ("C", "6 N D", lambda n, d: 6 * n * d),
)


def _derive(found: Selection) -> None:
    """Fill in the one of N, D and C that is missing, and D_unique from passes over the data."""
    values, notes = found.values, found.notes
    for name, formula, of in COMPUTE:
        others = [other for other in "NDC" if other != name]
        if name not in values and all(other in values for other in others):
            found.names[name] = formula
            values[name] = of(*(values[other] for other in others))
            notes.append(f"{name} is not in the file: {formula}.")
    if found.names.get("C") not in (None, "6 N D") and {"N", "D"} <= set(values):
        gaps = ~np.isfinite(values["C"]) & np.isfinite(values["N"]) & np.isfinite(values["D"])
        if gaps.any() and not gaps.all():
            values["C"] = np.where(gaps, six_nd(values["N"], values["D"]), values["C"])
            notes.append(f"C is missing in {int(gaps.sum())} rows: 6 N D there.")
    if found.epochs is not None and "D" in values and "D_unique" not in values:
        column, numbers = found.epochs
        found.names["D_unique"] = formula = f"D / {column}"
        values["D_unique"] = values["D"] / np.maximum(numbers, 1.0)
        notes.append(f"D_unique is not in the file: {formula}.")
    if "D_unique" in values and not found.needs_unique and "D" in values:
        # nothing is said of these rows' data: they are taken for new
        unique = values["D_unique"]
        values["D_unique"] = np.where(np.isfinite(unique), unique, values["D"])


def _check_columns(found: Selection, variables: Sequence[str]) -> None:
    source, columns = found.table.source, found.table.columns
    missing = [name for name in variables if name not in found.values]
    for name in missing:
        column = log_of(columns, name)
        if column:
            raise TableError(
                f"{source} has no {name} but {column!r}: say `--column '{name}={column}'` "
                f"with `--unit {name}=log10` or `--unit {name}=ln`."
            )
    if missing:
        raise TableError(
            f"{source} has no column for {some(missing)}; it has {some(columns, 20)}. Name one "
            f"with `--column {missing[0]}=COLUMN`, or in `columns` of `ColumnChoice`."
        )


def _runs(found: Selection) -> tuple[list[str], bool]:
    """Return the run of every row, and whether a column names it for certain."""
    own, names = [f"line {line}" for line in found.lines], list(found.table.columns)
    asked, runs_are = found.choice.columns.get("run_id", ""), found.choice.runs_are
    if asked and asked not in names:
        raise TableError(f"{found.table.source} has no column {asked!r} for run_id.")
    if runs_are == "independent":
        found.notes.append("Every row counts as a run of its own (`--runs-are independent`).")
        return own, False
    runs = named_runs(names, found.written, own, asked)
    per_exit = any(row.exits > 1 for row in found.rows)
    if runs.named and not per_exit:
        runs = split_by_size(runs, found.values)
    if not runs.named and not runs.column:
        found.notes += runs.notes
        if not per_exit:
            runs = guessed_runs(names, found.written, own, found.values, runs_are)
    if runs.column in found.table.columns:
        found.names["run_id"] = runs.column
    found.notes += runs.notes
    return runs.labels, runs.named


def _last(found: Selection, labels: list[str]) -> list[str]:
    """Cut the selection to the last rows of the runs; return their labels."""
    if "D" not in found.values:
        raise TableError("`--last-of-run` needs a column of training tokens, D.")
    keep = last_of_each(labels, found.values["D"], [row.exit_idx for row in found.rows])
    found.keep(keep)
    left, gone = int(keep.sum()), int((~keep).sum())
    found.notes.append(f"Kept the last row of each of {left} runs; {gone} earlier left out.")
    return [label for label, kept in zip(labels, keep, strict=True) if kept]


def _latest(found: Selection, labels: Sequence[str], named: bool) -> list[int]:
    """Return positions of the rows that no later row replaces.

    A named run is replaced at the same exit, N, D and G; a row without a name by its copy.
    """
    keys = ("N", "D", "G", "seed") if named else tuple(found.values)
    columns: list[list[Any]] = [found.values[n].tolist() for n in keys if n in found.values]
    names: Sequence[Any] = labels if named else [""] * len(found.rows)
    exits = [row.exit_idx for row in found.rows]
    # NaN is not itself: as text it is
    columns = [[v if v == v else "nan" for v in column] for column in columns]
    last = {key: i for i, key in enumerate(zip(exits, names, *columns, strict=True))}
    return sorted(set(last.values()))


def _best(found: Selection, kept: list[int], law: Law) -> list[int]:
    """Select the best of the tried settings of a rule for each size."""
    if "loss" not in found.values:
        return kept
    columns = {name: column[kept] for name, column in found.values.items()}
    best, target = best_of_each(columns, law.variable_names, columns["loss"]), law.target.name
    if best.all():
        return kept
    found.notes.append(
        f"Fitted the best {target} of each size by {found.names['loss']!r}: {int(best.sum())} of "
        f"{len(best)} rows; the other tried ones are left out."
    )
    setting, values, edges = settings_of(columns, law.variable_names), columns[target], 0
    for row in np.flatnonzero(best):
        tried = values[(setting == setting[row]) & np.isfinite(values)]
        several = len(np.unique(tried)) > 1
        edges += bool(several and values[row] in (tried.min(), tried.max()))
    if edges:
        found.notes.append(
            f"At {edges} of {int(best.sum())} sizes the best {target} is the smallest or largest "
            "tried: the true best may lie beyond."
        )
    return [row for row, good in zip(kept, best, strict=True) if good]


def _no_number(found: Selection, name: str) -> str:
    column = found.names[name]
    words = f"{found.table.source} has no number in {column!r}, taken for {name}"
    if column in found.table.columns:
        cells = found.written(column)
        shown = dict.fromkeys(repr(cell) for cell in cells if cell not in (None, ""))
        words += f": {some(shown, 3)}" if shown else ": it is empty"
    return f"{words}. Name another with `--column {name}=COLUMN`."


def _by_reason(data: RunTable) -> dict[str, list[int]]:
    """Return the rows that `RunTable` left out, by reason."""
    reasons: dict[str, list[int]] = {}
    for gone in data.dropped:
        reason = re.sub(r"copy of row \d+", "a copy of another row", gone.reason)
        reasons.setdefault(reason, []).append(gone.row)
    return reasons
