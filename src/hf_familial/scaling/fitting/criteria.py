"""How likely the rows are under a fit, and what its coefficients cost."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from .result import Fit


def log_likelihood(result: Fit) -> float:
    """Of a fit, under the density that its objective belongs to.

    That is `exp(-rho(r) / s^2) / Z(s)` with rho Huber's function: normal in the middle, with
    exponential tails beyond `delta`. Its width s is chosen to make the likelihood largest.

    Reference: Huber 1964, "Robust estimation of a location parameter".
    """
    settings, data = result.settings, result.data
    count = float(data.weight.sum())
    # an exact fit has no likeliest width: its residuals are rounding
    total = max(result.objective, 1e-28 * count)
    jacobian = -float(data.weight @ np.log(data.loss)) if settings.objective == "log_huber" else 0.0
    if settings.objective == "mse":
        return jacobian - 0.5 * count * (math.log(2 * math.pi * 2 * total / count) + 1)

    def minus(log_width: float) -> float:
        width, knee = math.exp(log_width), settings.delta / math.exp(log_width)
        middle = math.sqrt(2 * math.pi) * math.erf(knee / math.sqrt(2))
        # exp(-knee^2 / 2), in logs: it vanishes where all is normal
        tails = 2 / knee * math.exp(-0.5 * knee * knee) if knee < 38 else 0.0
        return total / width**2 + count * (log_width + math.log(middle + tails))

    scale = 0.5 * math.log(2 * total / count)
    best = optimize.minimize_scalar(minus, bounds=(scale - 5, scale + 12), method="bounded")
    return jacobian - float(best.fun)


def aicc(result: Fit) -> float:
    """Akaike's criterion, corrected for few rows; the width of the noise counts as a coefficient.

    Infinite where there are no more rows than that. Checkpoints of one run are counted as if they
    were independent.

    Reference: Hurvich and Tsai 1989, "Regression and time series model selection in small samples".
    """
    count, free = float(result.data.weight.sum()), len(result.free) + 1
    if count <= free + 1:
        return math.inf
    correction = 2 * free * (free + 1) / (count - free - 1)
    return 2 * free - 2 * log_likelihood(result) + correction
