"""Efficiency Leverage: what one family saves over the dense models it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..errors import ScalingError
from .flop_models import Flops, six_nd
from .laws.law import Law
from .optima import best, tokens_for
from .quantities import DerivedQuantity


Split = Literal["tokens", "flops"]


def even_members(G: int) -> tuple[float, ...]:
    """Sizes of the members of G evenly spaced exits, as shares of the whole: 1/G, 2/G, ..., 1."""
    if G < 1:
        raise ScalingError(f"`G` must be 1 or more, got {G}.")
    return tuple((exit_idx + 1) / G for exit_idx in range(G))


def loss_leverage(
    law: Law,
    C: float,
    members: Sequence[float],
    split: Split = "tokens",
    flops: Flops | None = None,
    dense: tuple[Law, Mapping[str, float]] | None = None,
) -> DerivedQuantity:
    """Average loss of separate dense models over that of the family, at equal FLOPs.

    `EL = mean_g L_dense(m_g N, D_g) / L(N, D, G)`: the family spends all of C on one run at its
    optimum (N, D), so every member sees all D tokens; the G dense models of the members' sizes
    share the same C. More than 1 says that the family is the better buy. That it "compares the
    average loss to that of independent size-matched dense models under equal FLOPs" is from the
    abstract of arXiv:2512.23407; the quotient and how C is shared out are choices made here.

    Args:
        law ([`Law`]): Reads N, D and G; its loss is the mean over the members.
        C (`float`): FLOPs.
        members (`Sequence[float]`): Sizes as shares of N, rising, the last 1; see `even_members`.
        split (`str`, *optional*, defaults to `"tokens"`): How the dense models share C: all see
            the same `"tokens"`, or all get the same `"flops"`.
        flops (`Callable`, *optional*): `flops(N, D, G)` of the family, and with G = 1 of each dense
            model; 6ND without it.
        dense (`tuple`, *optional*): Law and coefficients of dense models, taken as exact; without
            it the family's own law at G = 1.

    Raises:
        ScalingError: If `members` or `split` is unlawful, or the law does not read G.

    Reference: arXiv:2512.23407.
    """
    shares = _check(law, members, split)

    def number(values: Mapping[str, Any]) -> Any:
        N, D = best(law, values, C, flops, G=float(len(shares)))
        family = law.predict(values, N=N, D=D, G=float(len(shares)))
        return _dense_loss(law, values, dense, N, C, shares, split, flops) / family

    return DerivedQuantity(f"loss leverage of G={len(shares)} at {C:.4g} FLOPs", number, "log")


def compute_leverage(
    law: Law,
    C: float,
    members: Sequence[float],
    split: Split = "tokens",
    flops: Flops | None = None,
    dense: tuple[Law, Mapping[str, float]] | None = None,
) -> DerivedQuantity:
    """FLOPs that separate dense models need for the family's loss, over the family's.

    `EL = C_dense / C` with `mean_g L_dense(m_g N, D_g(C_dense)) = L(N, D, G)`. For mixtures of
    experts the quotient is of one dense model and one mixture of equal loss (arXiv:2507.17702); a
    family stands for G models, so here all G are paid for. Infinite where dense models of these
    sizes never get there. [`granularity_compute`] compares one model with one.

    Args:
        law ([`Law`]): Reads N, D and G; its loss is the mean over the members.
        C (`float`): FLOPs.
        members (`Sequence[float]`): Sizes as shares of N, rising, the last 1; see `even_members`.
        split (`str`, *optional*, defaults to `"tokens"`): How the dense models share their FLOPs:
            all see the same `"tokens"`, or all get the same `"flops"`.
        flops (`Callable`, *optional*): `flops(N, D, G)` of the family, and with G = 1 of each dense
            model; 6ND without it.
        dense (`tuple`, *optional*): Law and coefficients of dense models, taken as exact; without
            it the family's own law at G = 1.

    Raises:
        ScalingError: If `members` or `split` is unlawful, or the law does not read G.

    Reference: arXiv:2507.17702.
    """
    shares = _check(law, members, split)

    def number(values: Mapping[str, Any]) -> Any:
        N, D = best(law, values, C, flops, G=float(len(shares)))
        family = law.predict(values, N=N, D=D, G=float(len(shares)))
        low, high = np.full_like(N, math.log(C) - 30), np.full_like(N, math.log(C) + 60)
        top = high
        for _ in range(70):
            middle = (low + high) / 2
            above = (
                _dense_loss(law, values, dense, N, np.exp(middle), shares, split, flops) > family
            )
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(high < top, np.exp(high) / C, np.inf)

    return DerivedQuantity(f"compute leverage of G={len(shares)} at {C:.4g} FLOPs", number, "log")


def _check(law: Law, members: Sequence[float], split: str) -> np.ndarray:
    if "G" not in law.variable_names:
        raise ScalingError(f"Efficiency Leverage needs a law of `G`; `{law.name}` reads none.")
    if split not in ("tokens", "flops"):
        raise ScalingError(f"`split` must be 'tokens' or 'flops', got {split!r}.")
    shares = np.asarray(members, float)
    if shares.ndim != 1 or not len(shares) or shares[0] <= 0 or np.any(np.diff(shares) <= 0):
        raise ScalingError(f"`members` must be positive and rising, got {members}.")
    if shares[-1] != 1:
        raise ScalingError(f"the last of `members` must be 1, the whole, got {shares[-1]}.")
    return shares


def _dense_loss(
    law: Law,
    values: Mapping[str, Any],
    dense: tuple[Law, Mapping[str, float]] | None,
    N: Any,
    C: Any,
    shares: np.ndarray,
    split: str,
    flops: Flops | None,
) -> np.ndarray:
    """Mean loss of dense models of the members' sizes that share C, of the shape of N."""
    sizes = np.asarray(N, float)[..., None] * shares
    cost, budget = flops or six_nd, np.asarray(C, float)[..., None]
    if split == "flops":
        D = tokens_for(budget / len(shares), sizes, cost)
    else:

        def together(whole: Any, D: Any, G: Any) -> Any:
            return sum(cost(share * whole, D, G) for share in shares)

        D = tokens_for(budget, np.asarray(N, float)[..., None], together)
    D = np.maximum(D, 1.0)
    if dense is not None:
        return dense[0].predict(dense[1], N=sizes, D=D).mean(-1)
    columns = {name: np.asarray(value, float)[..., None] for name, value in values.items()}
    return law.predict(columns, N=sizes, D=D, G=1.0).mean(-1)
