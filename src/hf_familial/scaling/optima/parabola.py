"""IsoFLOP approaches 1 and 2: optima read off curves of equal compute, without a law."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ...errors import BiasWarning, NoMinimumError, ScalingError, TooFewError
from .power_law import PowerLaw, check_columns, power_law


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
    """The runs of one budget and where their loss is least.

    Attributes:
        budget (`float`): Compute in FLOPs: the geometric mean over its runs.
        rows (`tuple[int, ...]`): The runs, as rows of the arrays given.
        N (`float`): Parameters at the minimum.
        D (`float`): Training tokens at the minimum.
        loss (`float`): Loss at the minimum, nats per token.
        curvature (`float`): Second derivative of the scaled loss by log N there; positive.
        offset (`float`): Where the minimum lies between the smallest run (-1), the geometric
            middle of the sizes (0) and the largest (1).
        span (`float`): Ratio of the largest size to the smallest.
    """

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
    """Rows of equal compute, by rising compute.

    Args:
        C (`np.ndarray` of shape `(n,)`): FLOPs.
        rtol (`float`, *optional*, defaults to 0.05): A gap wider than this share parts two budgets.

    Returns:
        `list[np.ndarray]`: Row numbers of each budget, rising.
    """
    order = np.argsort(C, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(C[order])) > math.log1p(rtol)) + 1
    return [np.sort(rows) for rows in np.split(order, cuts)]


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Minimum of the parabola through points, by least squares.

    Returns:
        `tuple[float, float, float]`: Where it is, the value there, and the second derivative; the
        minimum is NaN where the parabola opens downward.
    """
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
