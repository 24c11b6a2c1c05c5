"""Efficiency Leverage: what one family saves over the dense models it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ScalingError
from .flop_models import Flops, six_nd
from .laws.law import Law
from .optima import best, bisect, tokens_for
from .quantities import DerivedQuantity


Split = Literal["tokens", "flops"]
Values = Mapping[str, Any]


def even_members(G: int) -> tuple[float, ...]:
    """Return the sizes of the members of G evenly spaced exits, as shares: 1/G, 2/G, ..., 1."""
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
    """Return the average loss of separate dense models over that of the family, at equal FLOPs.

    `EL = mean_g L_dense(m_g N, D_g) / L(N, D, G)`: the family spends all of C on one run at its
    optimum (N, D), so every member sees all D tokens; the G dense models of the members' sizes
    share the same C. That it "compares the average loss to that of independent size-matched dense
    models under equal FLOPs" is from the abstract of arXiv:2512.23407; the quotient and how C is
    shared out are choices made here.

    Args:
        law ([`Law`]): Reads N, D and G; its loss is the mean over the members.
        C (`float`): FLOPs.
        members (`Sequence[float]`): Sizes as shares of N, rising, the last 1; see `even_members`.
        split (`str`): Whether the dense models all see the same `"tokens"` or get the same
            `"flops"`.
        flops (`Callable`): `flops(N, D, G)` of the family, and with G = 1 of each dense model; 6ND
            without it.
        dense (`tuple`): Law and coefficients of dense models, taken as exact; without it the
            family's own law at G = 1.

    Raises:
        ScalingError: If `members` or `split` is unlawful, or the law does not read G.
    """
    comparison = _Comparison(law, C, members, split, flops, dense)

    def number(values: Values) -> Any:
        N, family = comparison.family(values)
        return comparison.dense_loss(values, N, C) / family

    return DerivedQuantity(f"loss leverage of {comparison.words}", number, "log")


def compute_leverage(
    law: Law,
    C: float,
    members: Sequence[float],
    split: Split = "tokens",
    flops: Flops | None = None,
    dense: tuple[Law, Mapping[str, float]] | None = None,
) -> DerivedQuantity:
    """Return the FLOPs that separate dense models need for the family's loss, over the family's.

    `EL = C_dense / C` with `mean_g L_dense(m_g N, D_g(C_dense)) = L(N, D, G)`. For mixtures of
    experts the quotient is of one dense model and one mixture of equal loss (arXiv:2507.17702); a
    family stands for G models, so here all G are paid for. Infinite where dense models of these
    sizes never get there. Arguments and errors are those of [`loss_leverage`].
    """
    comparison = _Comparison(law, C, members, split, flops, dense)

    def number(values: Values) -> Any:
        N, family = comparison.family(values)
        low, high = np.full_like(N, math.log(C) - 30), np.full_like(N, math.log(C) + 60)
        _, found = bisect(
            lambda at: comparison.dense_loss(values, N, np.exp(at)) > family, low, high, 70
        )
        return np.where(found < high, np.exp(found) / C, np.inf)

    return DerivedQuantity(f"compute leverage of {comparison.words}", number, "log")


@dataclass
class _Comparison:
    """A family against dense models of its members' sizes."""

    law: Law
    C: float
    members: Sequence[float]
    split: str
    flops: Flops | None
    dense: tuple[Law, Mapping[str, float]] | None

    def __post_init__(self) -> None:
        if "G" not in self.law.variable_names:
            raise ScalingError(
                f"Efficiency Leverage needs a law of `G`; `{self.law.name}` reads none."
            )
        if self.split not in ("tokens", "flops"):
            raise ScalingError(f"`split` must be 'tokens' or 'flops', got {self.split!r}.")
        shares = self.shares = np.asarray(self.members, float)
        if shares.ndim != 1 or not len(shares) or shares[0] <= 0 or np.any(np.diff(shares) <= 0):
            raise ScalingError(f"`members` must be positive and rising, got {self.members}.")
        if shares[-1] != 1:
            raise ScalingError(f"the last of `members` must be 1, the whole, got {shares[-1]}.")

    @property
    def words(self) -> str:
        return f"G={len(self.shares)} at {self.C:.4g} FLOPs"

    def family(self, values: Values) -> tuple[np.ndarray, np.ndarray]:
        """Return N and the loss of the family's best run."""
        G = float(len(self.shares))
        N, D = best(self.law, values, self.C, self.flops, G=G)
        return N, self.law.predict(values, N=N, D=D, G=G)

    def dense_loss(self, values: Values, N: Any, C: Any) -> np.ndarray:
        """Return the mean loss of the dense models that share C, of the shape of N."""
        whole, shares = np.asarray(N, float)[..., None], self.shares
        cost, budget = self.flops or six_nd, np.asarray(C, float)[..., None]

        def together(whole: Any, D: Any, G: Any) -> Any:
            return sum(cost(share * whole, D, G) for share in shares)

        if self.split == "flops":
            D = tokens_for(budget / len(shares), whole * shares, cost)
        else:
            D = tokens_for(budget, whole, together)
        at = {"N": whole * shares, "D": np.maximum(D, 1.0)}
        if self.dense is not None:
            return self.dense[0].predict(self.dense[1], **at).mean(-1)
        columns = {name: np.asarray(value, float)[..., None] for name, value in values.items()}
        return self.law.predict(columns, **at, G=1.0).mean(-1)
