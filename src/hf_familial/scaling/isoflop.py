"""IsoFLOP approaches 1 and 2: optima read off runs of equal compute, without a law."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ..errors import BadRowsError, BiasWarning, NoMinimumError, ScalingError, TooFewError
from .quantities import Interval, check_level


MIN_POINTS = 3  # a slope, an intercept, and one point to judge them by


@dataclass(frozen=True)
class PowerLaw:
    """The line `log y = log coefficient + exponent log x`."""

    coefficient: float
    exponent: float
    exponent_error: float
    r2: float
    points: int

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """The value at `x`, of the same shape."""
        return np.asarray(self.coefficient * np.asarray(x, float) ** self.exponent)

    def interval(self, level: float = 0.95) -> Interval:
        """Return the exponent's interval by Student's t; the bias of approach 2 comes on top."""
        check_level(level)
        reach = float(stats.t.ppf((1 + level) / 2, self.points - 2)) * self.exponent_error
        return Interval(level, self.exponent - reach, self.exponent + reach, "t")


def power_law(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> PowerLaw:
    """Ordinary or weighted least squares of log y on log x."""
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
    """Refuse columns of different lengths, and numbers that are not positive and finite."""
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


# how the loss enters the parabola, by name
SCALES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "loss": np.asarray,
    "log": np.log,
    "exp": np.exp,
}
# and how its value at the minimum becomes a loss again
UNSCALED: Mapping[str, Callable[[float], float]] = {"loss": float, "log": math.exp, "exp": math.log}

Outside = Literal["refuse", "keep"]

MIN_BUDGETS = 3  # a line of slope and intercept, and one point to judge it by
MIN_SIZES = 4  # a parabola, and one point to judge it by


@dataclass(frozen=True)
class Curve:
    """The runs of one budget and where their loss is least."""

    budget: float
    rows: tuple[int, ...]
    N: float
    D: float
    loss: float
    curvature: float
    offset: float
    span: float


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
    """Approach 2: a parabola in log N per budget, and one in log D; a line through the minima.

    A parabola is right at its minimum only where the curve is symmetric there. Sampling that is
    wide biases the coefficient, sampling whose centre leaves the minimum biases the exponent too;
    `parabola_bias` measures both. [`fit`] (approach 3) has neither.

    Args:
        C (`ArrayLike` of shape `(n,)`): Training FLOPs of each run.
        N (`ArrayLike` of shape `(n,)`): Parameters.
        loss (`ArrayLike` of shape `(n,)`): Nats per token.
        D (`ArrayLike` of shape `(n,)`, *optional*): Training tokens; `C / 6N` if not given.
        scale (`str`, *optional*, defaults to `"loss"`): What the parabola is drawn through:
            `"loss"`, its `"log"`, or its `"exp"` (for a loss that is itself a logarithm).
        budget_rtol (`float`, *optional*, defaults to 0.05): Runs whose FLOPs differ by less than
            this share from the next belong to one budget.

    Returns:
        [`IsoFlop`].

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If there are fewer than 3 budgets, or fewer than 4 sizes in one.
        NoMinimumError: If a parabola opens downward, or its minimum lies outside and is refused.

    Reference: Hoffmann et al. 2022, arXiv:2203.15556, section 3.2; the bias:
    https://github.com/Open-Athena/scaling-law-analysis.
    """
    if scale not in SCALES:
        raise ScalingError(f"`scale` must be one of {sorted(SCALES)}, got {scale!r}.")
    columns = {
        "C": np.asarray(C, float),
        "N": np.asarray(N, float),
        "loss": np.asarray(loss, float),
    }
    columns["D"] = columns["C"] / (6 * columns["N"]) if D is None else np.asarray(D, float)
    found = draw(columns, scale, budget_rtol, outside)
    for note in found.notes:
        warnings.warn(note, BiasWarning, stacklevel=2)
    return found


def draw(
    columns: dict[str, np.ndarray], scale: str, budget_rtol: float, outside: Outside
) -> IsoFlop:
    """`parabolas` of columns `C`, `N`, `D` and `loss`, without its warnings."""
    check_columns(columns)
    groups = budgets(columns["C"], budget_rtol)
    if len(groups) < MIN_BUDGETS:
        raise TooFewError(
            f"approach 2 needs {MIN_BUDGETS} budgets, got {len(groups)}.",
            what="budgets",
            got=len(groups),
            needed=MIN_BUDGETS,
        )
    curves = tuple(_curve(columns, rows, scale, outside) for rows in groups)
    flops = [curve.budget for curve in curves]
    return IsoFlop(
        approach=2,
        N=power_law(flops, [curve.N for curve in curves]),
        D=power_law(flops, [curve.D for curve in curves]),
        curves=curves,
        scale=scale,
        notes=tuple(_doubts(curves)),
    )


def budgets(C: np.ndarray, rtol: float = 0.05) -> list[np.ndarray]:
    """Rows of equal compute, by rising compute."""
    order = np.argsort(C, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(C[order])) > math.log1p(rtol)) + 1
    return [np.sort(rows) for rows in np.split(order, cuts)]


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Minimum of the parabola through points, by least squares."""
    middle, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
    a, b, c = np.polyfit((x - middle) / half, y, 2)
    if a <= 0:
        return math.nan, math.nan, 2 * a / half**2
    return middle - half * b / (2 * a), c - b * b / (4 * a), 2 * a / half**2


def _curve(columns: dict[str, np.ndarray], rows: np.ndarray, scale: str, outside: Outside) -> Curve:
    C, N, D, loss = (columns[name][rows] for name in ("C", "N", "D", "loss"))
    budget = float(np.exp(np.log(C).mean()))
    sizes = len(np.unique(N))
    if sizes < MIN_SIZES:
        raise TooFewError(
            f"a parabola needs {MIN_SIZES} sizes, got {sizes} at {budget:.3g} FLOPs.",
            what="N",
            got=sizes,
            needed=MIN_SIZES,
        )
    y = SCALES[scale](loss)
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
        loss=UNSCALED[scale](least),
        curvature=curvature,
        offset=float((x - (low + high) / 2) / ((high - low) / 2)),
        span=math.exp(high - low),
    )


def _doubts(
    curves: Sequence[Curve], offset: float = 0.25, drift: float = 0.25, span: float = 30.0
) -> Iterable[str]:
    """What in the sampling biases approach 2, in sentences."""
    worst = max(curves, key=lambda curve: abs(curve.offset))
    if abs(worst.offset) > 1:
        yield (
            f"sampling misses the minimum: at {worst.budget:.3g} FLOPs it lies beyond the "
            f"{'largest' if worst.offset > 0 else 'smallest'} size; it is extrapolated."
        )
    elif abs(worst.offset) > offset:
        yield (
            f"sampling is off-centre: at {worst.budget:.3g} FLOPs the minimum lies "
            f"{abs(worst.offset):.0%} of the way from the middle of the sizes to the "
            f"{'largest' if worst.offset > 0 else 'smallest'}; the coefficient is biased."
        )
    shift = np.polyfit(np.log([c.budget for c in curves]), [c.offset for c in curves], 1)[0]
    shift *= math.log(curves[-1].budget / curves[0].budget)
    if abs(shift) > drift:
        yield (
            f"the centre of the sampling drifts: the minimum moves by {abs(shift):.0%} of the half "
            "width from the smallest budget to the largest; the exponent is biased."
        )
    widest = max(curves, key=lambda curve: curve.span)
    if widest.span > span:
        yield (
            f"sampling is wide: sizes span a factor of {widest.span:.0f} at {widest.budget:.3g} "
            "FLOPs, where a curve is no parabola; the coefficient is biased."
        )


LEADERS = 3  # that lead somewhere


def envelope(
    C: ArrayLike,
    N: ArrayLike,
    loss: ArrayLike,
    run_id: ArrayLike,
    D: ArrayLike | None = None,
    points: int = 1500,
) -> IsoFlop:
    """Approach 1: power laws through the runs of least loss at each compute.

    Curves are joined in logs of loss and FLOPs. A compute at which the smallest or the largest of
    the sizes trained that far leads is left out: a size that was not run might have led. The
    losses must come from schedules that end where they are read, or from one that does not
    decay; a checkpoint in the middle of a cosine is too high.

    Args:
        C (`ArrayLike` of shape `(n,)`): FLOPs spent at each checkpoint.
        N (`ArrayLike` of shape `(n,)`): Parameters.
        loss (`ArrayLike` of shape `(n,)`): Nats per token, smoothed.
        run_id (`ArrayLike` of shape `(n,)`): Run of each checkpoint.
        D (`ArrayLike` of shape `(n,)`, *optional*): Tokens seen; `C / 6N` if not given.
        points (`int`, *optional*, defaults to 1500): Computes looked at, evenly spaced in logs.

    Returns:
        [`IsoFlop`]: Without curves. The error of the exponents is that of a line through the sizes
        that lead: neighbouring computes are not independent.

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If fewer than 3 sizes lead between others.

    Reference: Hoffmann et al. 2022, arXiv:2203.15556, section 3.1.
    """
    columns = {
        "C": np.asarray(C, float),
        "N": np.asarray(N, float),
        "loss": np.asarray(loss, float),
    }
    columns["D"] = columns["C"] / (6 * columns["N"]) if D is None else np.asarray(D, float)
    check_columns(columns)
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
    leader = np.argmin(heights, axis=0)
    there = np.isfinite(heights)
    smallest = np.where(there, size[:, None], np.inf).min(0)
    largest = np.where(there, size[:, None], -np.inf).max(0)
    kept = np.flatnonzero((size[leader] > smallest) & (size[leader] < largest))
    sizes = np.unique(size[leader[kept]])
    if len(sizes) < LEADERS:
        raise TooFewError(
            f"approach 1 needs {LEADERS} sizes that lead between smaller and larger ones, got "
            f"{len(sizes)}.",
            what="N",
            got=len(sizes),
            needed=LEADERS,
        )
    lead, flops = leader[kept], np.exp(grid[kept])
    laws = []
    for values in (size[lead], tokens[lead, kept]):
        reigns = [size[lead] == one for one in sizes]
        means = [(grid[kept][reign].mean(), values[reign].mean()) for reign in reigns]
        coarse = power_law(*np.exp(np.array(means).T))
        fine = power_law(flops, np.exp(values))
        laws.append(replace(fine, exponent_error=coarse.exponent_error, points=len(sizes)))
    left_out = np.isfinite(heights).any(0).sum() - len(kept)
    notes = []
    if left_out > 0.5 * points:
        notes.append(
            f"{left_out / points:.0%} of the computes were left out: the smallest or the largest "
            "size trained that far leads there."
        )
    return IsoFlop(1, laws[0], laws[1], (), "loss", tuple(notes))
