"""The best of several tried settings: rules for rates and batches are fitted to these alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def best_of_each(
    columns: Mapping[str, np.ndarray], variables: tuple[str, ...], loss: np.ndarray
) -> np.ndarray:
    """Return which rows have the least loss among those of the same sizes.

    Args:
        columns (`Mapping[str, np.ndarray]`): Columns of the rows, (rows,).
        variables (`tuple[str, ...]`): Variables of the rule; N, D and G count besides.
        loss (`np.ndarray`): Loss of every row; NaN where a run diverged.

    Returns:
        `np.ndarray`: Booleans, (rows,); the first of several equal losses counts.
    """
    names = [name for name in dict.fromkeys((*variables, "N", "D", "G")) if name in columns]
    table = np.nan_to_num(np.column_stack([columns[name] for name in names]), nan=-1.0)
    setting = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((np.arange(len(loss)), loss, setting))  # NaN comes last
    first = np.concatenate([[True], np.diff(setting[order]) > 0])
    best = np.zeros(len(loss), bool)
    best[order[first]] = True
    return best & np.isfinite(loss)


def at_edge(
    columns: Mapping[str, np.ndarray],
    variables: tuple[str, ...],
    target: np.ndarray,
    best: np.ndarray,
) -> int:
    """Return for how many sizes the best setting is the smallest or largest that was tried."""
    names = [name for name in dict.fromkeys((*variables, "N", "D", "G")) if name in columns]
    table = np.nan_to_num(np.column_stack([columns[name] for name in names]), nan=-1.0)
    setting = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    edges = 0
    for row in np.flatnonzero(best):
        tried = target[setting == setting[row]]
        tried = tried[np.isfinite(tried)]
        several = len(np.unique(tried)) > 1
        edges += bool(several and target[row] in (tried.min(), tried.max()))
    return edges


__all__ = ["at_edge", "best_of_each"]
