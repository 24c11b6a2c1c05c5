"""The bias of IsoFLOP approach 2 for the sizes and budgets of your runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BiasWarning, ScalingError
from .data import RunTable
from .fitting import fit
from .isoflop_optima import draw
from .laws import get_law
from .optima import powers


@dataclass(frozen=True)
class Bias:
    """The errors of approach 2 on losses without noise.

    N* and D* are the best numbers of parameters and tokens for a budget.
    """

    C: tuple[float, ...]  # budgets, in FLOPs
    N: tuple[float, ...]  # relative error of N* at each budget: 0.05 is 5% too many parameters
    D: tuple[float, ...]  # relative error of D* at each budget
    N_exponent: float  # error of the exponent of N* as a power of C
    surface: dict[str, float]  # coefficients of Hoffmann's law that the losses follow


def parabola_bias(
    C: ArrayLike,
    N: ArrayLike,
    loss: ArrayLike,
    D: ArrayLike | None = None,
    scale: str = "loss",
    at: Sequence[float] | None = None,
    budget_rtol: float = 0.05,
    tolerance: float = 0.02,
) -> Bias:
    """Measure the bias that the sizes and budgets of these runs cause in approach 2.

    Hoffmann's law is fitted to the runs (approach 3), and its predictions replace the measured
    losses. Then approach 2 is applied to them. The losses have no noise and the true optimum is
    known, so any error is a bias.

    Args:
        C, N, loss, D, scale, budget_rtol: As for [`parabolas`].
        at (`Sequence[float]`): Budgets in FLOPs at which to compute the errors. Default: the
            largest budget and 1000 times it.
        tolerance (`float`): A relative error of D* above this value issues a `BiasWarning`.

    Raises:
        ScalingError: If the fitted law has no optimum. Other errors are those of `parabolas`.

    Reference: https://github.com/Open-Athena/scaling-law-analysis.
    """
    columns = {"C": np.array(C, float), "N": np.array(N, float)}
    columns["D"] = columns["C"] / (6 * columns["N"]) if D is None else np.array(D, float)
    rows = {"N": columns["N"], "D": columns["D"], "loss": np.array(loss, float)}
    surface = fit(get_law("hoffmann"), RunTable.read(rows, duplicates="keep"))
    smooth = np.array(surface.predict(N=columns["N"], D=columns["D"]))
    tried = draw({**columns, "loss": smooth}, scale, budget_rtol, "keep")
    where = np.array(at or [tried.curves[-1].budget, 1e3 * tried.curves[-1].budget], float)
    known = powers(surface.law, surface.values)
    if known is None:
        raise ScalingError(
            "The law fitted to these runs does not fall with both N and D, so it has no optimum to "
            "compare with."
        )
    price = float(np.median(columns["C"] / (columns["N"] * columns["D"])))
    best_N, best_D = known.optimum(where, price)
    bias = Bias(
        C=tuple(where.tolist()),
        N=tuple((tried.N(where) / best_N - 1).tolist()),
        D=tuple((tried.D(where) / best_D - 1).tolist()),
        N_exponent=float(tried.N.exponent - known.beta / (known.alpha + known.beta)),
        surface=dict(surface.values),
    )
    worst = max(zip(bias.D, bias.C, strict=True), key=lambda pair: abs(pair[0]))
    if abs(worst[0]) > tolerance:
        warnings.warn(
            f"Approach 2 misses D* by {worst[0]:+.1%} at {worst[1]:.3g} FLOPs with these sizes and "
            "budgets, even without noise. `fit` (approach 3) does not have this bias.",
            BiasWarning,
            stacklevel=2,
        )
    return bias
