"""IsoFLOP approaches 1 and 2: the best size for each compute budget, without fitting a law."""

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


# scale -> function of the loss that the parabola is fitted to, and its inverse
SCALES: Mapping[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[float], float]]] = {
    "loss": (np.asarray, float),
    "log": (np.log, math.exp),
    "exp": (np.exp, math.log),
}
Outside = Literal["refuse", "keep"]

# a line has two coefficients, and one more point is needed to estimate its error
MIN_POINTS = MIN_BUDGETS = MIN_LEADERS = 3
MIN_SIZES = 4  # three coefficients of a parabola, and one more point
# limits beyond which a warning is issued: the first two as shares of half the range of sizes, the
# last as ratio of the largest size to the smallest
OFF_CENTRE, DRIFTING, WIDE = 0.25, 0.25, 30.0


@dataclass(frozen=True)
class PowerLaw:
    """A fitted power law `y = coefficient * x ** exponent`."""

    coefficient: float  # y at x = 1
    exponent: float  # slope of log y in log x
    exponent_error: float  # standard error of `exponent`, with `points` - 2 degrees of freedom
    r2: float  # share of the variance of log y that it explains
    points: int  # number of fitted pairs

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """Return y at `x`, in the shape of `x`."""
        return np.asarray(self.coefficient * np.asarray(x, float) ** self.exponent)

    def interval(self, level: float = 0.95) -> Interval:
        """Return the interval of the exponent by Student's t.

        It does not include the bias of approach 2, see [`parabola_bias`].
        """
        check_level(level)
        reach = float(stdtrit(self.points - 2, (1 + level) / 2)) * self.exponent_error
        return Interval(level, self.exponent - reach, self.exponent + reach, "t")


def power_law(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> PowerLaw:
    """Fit a line to log y against log x by least squares. `weights` multiply the squares."""
    columns = [np.asarray(part, dtype=float) for part in (x, y)]
    w = np.ones_like(columns[0]) if weights is None else np.asarray(weights, dtype=float)
    _check_columns({"x": columns[0], "y": columns[1], "weights": w})
    u, v = np.log(columns[0]), np.log(columns[1])
    _need(len(np.unique(u)), MIN_POINTS, "x", "A power law needs {needed} different `x`")
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
    """The parabola of one budget and its minimum.

    Attributes:
        offset: The position of the minimum on a log scale: -1 is the smallest size, 0 the geometric
            mean of the smallest and the largest, 1 the largest.
    """

    budget: float  # geometric mean of the runs' FLOPs
    rows: tuple[int, ...]  # the runs of this budget, as rows of the input
    N: float  # parameters at the minimum
    D: float  # training tokens at the minimum
    loss: float  # loss at the minimum, nats per token
    curvature: float  # second derivative of the scaled loss by log N, positive
    offset: float
    span: float  # ratio of the largest size to the smallest

    @property
    def side(self) -> str:
        """The end of the sizes that is nearer to the minimum: `"largest"` or `"smallest"`."""
        return "largest" if self.offset > 0 else "smallest"


@dataclass(frozen=True)
class IsoFlop:
    """The result of approach 1 ([`envelope`]) or 2 ([`parabolas`]).

    Attributes:
        approach (`int`): 1 (envelope of training curves) or 2 (one parabola per budget).
        N (`PowerLaw`): Best number of parameters as a function of FLOPs.
        D (`PowerLaw`): Best number of tokens as a function of FLOPs.
        curves (`tuple[Curve, ...]`): The parabolas of approach 2, by rising budget.
        scale (`str`): The function of the loss that the parabolas fit.
        notes (`tuple[str, ...]`): Reasons to doubt the result, one or two sentences each.
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
    """Find the best N and D per budget with parabolas, and fit power laws to them (approach 2).

    For each budget, one parabola in log N and one in log D are fitted to the loss. Their minima are
    the best N and D. If the sizes span a wide range, the coefficients are biased. If the sizes are
    not centred on the minimum, the exponents are biased too. `parabola_bias` measures both, and
    [`fit`] (approach 3) has neither.

    Args:
        C (`ArrayLike`): Training FLOPs of each run, shape (runs,).
        N (`ArrayLike`): Parameters of each run, shape (runs,).
        loss (`ArrayLike`): Loss of each run in nats per token, shape (runs,).
        D (`ArrayLike`): Training tokens of each run, shape (runs,). Default: `C / 6N`.
        scale (`str`): Fit the parabolas to the `"loss"`, its `"log"` or its `"exp"`.
        budget_rtol (`float`): Two runs next to each other in FLOPs belong to different budgets if
            they differ by more than this share.
        outside (`str`): `"refuse"` raises an error if a minimum is outside the sizes that were
            run. `"keep"` extrapolates.

    Returns:
        [`IsoFlop`]: The minima and the power laws. Doubts are also issued as `BiasWarning`s.

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If there are fewer than 3 budgets, or fewer than 4 sizes in one.
        NoMinimumError: If a parabola opens downward, or its minimum is outside the sizes.

    Example:
        >>> law = get_law("hoffmann"); values = law.published["besiroglu"].values
        >>> runs = simulate(law, values, isoflop_design(law, values, [1e19, 1e20, 1e21]))
        >>> parabolas(runs.columns["C"], runs.columns["N"], runs.loss).N.exponent

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
    """Compute the result of `parabolas` from columns, without warnings."""
    _check_columns(columns)
    groups = budgets(columns["C"], budget_rtol)
    _need(len(groups), MIN_BUDGETS, "budgets", "Approach 2 needs {needed} budgets")
    curves = tuple(_curve(columns, rows, scale, outside) for rows in groups)
    flops = [curve.budget for curve in curves]
    N, D = (power_law(flops, [getattr(curve, name) for curve in curves]) for name in "ND")
    return IsoFlop(2, N, D, curves, scale, tuple(_doubts(curves)))


def budgets(C: np.ndarray, rtol: float = 0.05) -> list[np.ndarray]:
    """Return the rows of each budget, by rising compute.

    Two runs next to each other in compute belong to different budgets if they differ by more than
    the share `rtol`.
    """
    order = np.argsort(C, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(C[order])) > math.log1p(rtol)) + 1
    return [np.sort(rows) for rows in np.split(order, cuts)]


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Fit a parabola to points. Return its minimum, its value there and its second derivative.

    The first two are NaN if the parabola opens downward.
    """
    middle, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
    a, b, c = np.polyfit((x - middle) / half, y, 2)
    if a <= 0:
        return math.nan, math.nan, 2 * a / half**2
    return middle - half * b / (2 * a), c - b * b / (4 * a), 2 * a / half**2


def _curve(columns: dict[str, np.ndarray], rows: np.ndarray, scale: str, outside: Outside) -> Curve:
    C, N, D, loss = (columns[name][rows] for name in ("C", "N", "D", "loss"))
    budget = float(np.exp(np.log(C).mean()))
    sizes = "A parabola needs {needed} different sizes, got {got} at " + f"{budget:.3g} FLOPs"
    _need(len(np.unique(N)), MIN_SIZES, "N", sizes)
    scaled, unscaled = SCALES[scale]
    y = scaled(loss)
    (x, least, curvature), (z, _, _) = vertex(np.log(N), y), vertex(np.log(D), y)
    for name, at, values in (("N", x, np.log(N)), ("D", z, np.log(D))):
        inside = values.min() < at < values.max()
        if math.isnan(at) or not inside and outside == "refuse":
            where = f"it is at {math.exp(at):.3g}" if at == at else "the parabola opens downward"
            raise NoMinimumError(
                f"The loss has no minimum between the smallest and the largest `{name}` at "
                f"{budget:.3g} FLOPs ({math.exp(values.min()):.3g} to "
                f"{math.exp(values.max()):.3g}, but {where}). Add run sizes on that side, or leave "
                "the budget out.",
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
    """Yield sentences on the sizes and budgets that bias approach 2."""
    worst = max(curves, key=lambda curve: abs(curve.offset))
    if abs(worst.offset) > 1:
        yield (
            f"The minimum at {worst.budget:.3g} FLOPs is beyond the {worst.side} size, so it is "
            "extrapolated."
        )
    elif abs(worst.offset) > OFF_CENTRE:
        yield (
            f"The sizes at {worst.budget:.3g} FLOPs are off-centre: the minimum is "
            f"{abs(worst.offset):.0%} of the way from their middle to the {worst.side} size. This "
            "biases the coefficient."
        )
    shift = np.polyfit(np.log([c.budget for c in curves]), [c.offset for c in curves], 1)[0]
    shift *= math.log(curves[-1].budget / curves[0].budget)
    if abs(shift) > DRIFTING:
        yield (
            "The centre of the sizes drifts: from the smallest budget to the largest, the minimum "
            f"moves by {abs(shift):.0%} of half their range. This biases the exponent."
        )
    widest = max(curves, key=lambda curve: curve.span)
    if widest.span > WIDE:
        yield (
            f"The sizes at {widest.budget:.3g} FLOPs span a factor of {widest.span:.0f}. A "
            "parabola does not fit so wide a range, which biases the coefficient."
        )


def envelope(
    C: ArrayLike,
    N: ArrayLike,
    loss: ArrayLike,
    run_id: ArrayLike,
    D: ArrayLike | None = None,
    points: int = 1500,
) -> IsoFlop:
    """Find the run with the least loss at each compute, and fit power laws to them (approach 1).

    The loss of a run between two checkpoints is interpolated, linear in the logs of loss and FLOPs.
    A compute does not count if the smallest or the largest size has the least loss there, because
    an even smaller or larger size might be better. At each checkpoint the learning rate must have
    ended its decay, or must not decay at all.

    Args:
        C (`ArrayLike`): FLOPs spent up to each checkpoint, shape (checkpoints,).
        N (`ArrayLike`): Parameters, shape (checkpoints,).
        loss (`ArrayLike`): Smoothed loss in nats per token, shape (checkpoints,).
        run_id (`ArrayLike`): Name of the run of each checkpoint, shape (checkpoints,).
        D (`ArrayLike`): Training tokens up to each checkpoint. Default: `C / 6N`.
        points (`int`): Number of computes to look at, evenly spaced in logs.

    Returns:
        [`IsoFlop`]: The power laws, without curves. Neighbouring computes are not independent, so
            the error of an exponent counts each size once.

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If fewer than 3 sizes between others have the least loss somewhere.

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
        "Approach 1 needs {needed} sizes with the least loss between smaller and larger ones",
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
        f"{left_out / points:.0%} of the computes were left out, because the smallest or the "
        "largest size has the least loss there."
    )
    notes = (note,) if left_out > 0.5 * points else ()
    return IsoFlop(1, laws[0], laws[1], (), "loss", notes)


def _columns(C: ArrayLike, N: ArrayLike, loss: ArrayLike, D: ArrayLike | None) -> dict:
    columns = {name: np.asarray(c, float) for name, c in (("C", C), ("N", N), ("loss", loss))}
    columns["D"] = columns["C"] / (6 * columns["N"]) if D is None else np.asarray(D, float)
    return columns


def _need(got: int, needed: int, what: str, message: str) -> None:
    """Raise `TooFewError` if `got` is less than `needed`."""
    if got < needed:
        message = message if "{got}" in message else message + ", got {got}"
        raise TooFewError(message.format(got=got, needed=needed) + ".", what, got, needed)


def _check_columns(columns: dict[str, np.ndarray]) -> None:
    """Reject columns of different lengths, and numbers that are not positive and finite."""
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ScalingError(
            f"Columns must be one-dimensional and have the same length, got shapes {shapes}."
        )
    for name, column in columns.items():
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if bad.size:
            raise BadRowsError(
                f"`{name}` must be positive and finite, got {column[bad[0]]} in row {bad[0]}.",
                rows=tuple(bad.tolist()),
            )
