"""Bias of IsoFLOP approach 2 on one's own sampling, measured where the optimum is known."""

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
    """Error of approach 2 without any noise."""

    C: tuple[float, ...]  # FLOPs
    N: tuple[float, ...]  # relative error of N* at each; 0.05 is 5% too many parameters
    D: tuple[float, ...]  # relative error of D* at each
    N_exponent: float  # error of the exponent of N*
    surface: dict[str, float]  # coefficients of the surface it was measured on


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
    """Measure what the sampling of these runs does to approach 2.

    Hoffmann's law is fitted to the runs (approach 3), the runs' losses are replaced by its own, and
    approach 2 is applied to them: what it then misses is no noise. The errors are judged at the
    FLOPs `at`, or at the largest budget and a thousand times it; errors of D* beyond `tolerance`
    warn. The other arguments and errors are those of `parabolas`.

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
            "the surface fitted does not fall with both N and D: no optimum to miss."
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
            f"approach 2 misses D* by {worst[0]:+.1%} at {worst[1]:.3g} FLOPs on this sampling, "
            "noise apart; `fit` (approach 3) does not.",
            BiasWarning,
            stacklevel=2,
        )
    return bias
