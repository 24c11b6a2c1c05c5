"""The best N and D for a budget: in closed form where there is one, else by search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MissingColumnError, NoMinimumError, ScalingError
from .flop_models import Flops, six_nd
from .laws.law import Law, Namespace


SEARCH = (1e2, 1e18)  # sizes looked at, in parameters
GRID = 321  # sizes of the first look: 20 per decade
PARTS, ZOOMS = 24, 9  # the last brackets the best log N to 1e-13
STENCIL = 5e-3  # step of log N for derivatives of the loss along a budget


@dataclass(frozen=True)
class Powers:
    """A law along N and D: a monotone function of `A N^-alpha + B D^-beta`.

    The other variables are worked into A and B; arrays of shape (draws,) or ().
    """

    A: Any
    B: Any
    alpha: Any
    beta: Any

    def optimum(self, C: Any, flops_per_nd: float = 6.0) -> tuple[Any, Any]:
        """Return N and D of least loss at `flops_per_nd N D = C` (arXiv:2203.15556, equation 4)."""
        total = self.alpha + self.beta
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        budget = np.asarray(C, float) / flops_per_nd
        return G * budget ** (self.beta / total), budget ** (self.alpha / total) / G


def powers(law: Law, values: Mapping[str, Any], **given: Any) -> Powers | None:
    """Return the law's powers of N and D, or `None` if a term mixes them, is no power, or rises.

    The law's terms are evaluated at a few N and D, so a law of a user's own gets its closed form
    as well.

    Args:
        law ([`Law`]): Reads N and D.
        values (`Mapping`): Every parameter, numbers or arrays of shape (draws,).
        given: The law's other variables, numbers.
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
    """Return N and D of least loss within a budget, of shape (draws,) or ().

    Args:
        law ([`Law`]): Reads N and D.
        values (`Mapping`): Every parameter, numbers or arrays of shape (draws,).
        C (`float` or array of shape (draws,)): FLOPs.
        flops (`Callable`, *optional*): `flops(N, D, G)`, rising with N and D; `6ND` without it.
        max_N (`float`, *optional*): Most parameters. The loss is taken to have one valley along
            the budget, so that the best N within limits is the limit nearest to the best of all.
        max_D (`float`, *optional*): Most tokens.
        given: The law's other variables, numbers; `flops` gets `G` from here, or 1.

    Raises:
        NoMinimumError: If the loss falls all the way to the smallest or the largest size.
        ScalingError: If the law does not read N and D.
        MissingColumnError: If another of its variables is missing.
    """
    if not {"N", "D"} <= set(law.variable_names):
        raise ScalingError(
            f"an optimum needs a law of `N` and `D`; `{law.name}` reads {law.variable_names}."
        )
    missing = tuple(n for n in law.variable_names if n not in ("N", "D", *given))
    if missing:
        raise MissingColumnError(f"`{law.name}` also needs {list(missing)}.", missing)
    closed = powers(law, values, **given) if flops is None else None
    if closed is not None:
        N, D = closed.optimum(C)
        if math.isinf(max_N) and math.isinf(max_D):
            return N, D
    else:
        N = np.exp(_Search(law, values, C, flops or six_nd, given).run())
    cost, G = flops or six_nd, given.get("G", 1)
    if math.isfinite(max_D):
        # all tokens are bought: what is left of the budget buys a larger model
        ends = np.log(SEARCH)[:, None]
        low, high = np.broadcast_to(ends, (2, np.size(C))).reshape(2, *np.shape(C))
        fed, _ = bisect(lambda at: np.asarray(cost(np.exp(at), max_D, G), float) <= C, low, high)
        N = np.maximum(N, np.exp(fed))
    N = np.minimum(N, max_N)
    return N, np.minimum(tokens_for(C, N, cost, G), max_D)


def bisect(
    below: Callable[[np.ndarray], Any], low: np.ndarray, high: np.ndarray, steps: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Narrow brackets, elementwise, to where `below` turns from true to false."""
    for _ in range(steps):
        middle = (low + high) / 2
        up = below(middle)
        low, high = np.where(up, middle, low), np.where(up, high, middle)
    return low, high


def tokens_for(C: Any, N: Any, flops: Flops, G: Any = 1) -> np.ndarray:
    """Return the tokens that a budget pays for at given sizes; 0 where it does not pay for one."""
    N, C = np.broadcast_arrays(np.asarray(N, float), np.asarray(C, float))
    fixed, one = np.asarray(flops(N, 0.0, G), float), np.asarray(flops(N, 1.0, G), float)
    per_token = one - fixed
    paid = one <= C
    # exact for a cost that is linear in D; Newton's steps in logs for one that is not. The price
    # of a token drowns in a large fixed cost, so it is taken over as many tokens as fit.
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
    """The loss along a budget as a function of log N, and its minimum."""

    law: Law
    values: Mapping[str, Any]
    C: Any
    flops: Flops
    given: Mapping[str, Any]

    def loss(self, x: np.ndarray) -> np.ndarray:
        """Return the loss at log N of shape (draws, sizes); infinite where N alone is too dear."""
        C = np.asarray(self.C, float)[..., None]
        D = tokens_for(C, np.exp(x), self.flops, self.given.get("G", 1))
        values = {name: np.asarray(self.values[name], float)[..., None] for name in self.law.names}
        loss = self.law.predict(values, **{**self.given, "N": np.exp(x), "D": np.maximum(D, 1.0)})
        return np.where(D >= 1, loss, np.inf)

    def slope(self, x: np.ndarray) -> np.ndarray:
        """Return the sign of the loss's derivative by log N at (draws, sizes), fourth order."""
        points = x[..., None] + STENCIL * np.array([-2.0, -1.0, 1.0, 2.0])
        losses = self.loss(points.reshape(*x.shape[:-1], -1)).reshape(points.shape)
        with np.errstate(invalid="ignore"):  # infinite where the budget ends
            return losses @ np.array([1.0, -8.0, 8.0, -1.0])

    def run(self) -> np.ndarray:
        """Return log N of the minimum, of shape (draws,).

        The loss is too flat there to tell neighbouring sizes apart, so the sign of its slope is
        followed into ever smaller brackets.
        """
        grid = np.linspace(math.log(SEARCH[0]), math.log(SEARCH[1]), GRID)
        at = np.argmin(self.loss(grid), axis=-1)
        if np.any((at == 0) | (at == GRID - 1)):
            raise NoMinimumError(
                f"`{self.law.name}` has no least loss at {np.max(self.C):.3g} FLOPs between "
                f"{SEARCH[0]:.0e} and {SEARCH[1]:.0e} parameters: it falls to the edge.",
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
