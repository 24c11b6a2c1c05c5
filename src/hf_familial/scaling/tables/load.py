"""Loading of the runs in a file, as a table that laws can be fitted to."""

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
    """The result of [`load_runs`]: the rows to fit, and a report on how they were read.

    Attributes:
        data ([`RunTable`]): The rows to fit. Pass it to [`fit`].
        source (`str`): The file.
        columns (`Mapping[str, str]`): Column of every variable, or the formula that computed it.
        found (`int`): Number of rows in the file.
        used (`int`): Number of these rows that are in `data`.
        notes (`tuple[str, ...]`): Sentences on data that were left out, converted or assumed.
        facts ([`Facts`]): Facts about the runs, such as their vocabulary size.
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
    """Load the runs in a file as rows that one or more laws can be fitted to.

    The reader recognises common column names and units. It leaves out runs that did not finish,
    rows without valid numbers for the laws, and copies. If a run has several rows with the same
    N, D and G, it keeps the last one. Implausible numbers raise an error that suggests a unit. The
    notes of the result list all decisions.

    Args:
        path (`str` or `os.PathLike`): A file in CSV, JSON lines, JSON or parquet.
        laws ([`Law`] or several): The laws to fit. N (parameters), D (tokens), C (FLOPs) and G
            (exits) are read if the file has them. If one of N, D and C is missing, it is computed
            from C = 6ND.
        choice ([`ColumnChoice`]): The rows, columns and units to use.

    Returns:
        [`LoadedRuns`]: The rows and the notes.

    Raises:
        TableError: If the file is not a table, lacks a column, or has implausible numbers.
        ScalingError: If no row is left.

    Example:
        >>> fit("familial", load_runs("runs.jsonl", get_law("familial")).data)
    """
    several = (laws,) if isinstance(laws, Law) else tuple(laws)
    return select(read_table(path), several, choice or ColumnChoice())


@np.errstate(all="ignore")  # cells can contain anything, and bad numbers are left out later
def select(table: Table, laws: Sequence[Law], choice: ColumnChoice) -> LoadedRuns:
    """Select the rows for some laws from a table. See `load_runs`."""
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
    again = "the same run appears again later" if named else "a later row is the same"
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
        known.pop("C", None)  # a C computed from N and D does not show how C was counted
    facts, more = facts_of(table, indices, known, found.names[target], size)
    notes = tuple(dict.fromkeys(filter(None, [*found.notes, *more])))
    return LoadedRuns(data, source, used, len(table), len(set(indices)), notes, facts)


# variable, its formula, and the function of the two others in the order N, D, C
COMPUTE: tuple[tuple[str, str, Callable[..., np.ndarray]], ...] = (
    ("D", "C / (6 N)", lambda n, c: c / (6 * n)),
    ("N", "C / (6 D)", lambda d, c: c / (6 * d)),
    ("C", "6 N D", lambda n, d: 6 * n * d),
)


def _derive(found: Selection) -> None:
    """Compute a missing one of N, D and C, and compute D_unique from the number of epochs."""
    values, notes = found.values, found.notes
    for name, formula, of in COMPUTE:
        others = [other for other in "NDC" if other != name]
        if name not in values and all(other in values for other in others):
            found.names[name] = formula
            values[name] = of(*(values[other] for other in others))
            notes.append(f"{name} is not in the file, so {name} = {formula}.")
    if found.names.get("C") not in (None, "6 N D") and {"N", "D"} <= set(values):
        gaps = ~np.isfinite(values["C"]) & np.isfinite(values["N"]) & np.isfinite(values["D"])
        if gaps.any() and not gaps.all():
            values["C"] = np.where(gaps, six_nd(values["N"], values["D"]), values["C"])
            notes.append(f"C is missing in {int(gaps.sum())} rows, so C = 6 N D there.")
    if found.epochs is not None and "D" in values and "D_unique" not in values:
        column, numbers = found.epochs
        found.names["D_unique"] = formula = f"D / {column}"
        values["D_unique"] = values["D"] / np.maximum(numbers, 1.0)
        notes.append(f"D_unique is not in the file, so D_unique = {formula}.")
    if "D_unique" in values and not found.needs_unique and "D" in values:
        # without a number of unique tokens, all tokens of the row count as new
        unique = values["D_unique"]
        values["D_unique"] = np.where(np.isfinite(unique), unique, values["D"])


def _check_columns(found: Selection, variables: Sequence[str]) -> None:
    source, columns = found.table.source, found.table.columns
    missing = [name for name in variables if name not in found.values]
    for name in missing:
        column = log_of(columns, name)
        if column:
            raise TableError(
                f"{source} has no {name}, but it has {column!r}. Pass `--column '{name}={column}'` "
                f"with `--unit {name}=log10` or `--unit {name}=ln`."
            )
    if missing:
        raise TableError(
            f"{source} has no column for {some(missing)}. Its columns are {some(columns, 20)}. "
            f"Name one with `--column {missing[0]}=COLUMN`, or in `columns` of `ColumnChoice`."
        )


def _runs(found: Selection) -> tuple[list[str], bool]:
    """Return the run of every row, and whether a column such as `run_id` names it."""
    own, names = [f"line {line}" for line in found.lines], list(found.table.columns)
    asked, runs_are = found.choice.columns.get("run_id", ""), found.choice.runs_are
    if asked and asked not in names:
        raise TableError(
            f"{found.table.source} has no column {asked!r} for run_id. Its columns are "
            f"{some(names, 20)}."
        )
    if runs_are == "independent":
        found.notes.append("Every row counts as a separate run (`--runs-are independent`).")
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
    """Keep only the last row of each run, and return the labels of the runs."""
    if "D" not in found.values:
        raise TableError(
            "`--last-of-run` needs the column D (training tokens). Name it with `--column "
            "D=COLUMN`."
        )
    keep = last_of_each(labels, found.values["D"], [row.exit_idx for row in found.rows])
    found.keep(keep)
    left, gone = int(keep.sum()), int((~keep).sum())
    found.notes.append(
        f"The last row of each of {left} runs was kept. {gone} earlier rows were left out."
    )
    return [label for label, kept in zip(labels, keep, strict=True) if kept]


def _latest(found: Selection, labels: Sequence[str], named: bool) -> list[int]:
    """Return the positions of the rows that no later row replaces.

    A later row of the same named run replaces a row with the same exit, N, D, G and seed. Without
    a named run, only a copy replaces a row.
    """
    keys = ("N", "D", "G", "seed") if named else tuple(found.values)
    columns: list[list[Any]] = [found.values[n].tolist() for n in keys if n in found.values]
    names: Sequence[Any] = labels if named else [""] * len(found.rows)
    exits = [row.exit_idx for row in found.rows]
    # NaN is not equal to NaN, but the text "nan" is equal to itself
    columns = [[v if v == v else "nan" for v in column] for column in columns]
    last = {key: i for i, key in enumerate(zip(exits, names, *columns, strict=True))}
    return sorted(set(last.values()))


def _best(found: Selection, kept: list[int], law: Law) -> list[int]:
    """Select, for each size, the row with the least loss, for a rule such as `step_lr`."""
    if "loss" not in found.values:
        return kept
    columns = {name: column[kept] for name, column in found.values.items()}
    best, target = best_of_each(columns, law.variable_names, columns["loss"]), law.target.name
    if best.all():
        return kept
    found.notes.append(
        f"Only the best {target} of each size is fitted, judged by {found.names['loss']!r}: "
        f"{int(best.sum())} of {len(best)} rows."
    )
    setting, values, edges = settings_of(columns, law.variable_names), columns[target], 0
    for row in np.flatnonzero(best):
        tried = values[(setting == setting[row]) & np.isfinite(values)]
        several = len(np.unique(tried)) > 1
        edges += bool(several and values[row] in (tried.min(), tried.max()))
    if edges:
        found.notes.append(
            f"At {edges} of {int(best.sum())} sizes the best {target} is the smallest or largest "
            "that was tried. The true best value may be beyond it."
        )
    return [row for row, good in zip(kept, best, strict=True) if good]


def _no_number(found: Selection, name: str) -> str:
    column = found.names[name]
    words = f"{found.table.source} has no number in {column!r}, the column used for {name}"
    if column in found.table.columns:
        cells = found.written(column)
        shown = dict.fromkeys(repr(cell) for cell in cells if cell not in (None, ""))
        words += f": {some(shown, 3)}" if shown else ", because all cells are empty"
    return f"{words}. Name another column with `--column {name}=COLUMN`."


def _by_reason(data: RunTable) -> dict[str, list[int]]:
    """Return the numbers of the rows that `RunTable` left out, by reason."""
    reasons: dict[str, list[int]] = {}
    for gone in data.dropped:
        reason = re.sub(r"copy of row \d+", "a copy of another row", gone.reason)
        reasons.setdefault(reason, []).append(gone.row)
    return reasons
