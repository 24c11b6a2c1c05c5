"""A straight line in logs, and its intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ...errors import BadRowsError, ScalingError, TooFewError
from .quantity import Interval, check_level


MIN_POINTS = 3  # a slope, an intercept, and one point to judge them by


@dataclass(frozen=True)
class PowerLaw:
    """The line `log y = log coefficient + exponent log x`.

    Attributes:
        coefficient (`float`): y at x = 1.
        exponent (`float`): Slope in logarithms.
        exponent_error (`float`): Standard error of `exponent`, n - 2 degrees of freedom.
        r2 (`float`): Share of the variance of log y it explains.
        points (`int`): Pairs it was drawn through.
    """

    coefficient: float
    exponent: float
    exponent_error: float
    r2: float
    points: int

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """The value at `x`, of the same shape."""
        return np.asarray(self.coefficient * np.asarray(x, float) ** self.exponent)

    def interval(self, level: float = 0.95) -> Interval:
        """Of the exponent, by Student's t; of scatter alone, the bias of approach 2 comes on top.

        Args:
            level (`float`, *optional*, defaults to 0.95): Confidence.

        Raises:
            ScalingError: If `level` is not between 0 and 1.
        """
        check_level(level)
        reach = float(stats.t.ppf((1 + level) / 2, self.points - 2)) * self.exponent_error
        return Interval(level, self.exponent - reach, self.exponent + reach, "t")


def power_law(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> PowerLaw:
    """Ordinary or weighted least squares of log y on log x.

    Args:
        x (`ArrayLike` of shape `(n,)`): Positive.
        y (`ArrayLike` of shape `(n,)`): Positive.
        weights (`ArrayLike` of shape `(n,)`, *optional*): Of the squared residuals, such as
            `1 / std(log y)**2`.

    Returns:
        [`PowerLaw`].

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If there are fewer than 3 different `x`.
    """
    columns = [np.asarray(part, dtype=float) for part in (x, y)]
    w = np.ones_like(columns[0]) if weights is None else np.asarray(weights, dtype=float)
    check_columns({"x": columns[0], "y": columns[1], "weights": w})
    u, v = np.log(columns[0]), np.log(columns[1])
    if len(np.unique(u)) < MIN_POINTS:
        raise TooFewError(
            f"a power law needs {MIN_POINTS} different `x`, got {len(np.unique(u))}.",
            what="x",
            got=len(np.unique(u)),
            needed=MIN_POINTS,
        )
    mean_u, mean_v = np.average(u, weights=w), np.average(v, weights=w)
    du, dv = u - mean_u, v - mean_v
    exponent = float((w * du * dv).sum() / (w * du * du).sum())
    rest = float((w * (dv - exponent * du) ** 2).sum())
    total = float((w * dv * dv).sum())
    return PowerLaw(
        coefficient=math.exp(mean_v - exponent * mean_u),
        exponent=exponent,
        exponent_error=math.sqrt(rest / (len(u) - 2) / (w * du * du).sum()),
        r2=1 - rest / total if total else 1.0,
        points=len(u),
    )


def check_columns(columns: dict[str, np.ndarray]) -> None:
    """Refuse columns of different lengths, and numbers that are not positive and finite.

    Raises:
        BadRowsError: Naming the rows.
        ScalingError: If shapes differ.
    """
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ScalingError(f"columns must be flat and of one length, got shapes {shapes}.")
    for name, column in columns.items():
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if bad.size:
            raise BadRowsError(
                f"`{name}` must be positive and finite, got {column[bad[0]]} in row {bad[0]}.",
                rows=tuple(bad.tolist()),
            )
