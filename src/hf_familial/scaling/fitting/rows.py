"""Which rows a fit uses: reading, weights, outliers, and whether they can bear the law."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ...errors import ScalingError, TooFewError
from ..data.minima import best_of_each
from ..data.observations import Observations
from ..data.reading import columns_of
from ..laws.law import Law
from ..laws.vocabulary import LOSS
from .result import LargestLosses, Settings


FLAT = 1e-6  # range of logs of a variable that does not vary
ALIKE = 0.02  # of that range, within which a power of another variable leaves nothing


def usable_rows(law: Law, data: Any, weights: Any, settings: Settings) -> Observations:
    """The rows to fit: read, weighted, judged.

    Args:
        law ([`Law`]): The law.
        data ([`Observations`] or a table): As for `fit`.
        weights (array, *optional*): One positive number per row.
        settings ([`Settings`]): Its rule for outliers, where that needs no fit.

    Raises:
        ScalingError: Of every kind that `fit` names for rows.
    """
    if not isinstance(data, Observations):
        columns = columns_of(data)
        data = Observations.read(
            columns,
            loss=law.target.name if law.target.name in columns else LOSS.name,
            run_id="run_id" if "run_id" in columns else None,
            needed=law.variable_names,
        )
    if weights is not None:
        array = np.array(weights, dtype=np.float64)
        if array.shape != data.loss.shape or not (array > 0).all() or not np.isfinite(array).all():
            raise ScalingError(
                f"`weights` must be {len(data)} positive numbers, one per row, got shape "
                f"{array.shape}."
            )
        data = dataclasses.replace(data, weight=array * data.weight)
    data = _of_rule(data.for_law(law), law)
    if isinstance(settings.outliers, LargestLosses) and settings.outliers.count > 0:
        count = min(settings.outliers.count, len(data))
        drop = data.loss >= np.sort(data.loss)[-count]
        data = data.without(drop, f"among the {count} largest losses")
    if not settings.fixed and not settings.tied:
        for variable in law.variables:
            levels = len(np.unique(data.columns[variable.name]))
            if levels < variable.levels:
                what = "never varies" if levels == 1 else f"takes {levels} values only"
                raise TooFewError(
                    f"`{variable.name}` {what}; `{law.name}` needs at least {variable.levels}, or "
                    "parameters fixed.",
                    variable.name,
                    levels,
                    variable.levels,
                )
    return data


def _of_rule(data: Observations, law: Law) -> Observations:
    """The rows of a rule for settings: the best that were tried, where their loss is known."""
    if law.target.name == LOSS.name or LOSS.name not in data.columns:
        return data
    best = best_of_each(data.columns, law.variable_names, data.columns[LOSS.name])
    return data.without(~best, f"another `{law.target.name}` of its size has a lower loss")


def proportional(law: Law, data: Observations) -> str:
    """Return which variables of a law follow another in every row, in words; empty if none do.

    Where D is a multiple of N, or a power of it, no row tells their effects apart.

    Args:
        law ([`Law`]): Its variables are looked at.
        data ([`Observations`]): The rows.
    """
    names = [name for name in law.variable_names if (data.columns[name] > 0).all()]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            x, y = (np.log(data.columns[name]) for name in (first, second))
            if np.ptp(x) < FLAT or np.ptp(y) < FLAT:
                continue
            slope, offset = np.polyfit(x, y, 1)
            if np.abs(y - slope * x - offset).max() > ALIKE * np.ptp(y):
                continue
            if abs(slope - 1) < 0.02:
                ratio = float(np.exp(np.mean(y - x)))
                return f"`{second}` is proportional to `{first}` (about {ratio:.3g} times it)"
            return f"`{second}` goes as `{first}`^{slope:.3g}"
    return ""


def far_rows(residual: np.ndarray, threshold: float) -> np.ndarray:
    """Which residuals are far from their median.

    Args:
        residual (`np.ndarray`): (rows,).
        threshold (`float`): In robust standard deviations.

    Returns:
        `np.ndarray`: Booleans, (rows,).
    """
    off = np.abs(residual - np.median(residual))
    return off > threshold * 1.4826 * np.median(off)
