"""The best N and D for a budget: by formula if the law has one, else by search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MissingColumnError, NoMinimumError, ScalingError
from .flop_models import Flops, six_nd
from .laws.law import Law, Namespace


SEARCH = (1e2, 1e18)  # smallest and largest size of the search, in parameters
GRID = 321  # number of sizes on the first grid: 20 per decade
PARTS, ZOOMS = 24, 9  # after the last zoom, the error of the best log N is below 1e-13
STENCIL = 5e-3  # step of log N for derivatives of the loss along a budget


@dataclass(frozen=True)
class Powers:
    """The form `A N^-alpha + B D^-beta` of a law whose loss rises with this sum.

    A and B include the effects of the other variables. Each has shape (draws,) or ().
    """

    A: Any
    B: Any
    alpha: Any
    beta: Any

    def optimum(self, C: Any, flops_per_nd: float = 6.0) -> tuple[Any, Any]:
        """Return the best N and D with `flops_per_nd * N * D = C` (arXiv:2203.15556, eq. 4)."""
        total = self.alpha + self.beta
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        budget = np.asarray(C, float) / flops_per_nd
        return G * budget ** (self.beta / total), budget ** (self.alpha / total) / G


def powers(law: Law, values: Mapping[str, Any], **given: Any) -> Powers | None:
    """Return the powers of N and D in a law, or `None` if it does not have this form.

    A law has another form if a term depends on both N and D, is not a power, or rises with N or D.
    The function evaluates the terms at a few N and D, so it also works for a law that a user wrote.

    Args:
        law ([`Law`]): A law.
        values (`Mapping`): Every parameter by name: numbers or arrays of shape (draws,).
        given: Values of the law's variables other than N and D.
    """
    if not {"N", "D"} <= set(law.variable_names):
        return None
    p = Namespace(**{name: np.asarray(values[name], float) for name in law.names})
    base = {"N": 1e9, "D": 2e10, **given}

    def at(**moved: float) -> tuple[Namespace, list[Any]]:
        x = Namespace(**{k: np.asarray(v, float) for k, v in {**base, **moved}.items()})
        return x, [np.asarray(term, float) for term in law.terms(x, p)]

    here, terms = at()
    found = {}
    for name, other in (("N", "D"), ("D", "N")):
        once, twice = at(**{name: base[name] * 10})[1], at(**{name: base[name] * 100})[1]
        crossed = at(**{other: base[other] * 10})[1]
        moving = [i for i, term in enumerate(terms) if not np.allclose(term, once[i], rtol=1e-12)]
        if not moving or any(not np.allclose(terms[i], crossed[i], rtol=1e-12) for i in moving):
            return None
        sums = [sum(column[i] for i in moving) for column in (terms, once, twice)]
        if any(np.any(total <= 0) for total in sums):
            return None
        slope, again = (np.log(b / a) / math.log(10) for a, b in zip(sums, sums[1:], strict=False))
        if not np.allclose(slope, again, rtol=1e-9, atol=1e-12) or np.any(slope >= 0):
            return None
        found[name] = (sums[0] * base[name] ** -slope, -slope)
    if law.outer is not None:
        total = sum(terms)
        there = Namespace(**{**vars(here), "N": here.N * 10, "D": here.D * 10})
        if not np.allclose(law.outer.apply(total, here, p), law.outer.apply(total, there, p)):
            return None
    (A, alpha), (B, beta) = found["N"], found["D"]
    return Powers(A, B, alpha, beta)


def best(
    law: Law,
    values: Mapping[str, Any],
    C: Any,
    flops: Flops | None = None,
    max_N: float = math.inf,
    max_D: float = math.inf,
    **given: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the N and D of least loss for a budget, each of shape (draws,) or ().

    Args:
        law ([`Law`]): A law of N and D.
        values (`Mapping`): Every parameter by name: numbers or arrays of shape (draws,).
        C (`float` or array of shape (draws,)): The budget in FLOPs.
        flops (`Callable`, *optional*): FLOP model `flops(N, D, G)` that rises with N and D.
            Default: 6ND.
        max_N (`float`, *optional*): Largest number of parameters. The loss along the budget is
            assumed to have one minimum. If N is above the limit, the limit is the best N.
        max_D (`float`, *optional*): Largest number of tokens.
        given: Values of the law's other variables. `flops` uses `G` from here, or 1.

    Raises:
        NoMinimumError: If the loss is least at the smallest or the largest size of the search.
        ScalingError: If the law does not use N and D.
        MissingColumnError: If the value of another variable is missing.
    """
    if not {"N", "D"} <= set(law.variable_names):
        raise ScalingError(
            f"An optimum needs a law of `N` and `D`, but `{law.name}` uses "
            f"{list(law.variable_names)}."
        )
    missing = tuple(n for n in law.variable_names if n not in ("N", "D", *given))
    if missing:
        raise MissingColumnError(f"`{law.name}` also needs values of {list(missing)}.", missing)
    closed = powers(law, values, **given) if flops is None else None
    if closed is not None:
        N, D = closed.optimum(C)
        if math.isinf(max_N) and math.isinf(max_D):
            return N, D
    else:
        N = np.exp(_Search(law, values, C, flops or six_nd, given).run())
    cost, G = flops or six_nd, given.get("G", 1)
    if math.isfinite(max_D):
        # with all tokens used, the rest of the budget pays for a larger model
        ends = np.log(SEARCH)[:, None]
        low, high = np.broadcast_to(ends, (2, np.size(C))).reshape(2, *np.shape(C))
        fed, _ = bisect(lambda at: np.asarray(cost(np.exp(at), max_D, G), float) <= C, low, high)
        N = np.maximum(N, np.exp(fed))
    N = np.minimum(N, max_N)
    return N, np.minimum(tokens_for(C, N, cost, G), max_D)


def bisect(
    below: Callable[[np.ndarray], Any], low: np.ndarray, high: np.ndarray, steps: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Narrow each bracket to the point where `below` changes from true to false."""
    for _ in range(steps):
        middle = (low + high) / 2
        up = below(middle)
        low, high = np.where(up, middle, low), np.where(up, high, middle)
    return low, high


def tokens_for(C: Any, N: Any, flops: Flops, G: Any = 1) -> np.ndarray:
    """Return the tokens that C FLOPs pay for at N parameters, or 0 if they do not pay for one."""
    N, C = np.broadcast_arrays(np.asarray(N, float), np.asarray(C, float))
    fixed, one = np.asarray(flops(N, 0.0, G), float), np.asarray(flops(N, 1.0, G), float)
    per_token = one - fixed
    paid = one <= C
    # The first value is exact if the FLOPs are linear in D. Else Newton's steps in logs follow. The
    # slope is computed at D, because the FLOPs of one token vanish next to a large fixed cost.
    with np.errstate(divide="ignore", invalid="ignore"):
        D = np.where(paid, (C - fixed) / np.where(per_token > 0, per_token, 1), 1.0)
        for _ in range(50):
            D = np.clip(D, 1.0, 1e30)
            spent = np.asarray(flops(N, D, G), float) - fixed
            slope = (np.asarray(flops(N, D * 1.001, G), float) - fixed - spent) / (1e-3 * spent)
            step = np.where(paid, np.log(np.maximum(C - fixed, 1e-300) / spent) / slope, 0.0)
            D = D * np.exp(np.clip(step, -2, 2))
            if np.all(np.abs(step) < 1e-14):
                break
    return np.where(paid, D, 0.0)


@dataclass(frozen=True)
class _Search:
    """A search for the minimum of the loss along a budget, as a function of log N."""

    law: Law
    values: Mapping[str, Any]
    C: Any
    flops: Flops
    given: Mapping[str, Any]

    def loss(self, x: np.ndarray) -> np.ndarray:
        """Return the loss at each log N, shape (draws, sizes).

        It is infinite if the budget does not pay for one token at this size.
        """
        C = np.asarray(self.C, float)[..., None]
        D = tokens_for(C, np.exp(x), self.flops, self.given.get("G", 1))
        values = {name: np.asarray(self.values[name], float)[..., None] for name in self.law.names}
        loss = self.law.predict(values, **{**self.given, "N": np.exp(x), "D": np.maximum(D, 1.0)})
        return np.where(D >= 1, loss, np.inf)

    def slope(self, x: np.ndarray) -> np.ndarray:
        """Return numbers with the sign of the loss's derivative by log N, shape (draws, sizes).

        They are finite differences of fourth order.
        """
        points = x[..., None] + STENCIL * np.array([-2.0, -1.0, 1.0, 2.0])
        losses = self.loss(points.reshape(*x.shape[:-1], -1)).reshape(points.shape)
        with np.errstate(invalid="ignore"):  # losses are infinite beyond the budget
            return losses @ np.array([1.0, -8.0, 8.0, -1.0])

    def run(self) -> np.ndarray:
        """Return log N at the minimum, shape (draws,).

        Near the minimum, losses of neighbouring sizes differ by less than rounding errors. So the
        sign of the slope, not the loss, decides which smaller bracket to use.
        """
        grid = np.linspace(math.log(SEARCH[0]), math.log(SEARCH[1]), GRID)
        at = np.argmin(self.loss(grid), axis=-1)
        if np.any((at == 0) | (at == GRID - 1)):
            raise NoMinimumError(
                f"`{self.law.name}` has no best size at {np.max(self.C):.3g} FLOPs, because its "
                f"loss still falls at the edge of the search ({SEARCH[0]:.0e} to {SEARCH[1]:.0e} "
                "parameters).",
                float(np.max(self.C)),
            )
        low, high = grid[at - 1], grid[at + 1]
        parts = np.linspace(0, 1, PARTS + 1)
        for _ in range(ZOOMS):
            marks = low[..., None] + (high - low)[..., None] * parts
            down = np.sum(self.slope(marks[..., 1:-1]) < 0, axis=-1)
            low = np.take_along_axis(marks, down[..., None], -1)[..., 0]
            high = np.take_along_axis(marks, down[..., None] + 1, -1)[..., 0]
        return (low + high) / 2
