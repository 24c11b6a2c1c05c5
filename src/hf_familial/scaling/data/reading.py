"""Columns of numbers out of any kind of table, by what it can do and not by its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import ScalingError
from .cells import number_of


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only copy."""
    array = np.array(array)
    array.flags.writeable = False
    return array


def columns_of(table: Any) -> Mapping[str, Any]:
    """Columns of a table by name, whatever kind of table it is."""
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
        f"{type(table).__name__}."
    )


def numbers(values: Any) -> np.ndarray | None:
    """A float64 copy, NaN for what is missing; None if there is text among the values."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        try:
            # frames with a missing-value mark of their own, and integers of any size
            items = [v if isinstance(v, (float, str, np.generic)) else number_of(v) for v in values]
            array = np.array(items, dtype=np.float64)
        except (TypeError, ValueError):
            return None
    return array if array.ndim == 1 else None


def floats(values: Any, name: str) -> np.ndarray:
    """A float64 copy of a column that must hold numbers."""
    array = numbers(values)
    if array is None:
        raise ScalingError(f"Column `{name}` must hold one number per row.")
    return array


def clusters(labels: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Integers from 0 in order of appearance, and the label of each."""
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([order[label] for label in labels], dtype=np.int64), tuple(order)
