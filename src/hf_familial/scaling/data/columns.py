"""From the columns of a file to the variables of a law: names, choices, and rows left out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..laws.law import Law
from .observations import Observations
from .tables import Table, TableError, left_out, read_table, some


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
STATUSES = ("finished",)

# names people give their columns, in lower case with `_` for what is no letter or digit
ALIASES = {
    "N": "n params n_params num_params parameters n_parameters model_size size n_total",
    "D": "d tokens n_tokens num_tokens d_tokens training_tokens train_tokens tokens_seen",
    "C": "c flops c_flops flop compute compute_budget training_flop training_flops budget",
    "G": "g granularity num_exits n_exits",
    "loss": "loss loss_mean validation_loss val_loss eval_loss test_loss final_loss training_loss",
    "E": "e experts num_experts n_experts",
    "S": "s sparsity",
    "D_unique": "d_unique unique_tokens u",
    "run_id": "run_id run run_name",
    "weight": "weight weights",
}


@dataclass(frozen=True)
class Choice:
    """What to take from a table where it offers more than one thing.

    Attributes:
        size (`str`): What N counts, where the table says it in the columns of runs.jsonl:
            `"total"`, `"non_embedding"` or `"active"`.
        loss (`str`): `"mean"` over the exits, `"final"`, `"exit0"` and so on, each with `eval_`
            before it for the last evaluation; `"exits"` or `"eval_exits"` for one row per exit;
            or the name of a column.
        columns (`Mapping[str, str]`): Column of a variable, for names that are not understood.
        statuses (`tuple[str, ...]`): Runs to keep, where the table has a column `status`.
    """

    size: str = "total"
    loss: str = "mean"
    columns: Mapping[str, str] = field(default_factory=dict)
    statuses: tuple[str, ...] = STATUSES


@dataclass(frozen=True)
class Reading:
    """Rows to fit, and how they were had from the file.

    Attributes:
        data ([`Observations`]): The rows.
        source (`str`): The file.
        columns (`Mapping[str, str]`): For every variable its column, or the formula it came from.
        found (`int`): Rows of the file.
        used (`int`): Those of them that are among the rows to fit.
        notes (`tuple[str, ...]`): What was left out or derived; one sentence each.
    """

    data: Observations
    source: str
    columns: Mapping[str, str]
    found: int
    used: int
    notes: tuple[str, ...] = ()


def read_runs(
    path: str | os.PathLike[str], laws: Law | Sequence[Law], choice: Choice | None = None
) -> Reading:
    """Read the runs of a file as rows that a law, or each of several, can take.

    Runs whose status is not asked for, rows without a lawful number where a law needs one, and
    copies of a row are left out and named in the notes. Of several rows of one run at the same N,
    D and G the last one counts, for a run taken up again writes another line.

    Args:
        path (`str` or `os.PathLike`): CSV, JSON lines, a JSON list or parquet.
        laws ([`Law`] or several): What will be fitted. N, D, C and G come along where they are
            there; one of N, D and C is had from the others by C = 6 N D where it is missing.
        choice ([`Choice`], *optional*): Which N, which loss, which columns.

    Returns:
        [`Reading`]

    Raises:
        OSError: If the file cannot be read.
        TableError: If it is no table, or lacks a column.
        ScalingError: If no row is left.
    """
    several = (laws,) if isinstance(laws, Law) else tuple(laws)
    return select(read_table(path), several, choice or Choice())


def select(table: Table, laws: Sequence[Law], choice: Choice) -> Reading:
    """The rows of laws in a table that was read; see [`read_runs`]."""
    notes, target = list(table.notes), laws[0].target.name
    variables = list(dict.fromkeys(name for law in laws for name in law.variable_names))
    rows = _with_status(table, choice, notes)
    if target == "loss" and choice.loss in EVERY_EXIT:
        rows = _one_per_exit(table, rows, choice)
    names, values = _gather(table, rows, variables, choice, target)
    for name, formula, of in COMPUTE:
        others = [other for other in "NDC" if other != name]
        if name not in values and all(other in values for other in others):
            names[name] = formula
            values[name] = of(*(_floats(values[other]) for other in others)).tolist()
            notes.append(f"{name} is not in the file: {formula}.")
    missing = [name for name in variables if name not in values]
    if missing:
        raise TableError(
            f"{table.source} has no column for {some(missing)}; it has {some(table.columns, 20)}. "
            f"Name one with `--column {missing[0]}=COLUMN`, or in `columns` of `Choice`."
        )
    named = "run_id" in names
    kept = sorted(_latest(rows, values, named))
    lines = [table.lines[row.index] for row in rows]
    copies = sorted({lines[i] for i in set(range(len(rows))) - set(kept)})
    again = "the same run comes again later" if named else "a copy of a later row"
    notes.append(left_out(copies, again))
    values = {name: [column[i] for i in kept] for name, column in values.items()}
    for name in (target, *variables):
        values[name] = _floats(values[name]).tolist()
        if not np.isfinite(values[name]).any():
            raise TableError(f"{table.source} has no number in {names[name]!r}, taken for {name}.")
    data = _observe(values, variables, laws, target)
    for reason, of_reason in _by_reason(data).items():
        gone = sorted({lines[kept[row]] for row in of_reason})
        notes.append(left_out(gone, reason))
    used = {name: names[name] for name in names if name in (*data.columns, target)}
    lines_used = len({rows[kept[row]].index for row in data.rows})
    return Reading(data, table.source, used, len(table), lines_used, tuple(filter(None, notes)))


def _gather(
    table: Table, rows: Sequence[_Row], variables: Sequence[str], choice: Choice, target: str
) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """Names of the columns taken, and their values at the rows, both by variable."""
    column, numbers = _target(table, rows, choice, target)
    names, values = {target: column}, {target: numbers}
    for name in dict.fromkeys([*variables, *COMPANIONS]):
        found = _column_of(table, name, choice)
        if found and name != target:
            names[name] = found
            values[name] = [table.columns[found][row.index] for row in rows]
    # rows without a name are runs of their own, named by where they stand
    values.setdefault("run_id", [f"line {table.lines[row.index]}" for row in rows])
    if target == "loss" and choice.loss in EVERY_EXIT:
        for name, formula, numbers in _of_exits(table, rows, choice):
            names[name], values[name] = formula, numbers
    return names, values


def _observe(
    values: Mapping[str, list[Any]], variables: Sequence[str], laws: Sequence[Law], target: str
) -> Observations:
    """The rows that every law can take, those left out recorded."""
    data = Observations.read(
        values,
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


@dataclass(frozen=True)
class _Row:
    """A row of the table, or one exit of it."""

    index: int
    exit_idx: int = -1
    exits: int = 1


# what comes along where it is there, whatever the law reads
COMPANIONS = ("N", "D", "C", "G", "run_id", "weight", "seed")

# what follows from the two others, in the order N, D, C of those that are given
COMPUTE: tuple[tuple[str, str, Callable[..., np.ndarray]], ...] = (
    ("D", "C / (6 N)", lambda n, c: c / (6 * n)),
    ("N", "C / (6 D)", lambda d, c: c / (6 * d)),
    ("C", "6 N D", lambda n, d: 6 * n * d),
)


def _with_status(table: Table, choice: Choice, notes: list[str]) -> list[_Row]:
    """The rows whose status is asked for."""
    statuses = table.columns.get("status", [None] * len(table))
    # a table without statuses, or a row without one, says nothing against its runs
    rows = [i for i, status in enumerate(statuses) if status in (None, *choice.statuses)]
    others: dict[str, list[int]] = {}
    for i in sorted(set(range(len(table))) - set(rows)):
        others.setdefault(str(statuses[i]), []).append(table.lines[i])
    for status, lines in others.items():
        notes.append(left_out(lines, f"status {status}"))
    if not rows:
        raise TableError(
            f"{table.source} has no run of status {' or '.join(choice.statuses)}, only "
            f"{some(others)}."
        )
    return [_Row(i) for i in rows]


def _column_of(table: Table, name: str, choice: Choice) -> str | None:
    """The column that holds a variable, if there is one."""
    if name in choice.columns:
        return _checked(table, choice.columns[name], name)
    if name == "N" and choice.size not in SIZES:
        raise TableError(f"N is one of {some(SIZES)}, got {choice.size!r}.")
    if name == "N" and SIZES[choice.size] in table.columns:
        return SIZES[choice.size]
    if name in table.columns:
        return name
    plain = {_plain(column): column for column in reversed(list(table.columns))}
    words = ALIASES.get(name, _plain(name)).split()
    return next((plain[word] for word in words if word in plain), None)


def _checked(table: Table, column: str, name: str) -> str:
    if column not in table.columns:
        raise TableError(
            f"{table.source} has no column {column!r} for {name}; it has {some(table.columns, 20)}."
        )
    return column


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _target(
    table: Table, rows: Sequence[_Row], choice: Choice, target: str
) -> tuple[str, list[Any]]:
    """What is fitted: the column it is in, and its values."""
    asked = choice.loss
    one_exit = re.fullmatch(r"(eval_)?exit[ :]?(\d+)", asked)
    if target in choice.columns or target != "loss":
        column = _column_of(table, target, choice)
        if column is None:
            raise TableError(
                f"{table.source} has no column {target}; it has {some(table.columns)}."
            )
    elif asked in EVERY_EXIT or one_exit:
        prefix = "eval_" if asked.startswith("eval_") else ""
        column = _checked(table, LISTS[prefix], "loss")
        exits = [int(one_exit[2])] * len(rows) if one_exit else [row.exit_idx for row in rows]
        lists = [table.columns[column][row.index] for row in rows]
        label = f"{column}[{one_exit[2]}]" if one_exit else column
        return label, [_item(items, k) for items, k in zip(lists, exits, strict=True)]
    elif asked in table.columns or LOSSES.get(asked) in table.columns:
        column = LOSSES[asked] if LOSSES.get(asked) in table.columns else asked
    else:
        # a table of one loss needs no choice
        column = _column_of(table, "loss", choice) if asked == "mean" else None
        if column is None:
            raise TableError(
                f"{table.source} has no loss {asked!r}; it has {some(table.columns, 20)}. Ask for "
                f"{some(LOSSES)}, exit0 and so on, or a column."
            )
    return column, [table.columns[column][row.index] for row in rows]


def _item(items: Any, index: int) -> Any:
    return items[index] if isinstance(items, Sequence) and index < len(items) else None


def _one_per_exit(table: Table, rows: Sequence[_Row], choice: Choice) -> list[_Row]:
    """Every exit of every run as a row of its own."""
    column = _checked(table, LISTS["eval_" if choice.loss == "eval_exits" else ""], "loss")
    lists = {row.index: table.columns[column][row.index] or [] for row in rows}
    return [
        _Row(index, k, len(losses)) for index, losses in lists.items() for k in range(len(losses))
    ]


def _of_exits(
    table: Table, rows: Sequence[_Row], choice: Choice
) -> list[tuple[str, str, list[Any]]]:
    """Variables of single exits: neighbours, and parameters of the member that ends there."""
    found = [
        ("U", "shallower exits", [row.exit_idx for row in rows]),
        ("V", "deeper exits", [row.exits - 1 - row.exit_idx for row in rows]),
    ]
    if choice.size == "active" or not {"N_total", "N_non_embedding", "exits"} <= set(table.columns):
        return found
    whole, inner, depths = (table.columns[n] for n in ("N_total", "N_non_embedding", "exits"))
    sizes = []
    for row in rows:
        layers = inner[row.index] * depths[row.index][row.exit_idx] / depths[row.index][-1]
        around = whole[row.index] - inner[row.index] if choice.size == "total" else 0
        sizes.append(layers + around)
    name = SIZES[choice.size]
    return [*found, ("N", f"{name}, layers in proportion to the exit's depth", sizes)]


def _latest(rows: Sequence[_Row], values: Mapping[str, list[Any]], named: bool) -> set[int]:
    """Positions of the rows that no later row replaces.

    A named run is replaced at the same exit, N, D and G; a row without a name by its copy.
    """
    keys = ("run_id", "N", "D", "G") if named else [name for name in values if name != "run_id"]
    columns = [values[name] for name in keys if name in values]
    last = {(rows[i].exit_idx, *(str(c[i]) for c in columns)): i for i in range(len(rows))}
    return set(last.values())


def _floats(values: Sequence[Any]) -> np.ndarray:
    """Numbers, NaN for what is none."""
    numbers = [v if isinstance(v, (int, float)) else np.nan for v in values]
    return np.array(numbers, dtype=np.float64)


def _by_reason(data: Observations) -> dict[str, list[int]]:
    """Rows that [`Observations`] left out, by why."""
    reasons: dict[str, list[int]] = {}
    for gone in data.dropped:
        reason = re.sub(r"copy of row \d+", "a copy of another row", gone.reason)
        reasons.setdefault(reason, []).append(gone.row)
    return reasons


__all__ = ["LOSSES", "SIZES", "Choice", "Reading", "read_runs", "select"]
