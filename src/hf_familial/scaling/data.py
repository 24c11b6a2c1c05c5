"""The table of runs that a law is fitted to: checked and read-only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import BadRowsError, MissingColumnError, ScalingError, TooFewError
from ._cells import is_missing, number_of
from .laws.law import LOSS, Law


BadRows = Literal["raise", "drop"]
Duplicates = Literal["raise", "drop", "merge", "keep"]

SHOWN = 5  # largest number of rows in an error message


@dataclass(frozen=True)
class DroppedRow:
    """A row that was left out: its number in the original table (from 0), and the reason."""

    row: int
    reason: str


@dataclass(frozen=True, eq=False)
class RunTable:
    """A table of runs: one row per run, or per checkpoint of a run.

    Build one with `RunTable.read`. Arrays are read-only float64 copies of shape (rows,).

    Attributes:
        columns (`Mapping[str, np.ndarray]`): Variables such as N and D, and other numbers, by name.
        loss (`np.ndarray`): The measured losses, in nats per token.
        weight (`np.ndarray`): Weights of the rows. A row of weight 2 counts twice.
        run_id (`np.ndarray`): Index of the run of every row, an integer from 0. Checkpoints of one
            run have the same index. Every row has its own index if no column names the runs.
        run_names (`tuple[str, ...]`): Name of every run, by index.
        rows (`np.ndarray`): Number of every row in the original table.
        dropped (`tuple[DroppedRow, ...]`): The rows that were left out, with reasons.
    """

    columns: Mapping[str, np.ndarray]
    loss: np.ndarray
    weight: np.ndarray
    run_id: np.ndarray
    run_names: tuple[str, ...]
    rows: np.ndarray
    dropped: tuple[DroppedRow, ...] = ()

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def runs(self) -> int:
        """The number of runs."""
        return len(self.run_names)

    @classmethod
    def read(
        cls,
        table: Any,
        loss: str = "loss",
        weight: str | None = None,
        run_id: str | None = None,
        needed: Sequence[str] = (),
        bad_rows: BadRows = "raise",
        duplicates: Duplicates = "raise",
    ) -> RunTable:
        """Copy the rows of a table and check them.

        Args:
            table: A mapping of columns, a pandas or polars frame, a record array, a list of
                records, an object whose `columns` is a mapping, or a `RunTable`.
            loss (`str`): Name of the column with the measured loss.
            weight (`str`): Name of the column with weights. By default every row has weight 1.
            run_id (`str`): Name of the column that names the run of every row. Without it, or
                if the name is missing in a row, the row is a run of its own.
            needed (`Sequence[str]`): Columns that need a number in every row. Other columns are
                kept only if they have a finite number in every row that is used.
            bad_rows (`str`): What to do if a needed number is missing or not finite, or the loss
                or weight is not positive: `"raise"`, or `"drop"` the rows and record them.
            duplicates (`str`): What to do with rows that are equal in all kept columns and the
                run: `"raise"`, `"drop"` all but the first, `"merge"` (add the weights) or `"keep"`.

        Raises:
            MissingColumnError: If the table lacks a named column.
            BadRowsError: If rows are bad or repeated, and the setting is `"raise"`.
            TooFewError: If no row is left.

        Example:
            >>> len(RunTable.read({"N": [1e8, 2e8], "D": [2e9, 4e9], "loss": [3.1, 2.9]}))
            2
        """
        if isinstance(table, RunTable):
            return table
        source = columns_of(table)
        named = [name for name in (loss, weight, run_id) if name is not None]
        missing = tuple(n for n in [*named, *needed] if n not in source)
        if missing:
            raise MissingColumnError(
                f"The table has columns {list(source)}, missing: {list(missing)}.", missing
            )
        kept = {name: _floats(source[name], name) for name in needed}
        others = {n: _numbers(source[n]) for n in source if n not in named and n not in kept}
        losses = _floats(source[loss], loss)
        weights = np.ones(len(losses)) if weight is None else _floats(source[weight], weight)
        labels = range(len(losses)) if run_id is None else list(source[run_id])
        lengths = {len(v) for v in [losses, weights, labels, *kept.values()]}
        lengths |= {len(v) for v in others.values() if v is not None}
        if len(lengths) > 1:
            raise ScalingError(f"Columns must have the same length, got lengths {sorted(lengths)}.")
        finite = np.all([np.isfinite(v) for v in [losses, weights, *kept.values()]], axis=0)
        missing_some = np.any([np.isnan(v) for v in [losses, weights, *kept.values()]], axis=0)
        # a missing number does not count against a column if its row is left out anyway
        kept |= {n: v for n, v in others.items() if v is not None and np.isfinite(v[finite]).all()}
        groups, names = _clusters(
            [
                f"row {i}" if is_missing(v) or is_missing(str(v)) else str(v)
                for i, v in enumerate(labels)
            ]
        )
        data = cls(kept, losses, weights, groups, names, np.arange(len(losses)))
        for array in (losses, weights, groups, data.rows, *kept.values()):
            array.flags.writeable = False
        positive = (losses > 0) & (weights > 0)
        reasons = np.where(missing_some, "a number is missing", "a number is not finite")
        reasons = np.where(finite, "loss or weight is not positive", reasons)
        data = data.without(~(finite & positive), reasons, bad_rows)
        return data._single(duplicates, named=run_id is not None)

    def without(
        self, drop: np.ndarray, reasons: np.ndarray | str, bad_rows: BadRows = "drop"
    ) -> RunTable:
        """Return the table without some rows, and record them in `dropped`.

        Args:
            drop (`np.ndarray`): True for each row to leave out, shape (rows,).
            reasons (`str` or array of shape (rows,)): The reasons to record.
            bad_rows (`str`): `"drop"`, or `"raise"` an error if `drop` marks any row.

        Raises:
            BadRowsError: If `drop` marks a row and `bad_rows` is `"raise"`.
            TooFewError: If no row is left.
        """
        if not drop.any():
            return self
        reasons = np.broadcast_to(np.asarray(reasons), drop.shape)
        gone = [
            DroppedRow(int(row), str(reason))
            for row, reason in zip(self.rows[drop], reasons[drop], strict=True)
        ]
        if bad_rows == "raise":
            shown = "; ".join(f"row {g.row}: {g.reason}" for g in gone[:SHOWN])
            more = f"; and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
            raise BadRowsError(
                f"The table has rows that cannot be used: {shown}{more}.",
                tuple(g.row for g in gone),
            )
        if drop.all():
            raise TooFewError(f"No row is left: {gone[0].reason}.", "rows", 0, 1)
        left = self.take(np.flatnonzero(~drop))
        dropped = tuple(sorted((*self.dropped, *gone), key=lambda g: g.row))
        return dataclasses.replace(left, dropped=dropped)

    def take(self, index: np.ndarray) -> RunTable:
        """Return a subset of rows by position or by booleans, without a record in `dropped`."""
        names = np.asarray(self.run_names, dtype=object)[self.run_id[index]]
        groups, run_names = _clusters([str(name) for name in names])
        return RunTable(
            {name: _frozen(v[index]) for name, v in self.columns.items()},
            _frozen(self.loss[index]),
            _frozen(self.weight[index]),
            _frozen(groups),
            run_names,
            _frozen(self.rows[index]),
            self.dropped,
        )

    def for_law(self, law: Law, bad_rows: BadRows = "raise") -> RunTable:
        """Return the rows with valid values of all variables of a law.

        Raises:
            MissingColumnError: If the rows lack a variable of the law.
            BadRowsError: If a value is out of a variable's range and `bad_rows` is `"raise"`.
        """
        missing = tuple(n for n in law.variable_names if n not in self.columns)
        if missing:
            raise MissingColumnError(
                f"`{law.name}` needs the columns {list(law.variable_names)}. The rows have "
                f"{list(self.columns)}, missing: {list(missing)}.",
                missing,
            )
        data = self
        for variable in law.variables:
            values = data.columns[variable.name]
            reason = f"`{variable.name}` must be {variable.range_text}"
            data = data.without(~variable.lawful(values), reason, bad_rows)
        return data

    def with_columns(self, **columns: Any) -> RunTable:
        """Return the same rows with columns added or replaced."""
        new = {name: _frozen(_floats(values, name)) for name, values in columns.items()}
        if any(len(values) != len(self) for values in new.values()):
            raise ScalingError(
                f"New columns must have {len(self)} values each, got "
                f"{sorted({len(values) for values in new.values()})}."
            )
        return dataclasses.replace(self, columns={**self.columns, **new})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form. `from_dict` restores the same table bit for bit."""
        return {
            "columns": {name: values.tolist() for name, values in self.columns.items()},
            LOSS.name: self.loss.tolist(),
            "weight": self.weight.tolist(),
            "run_id": self.run_id.tolist(),
            "run_names": list(self.run_names),
            "rows": self.rows.tolist(),
            "dropped": [dataclasses.asdict(row) for row in self.dropped],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunTable:
        """Build a table from the form that `to_dict` returns."""
        return cls(
            {name: _frozen(_floats(values, name)) for name, values in data["columns"].items()},
            _frozen(_floats(data[LOSS.name], LOSS.name)),
            _frozen(_floats(data["weight"], "weight")),
            _frozen(np.array(data["run_id"], dtype=np.int64)),
            tuple(data["run_names"]),
            _frozen(np.array(data["rows"], dtype=np.int64)),
            tuple(DroppedRow(**row) for row in data["dropped"]),
        )

    def _single(self, duplicates: Duplicates, named: bool) -> RunTable:
        """Keep, drop, merge or reject rows that are exact copies, see `read`."""
        if duplicates == "keep" or len(self) < 2:
            return self
        # without named runs, rows with the same numbers are copies
        runs = [self.run_id] if named else []
        table = np.column_stack([self.loss, *runs, *self.columns.values()])
        _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        copies = first[inverse] != np.arange(len(self))
        if not copies.any():
            return self
        data = self
        if duplicates == "merge":
            total = np.bincount(inverse, self.weight)[inverse]
            data = dataclasses.replace(self, weight=_frozen(total))
        reasons = np.array([f"copy of row {row}" for row in self.rows[first[inverse]]])
        return data.without(copies, reasons, "raise" if duplicates == "raise" else "drop")


def columns_of(table: Any) -> Mapping[str, Any]:
    """Return the columns of a table by name. Any object with a suitable interface is accepted."""
    if isinstance(table, Mapping):
        return table
    names = getattr(getattr(table, "dtype", None), "names", None)
    if names:
        return {name: table[name] for name in names}
    columns = getattr(table, "columns", None)
    if isinstance(columns, Mapping):
        return columns
    if columns is not None and hasattr(table, "__getitem__"):
        return {str(name): table[name] for name in columns}
    if isinstance(table, Sequence) and table and all(isinstance(row, Mapping) for row in table):
        keys = dict.fromkeys(key for row in table for key in row)
        return {key: [row.get(key) for row in table] for key in keys}
    raise ScalingError(
        "`data` must be a mapping of columns, a frame, a record array or a list of records, got "
        f"a {type(table).__name__}."
    )


def settings_of(columns: Mapping[str, np.ndarray], variables: tuple[str, ...]) -> np.ndarray:
    """Return an integer per row that is equal for rows with the same variables, N, D and G."""
    names = [name for name in dict.fromkeys((*variables, "N", "D", "G")) if name in columns]
    table = np.nan_to_num(np.column_stack([columns[name] for name in names]), nan=-1.0)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)


def best_of_each(
    columns: Mapping[str, np.ndarray], variables: tuple[str, ...], loss: np.ndarray
) -> np.ndarray:
    """Return a mask of the rows with the least loss among the rows with the same setting.

    The first of equal losses counts. The loss is NaN if a run diverged. Rules for the learning
    rate and batch size are fitted to these rows only.
    """
    setting = settings_of(columns, variables)
    order = np.lexsort((np.arange(len(loss)), loss, setting))  # NaN comes last
    first = np.concatenate([[True], np.diff(setting[order]) > 0])
    best = np.zeros(len(loss), bool)
    best[order[first]] = True
    return best & np.isfinite(loss)


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.array(array)
    array.flags.writeable = False
    return array


def _numbers(values: Any) -> np.ndarray | None:
    """Copy values as float64, with NaN for missing ones. Return `None` if one of them is text."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        try:
            # some frames have their own marks for missing values, and integers can be very large
            items = [v if isinstance(v, (float, str, np.generic)) else number_of(v) for v in values]
            array = np.array(items, dtype=np.float64)
        except (TypeError, ValueError):
            return None
    return array if array.ndim == 1 else None


def _floats(values: Any, name: str) -> np.ndarray:
    array = _numbers(values)
    if array is None:
        raise ScalingError(f"Column `{name}` must have one number per row.")
    return array


def _clusters(labels: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number the labels from 0 in order of appearance. Also return the different labels."""
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([order[label] for label in labels], dtype=np.int64), tuple(order)
