"""The rows a law is fitted to: read from any table, checked, never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import BadRowsError, MissingColumnError, ScalingError, TooFewError
from ..laws.law import Law
from ..laws.vocabulary import LOSS
from .cells import is_missing
from .reading import clusters, columns_of, floats, frozen, numbers


BadRows = Literal["raise", "drop"]
Duplicates = Literal["raise", "drop", "merge", "keep"]

SHOWN = 5  # rows an error names


@dataclass(frozen=True)
class DroppedRow:
    """A row that was left out.

    Attributes:
        row (`int`): Its number in the table that was given, from 0.
        reason (`str`): Why.
    """

    row: int
    reason: str


@dataclass(frozen=True, eq=False)
class Observations:
    """Runs, one row each: variables, what was measured, and which rows are not independent.

    Make one with `Observations.read`. Arrays are read-only float64 copies; what was given is never
    written to.

    Attributes:
        columns (`Mapping[str, np.ndarray]`): Variables and further numbers by name, each of shape
            (rows,).
        loss (`np.ndarray`): What was measured, of shape (rows,): nats per token.
        weight (`np.ndarray`): Of shape (rows,); 2 counts a row twice.
        run_id (`np.ndarray`): Cluster of every row, integers of shape (rows,) from 0 without
            gaps: checkpoints of one run share one. All differ where none was given.
        run_names (`tuple[str, ...]`): Name of every cluster, as it was given.
        rows (`np.ndarray`): Number of every row in the table that was given.
        dropped (`tuple[DroppedRow, ...]`): Rows left out, and why.
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
        """Number of clusters."""
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
    ) -> Observations:
        """Copy rows out of a table.

        Args:
            table: A mapping of columns, a pandas or polars frame, a record array, a list of
                records, anything with a mapping `columns`, or an `Observations`.
            loss (`str`): Column of what was measured.
            weight (`str`, *optional*): Column of weights; without it every row weighs 1.
            run_id (`str`, *optional*): Column naming the run of every row; without it rows are
                independent, and so is a row whose name is missing.
            needed (`Sequence[str]`): Columns that every row must fill; of the others, those that
                hold a finite number in every row that counts are kept.
            bad_rows (`str`): `"raise"` refuses rows in which a needed number is missing or not
                finite, or loss or weight is not positive; `"drop"` leaves them out and records it.
            duplicates (`str`): Rows equal in everything kept, the run included: `"raise"`, `"drop"`
                all but the first, `"merge"` them into the first with the sum of their weights, or
                `"keep"`.

        Returns:
            [`Observations`]

        Raises:
            MissingColumnError: If a named column is not there.
            BadRowsError: If rows are bad or duplicated and that is to be refused.
            TooFewError: If no row is left.

        Example:
            >>> Observations.read({"N": [1e8, 2e8], "D": [2e9, 4e9], "loss": [3.1, 2.9]})
        """
        if isinstance(table, Observations):
            return table
        source = columns_of(table)
        named = [name for name in (loss, weight, run_id) if name is not None]
        missing = tuple(n for n in [*named, *needed] if n not in source)
        if missing:
            raise MissingColumnError(
                f"The table has columns {list(source)}; missing: {list(missing)}.", missing
            )
        kept = {name: floats(source[name], name) for name in needed}
        others = {n: numbers(source[n]) for n in source if n not in named and n not in kept}
        losses = floats(source[loss], loss)
        weights = np.ones(len(losses)) if weight is None else floats(source[weight], weight)
        labels = range(len(losses)) if run_id is None else list(source[run_id])
        lengths = {len(v) for v in [losses, weights, labels, *kept.values()]}
        lengths |= {len(v) for v in others.values() if v is not None}
        if len(lengths) > 1:
            raise ScalingError(f"Columns must have the same length, got lengths {sorted(lengths)}.")
        finite = np.all([np.isfinite(v) for v in [losses, weights, *kept.values()]], axis=0)
        missing_some = np.any([np.isnan(v) for v in [losses, weights, *kept.values()]], axis=0)
        # a row that is left out anyway says nothing against a column
        kept |= {n: v for n, v in others.items() if v is not None and np.isfinite(v[finite]).all()}
        groups, names = clusters(
            [f"row {i}" if is_missing(v) or is_missing(str(v)) else str(v) for i, v in enumerate(
                labels)]
        )  # fmt: skip
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
    ) -> Observations:
        """The rows that are left when some are dropped; they are recorded.

        Args:
            drop (`np.ndarray`): Booleans of shape (rows,).
            reasons (`np.ndarray` or `str`): Why, for each or for all.
            bad_rows (`str`): `"raise"` refuses instead.

        Raises:
            BadRowsError: If a row is to be dropped and `bad_rows` is `"raise"`.
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
            raise BadRowsError(f"Unusable rows: {shown}{more}.", tuple(g.row for g in gone))
        if drop.all():
            raise TooFewError(f"No row is left: {gone[0].reason}.", "rows", 0, 1)
        left = self.take(np.flatnonzero(~drop))
        dropped = tuple(sorted((*self.dropped, *gone), key=lambda g: g.row))
        return dataclasses.replace(left, dropped=dropped)

    def take(self, index: np.ndarray) -> Observations:
        """Rows by position, for subsets; none is recorded as dropped.

        Args:
            index (`np.ndarray`): Positions, or booleans of shape (rows,).
        """
        names = np.asarray(self.run_names, dtype=object)[self.run_id[index]]
        groups, run_names = clusters([str(name) for name in names])
        return Observations(
            {name: frozen(v[index]) for name, v in self.columns.items()},
            frozen(self.loss[index]),
            frozen(self.weight[index]),
            frozen(groups),
            run_names,
            frozen(self.rows[index]),
            self.dropped,
        )

    def for_law(self, law: Law, bad_rows: BadRows = "raise") -> Observations:
        """The rows that a law can take.

        Args:
            law ([`Law`]): Its variables must be among the columns.
            bad_rows (`str`): `"raise"` refuses values outside a variable's range, `"drop"` drops
                their rows.

        Raises:
            MissingColumnError: If a variable is missing.
            BadRowsError: If a value is out of range and that is to be refused.
        """
        missing = tuple(n for n in law.variable_names if n not in self.columns)
        if missing:
            raise MissingColumnError(
                f"`{law.name}` reads {list(law.variable_names)}; the rows have "
                f"{list(self.columns)}; missing: {list(missing)}.",
                missing,
            )
        data = self
        for variable in law.variables:
            values = data.columns[variable.name]
            reason = f"`{variable.name}` must be {variable.range_text}"
            data = data.without(~variable.lawful(values), reason, bad_rows)
        return data

    def with_columns(self, **columns: Any) -> Observations:
        """The same rows with further columns, or others in their place; float64 copies."""
        new = {name: frozen(floats(values, name)) for name, values in columns.items()}
        if any(len(values) != len(self) for values in new.values()):
            raise ScalingError(f"New columns must have {len(self)} values each.")
        return dataclasses.replace(self, columns={**self.columns, **new})

    def to_dict(self) -> dict[str, Any]:
        """JSON form: lists of numbers; `from_dict` reads it back bit for bit."""
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
    def from_dict(cls, data: Mapping[str, Any]) -> Observations:
        """Read `to_dict`'s form."""
        return cls(
            {name: frozen(floats(values, name)) for name, values in data["columns"].items()},
            frozen(floats(data[LOSS.name], LOSS.name)),
            frozen(floats(data["weight"], "weight")),
            frozen(np.array(data["run_id"], dtype=np.int64)),
            tuple(data["run_names"]),
            frozen(np.array(data["rows"], dtype=np.int64)),
            tuple(DroppedRow(**row) for row in data["dropped"]),
        )

    def _single(self, duplicates: Duplicates, named: bool) -> Observations:
        """The rows without exact copies."""
        if duplicates == "keep" or len(self) < 2:
            return self
        # rows without a run of their own differ by nothing but their numbers
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
            data = dataclasses.replace(self, weight=frozen(total))
        reasons = np.array([f"copy of row {row}" for row in self.rows[first[inverse]]])
        return data.without(copies, reasons, "raise" if duplicates == "raise" else "drop")
