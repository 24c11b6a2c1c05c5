"""IsoFLOP approaches 1 and 2: optima read off runs of equal compute, without a law."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from ..errors import BadRowsError, BiasWarning, NoMinimumError, ScalingError, TooFewError
from .quantities import Interval, check_level


# scale -> how the loss enters the parabola, and how its value at the minimum becomes a loss again
SCALES: Mapping[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[float], float]]] = {
    "loss": (np.asarray, float),
    "log": (np.log, math.exp),
    "exp": (np.exp, math.log),
}
Outside = Literal["refuse", "keep"]

# of a line and of budgets: a slope, an intercept, and one to judge them by; of sizes that lead
MIN_POINTS = MIN_BUDGETS = MIN_LEADERS = 3
MIN_SIZES = 4  # a parabola, and one point to judge it by
OFF_CENTRE, DRIFTING, WIDE = 0.25, 0.25, 30.0  # of half the width, of it too, in sizes


@dataclass(frozen=True)
class PowerLaw:
    """The line `log y = log coefficient + exponent log x`."""

    coefficient: float  # y at x = 1
    exponent: float  # slope in logarithms
    exponent_error: float  # standard error of `exponent`, n - 2 degrees of freedom
    r2: float  # share of the variance of log y it explains
    points: int  # pairs it was drawn through

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """Return the value at `x`, of the same shape."""
        return np.asarray(self.coefficient * np.asarray(x, float) ** self.exponent)

    def interval(self, level: float = 0.95) -> Interval:
        """Return the exponent's interval by Student's t; the bias of approach 2 comes on top."""
        check_level(level)
        reach = float(stdtrit(self.points - 2, (1 + level) / 2)) * self.exponent_error
        return Interval(level, self.exponent - reach, self.exponent + reach, "t")


def power_law(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> PowerLaw:
    """Fit log y to log x by least squares; `weights` are of the squared residuals."""
    columns = [np.asarray(part, dtype=float) for part in (x, y)]
    w = np.ones_like(columns[0]) if weights is None else np.asarray(weights, dtype=float)
    _check_columns({"x": columns[0], "y": columns[1], "weights": w})
    u, v = np.log(columns[0]), np.log(columns[1])
    _need(len(np.unique(u)), MIN_POINTS, "x", "a power law needs {needed} different `x`")
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


@dataclass(frozen=True)
class Curve:
    """The runs of one budget and where their loss is least.

    Attributes:
        offset: Where the minimum lies between the smallest run (-1), the geometric middle of the
            sizes (0) and the largest (1).
    """

    budget: float  # compute in FLOPs: the geometric mean over its runs
    rows: tuple[int, ...]  # the runs, as rows of the arrays given
    N: float  # parameters at the minimum
    D: float  # training tokens at the minimum
    loss: float  # loss at the minimum, nats per token
    curvature: float  # second derivative of the scaled loss by log N there; positive
    offset: float
    span: float  # ratio of the largest size to the smallest

    @property
    def side(self) -> str:
        """The end of the sizes that the minimum is nearer to."""
        return "largest" if self.offset > 0 else "smallest"


@dataclass(frozen=True)
class IsoFlop:
    """Optima by approach 1 or 2, and the power laws through them.

    Attributes:
        approach (`int`): 1, the envelope of training curves, or 2, a parabola per budget.
        N (`PowerLaw`): Optimal parameters against FLOPs.
        D (`PowerLaw`): Optimal tokens against FLOPs.
        curves (`tuple[Curve, ...]`): Approach 2: the parabolas, by budget.
        scale (`str`): How the loss entered the parabola.
        notes (`tuple[str, ...]`): What in the sampling makes the result doubtful.
    """

    approach: int
    N: PowerLaw
    D: PowerLaw
    curves: tuple[Curve, ...]
    scale: str
    notes: tuple[str, ...]


def parabolas(
    C: ArrayLike,
    N: ArrayLike,
    loss: ArrayLike,
    D: ArrayLike | None = None,
    scale: str = "loss",
    budget_rtol: float = 0.05,
    outside: Outside = "refuse",
) -> IsoFlop:
    """Run approach 2: a parabola in log N per budget, one in log D, a line through the minima.

    Sampling that is wide biases the coefficient; sampling whose centre leaves the minimum biases
    the exponent too. `parabola_bias` measures both; [`fit`] (approach 3) has neither.

    Args:
        C (`ArrayLike`): Training FLOPs of each run, of shape (n,), as all that follow.
        N (`ArrayLike`): Parameters.
        loss (`ArrayLike`): Nats per token.
        D (`ArrayLike`): Training tokens; `C / 6N` without it.
        scale (`str`): Draw the parabola through the `"loss"`, its `"log"`, or its `"exp"`.
        budget_rtol (`float`): A gap in FLOPs wider than this share parts two budgets.
        outside (`str`): `"keep"` extrapolates to a minimum outside the sizes that were run.

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If there are fewer than 3 budgets, or fewer than 4 sizes in one.
        NoMinimumError: If a parabola opens downward, or its minimum lies outside.

    Reference: Hoffmann et al. 2022, arXiv:2203.15556, section 3.2; the bias:
    https://github.com/Open-Athena/scaling-law-analysis.
    """
    if scale not in SCALES:
        raise ScalingError(f"`scale` must be one of {sorted(SCALES)}, got {scale!r}.")
    found = draw(_columns(C, N, loss, D), scale, budget_rtol, outside)
    for note in found.notes:
        warnings.warn(note, BiasWarning, stacklevel=2)
    return found


def draw(
    columns: dict[str, np.ndarray], scale: str, budget_rtol: float, outside: Outside
) -> IsoFlop:
    """Run `parabolas` on columns `C`, `N`, `D` and `loss`, without its warnings."""
    _check_columns(columns)
    groups = budgets(columns["C"], budget_rtol)
    _need(len(groups), MIN_BUDGETS, "budgets", "approach 2 needs {needed} budgets")
    curves = tuple(_curve(columns, rows, scale, outside) for rows in groups)
    flops = [curve.budget for curve in curves]
    N, D = (power_law(flops, [getattr(curve, name) for curve in curves]) for name in "ND")
    return IsoFlop(2, N, D, curves, scale, tuple(_doubts(curves)))


def budgets(C: np.ndarray, rtol: float = 0.05) -> list[np.ndarray]:
    """Return the rows of each budget, by rising compute; a gap wider than `rtol` parts two."""
    order = np.argsort(C, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(C[order])) > math.log1p(rtol)) + 1
    return [np.sort(rows) for rows in np.split(order, cuts)]


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return the minimum of the parabola through points, its value, and the second derivative.

    The first two are NaN where the parabola opens downward.
    """
    middle, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
    a, b, c = np.polyfit((x - middle) / half, y, 2)
    if a <= 0:
        return math.nan, math.nan, 2 * a / half**2
    return middle - half * b / (2 * a), c - b * b / (4 * a), 2 * a / half**2


def _curve(columns: dict[str, np.ndarray], rows: np.ndarray, scale: str, outside: Outside) -> Curve:
    C, N, D, loss = (columns[name][rows] for name in ("C", "N", "D", "loss"))
    budget = float(np.exp(np.log(C).mean()))
    sizes = "a parabola needs {needed} sizes, got {got} at " + f"{budget:.3g} FLOPs"
    _need(len(np.unique(N)), MIN_SIZES, "N", sizes)
    scaled, unscaled = SCALES[scale]
    y = scaled(loss)
    (x, least, curvature), (z, _, _) = vertex(np.log(N), y), vertex(np.log(D), y)
    for name, at, values in (("N", x, np.log(N)), ("D", z, np.log(D))):
        inside = values.min() < at < values.max()
        if math.isnan(at) or not inside and outside == "refuse":
            where = f"it lies at {math.exp(at):.3g}" if at == at else "the parabola opens downward"
            raise NoMinimumError(
                f"no minimum of the loss between the smallest and the largest `{name}` at "
                f"{budget:.3g} FLOPs ({math.exp(values.min()):.3g} to "
                f"{math.exp(values.max()):.3g}; {where}); run sizes on that side or leave the "
                "budget out.",
                budget,
            )
    low, high = np.log(N.min()), np.log(N.max())
    return Curve(
        budget=budget,
        rows=tuple(rows.tolist()),
        N=math.exp(x),
        D=math.exp(z),
        loss=unscaled(least),
        curvature=curvature,
        offset=float((x - (low + high) / 2) / ((high - low) / 2)),
        span=math.exp(high - low),
    )


def _doubts(curves: Sequence[Curve]) -> Iterable[str]:
    """Yield what in the sampling biases approach 2, in sentences."""
    worst = max(curves, key=lambda curve: abs(curve.offset))
    if abs(worst.offset) > 1:
        yield (
            f"sampling misses the minimum: at {worst.budget:.3g} FLOPs it lies beyond the "
            f"{worst.side} size; it is extrapolated."
        )
    elif abs(worst.offset) > OFF_CENTRE:
        yield (
            f"sampling is off-centre: at {worst.budget:.3g} FLOPs the minimum lies "
            f"{abs(worst.offset):.0%} of the way from the middle of the sizes to the "
            f"{worst.side}; the coefficient is biased."
        )
    shift = np.polyfit(np.log([c.budget for c in curves]), [c.offset for c in curves], 1)[0]
    shift *= math.log(curves[-1].budget / curves[0].budget)
    if abs(shift) > DRIFTING:
        yield (
            f"the centre of the sampling drifts: the minimum moves by {abs(shift):.0%} of the half "
            "width from the smallest budget to the largest; the exponent is biased."
        )
    widest = max(curves, key=lambda curve: curve.span)
    if widest.span > WIDE:
        yield (
            f"sampling is wide: sizes span a factor of {widest.span:.0f} at {widest.budget:.3g} "
            "FLOPs, where a curve is no parabola; the coefficient is biased."
        )


def envelope(
    C: ArrayLike,
    N: ArrayLike,
    loss: ArrayLike,
    run_id: ArrayLike,
    D: ArrayLike | None = None,
    points: int = 1500,
) -> IsoFlop:
    """Run approach 1: power laws through the runs of least loss at each compute.

    Curves are joined in logs of loss and FLOPs. A compute at which the smallest or the largest of
    the sizes trained that far leads is left out: a size that was not run might have led. The losses
    must come from schedules that end where they are read, or that do not decay.

    Args:
        C (`ArrayLike`): FLOPs spent at each checkpoint, of shape (n,), as all that follow.
        N (`ArrayLike`): Parameters.
        loss (`ArrayLike`): Nats per token, smoothed.
        run_id (`ArrayLike`): Run of each checkpoint.
        D (`ArrayLike`): Tokens seen; `C / 6N` without it.
        points (`int`): Computes looked at, evenly spaced in logs.

    Returns:
        [`IsoFlop`]: Without curves. The error of the exponents is that of a line through the sizes
            that
        lead: neighbouring computes are not independent.

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If fewer than 3 sizes lead between others.

    Reference: Hoffmann et al. 2022, arXiv:2203.15556, section 3.1.
    """
    columns = _columns(C, N, loss, D)
    _check_columns(columns)
    logs = {name: np.log(column) for name, column in columns.items()}
    names, run = np.unique(np.asarray(run_id).astype(str), return_inverse=True)
    grid = np.linspace(logs["C"].min(), logs["C"].max(), points)
    heights = np.full((len(names), points), np.inf)
    tokens = np.zeros((len(names), points))
    size = np.array([logs["N"][run == number].mean() for number in range(len(names))])
    for number in range(len(names)):
        rows = np.flatnonzero(run == number)
        rows = rows[np.argsort(logs["C"][rows])]
        at = logs["C"][rows]
        covered = (grid >= at[0]) & (grid <= at[-1])
        heights[number, covered] = np.interp(grid[covered], at, logs["loss"][rows])
        tokens[number] = np.interp(grid, at, logs["D"][rows])
    leader, there = np.argmin(heights, axis=0), np.isfinite(heights)
    smallest = np.where(there, size[:, None], np.inf).min(0)
    largest = np.where(there, size[:, None], -np.inf).max(0)
    kept = np.flatnonzero((size[leader] > smallest) & (size[leader] < largest))
    sizes = np.unique(size[leader[kept]])
    _need(
        len(sizes), MIN_LEADERS, "N",
        "approach 1 needs {needed} sizes that lead between smaller and larger ones",
    )  # fmt: skip
    lead, flops = leader[kept], np.exp(grid[kept])
    laws = []
    for values in (size[lead], tokens[lead, kept]):
        reigns = [size[lead] == one for one in sizes]
        means = [(grid[kept][reign].mean(), values[reign].mean()) for reign in reigns]
        coarse = power_law(*np.exp(np.array(means).T))
        fine = power_law(flops, np.exp(values))
        laws.append(replace(fine, exponent_error=coarse.exponent_error, points=len(sizes)))
    left_out = there.any(0).sum() - len(kept)
    note = (
        f"{left_out / points:.0%} of the computes were left out: the smallest or the largest size "
        "trained that far leads there."
    )
    notes = (note,) if left_out > 0.5 * points else ()
    return IsoFlop(1, laws[0], laws[1], (), "loss", notes)


def _columns(C: ArrayLike, N: ArrayLike, loss: ArrayLike, D: ArrayLike | None) -> dict:
    columns = {name: np.asarray(c, float) for name, c in (("C", C), ("N", N), ("loss", loss))}
    columns["D"] = columns["C"] / (6 * columns["N"]) if D is None else np.asarray(D, float)
    return columns


def _need(got: int, needed: int, what: str, message: str) -> None:
    """Raise `TooFewError` if fewer are there than needed."""
    if got < needed:
        message = message if "{got}" in message else message + ", got {got}"
        raise TooFewError(message.format(got=got, needed=needed) + ".", what, got, needed)


def _check_columns(columns: dict[str, np.ndarray]) -> None:
    """Reject columns of different lengths, and numbers that are not positive and finite."""
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
