"""Efficiency Leverage: the gain of one family over separate dense models of its members' sizes."""

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
    """Return the sizes of the members of G evenly spaced exits, as shares of N: 1/G, 2/G, ..., 1.

    Example:
        >>> even_members(4)
        (0.25, 0.5, 0.75, 1.0)
    """
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
    """Return the mean loss of separate dense models divided by the family's loss, as a quantity.

    Both sides spend C FLOPs. The family spends them on one run at its optimum (N, D), so every
    member is trained on all D tokens. The G dense models have the sizes of the members and share
    the budget. With size shares m_g: `EL = mean_g L_dense(m_g N, D_g) / L(N, D, G)`. A value above
    1 favours the family.

    The abstract of arXiv:2512.23407 says that it "compares the average loss to that of independent
    size-matched dense models under equal FLOPs". The quotient and the split of C are choices of
    this package.

    Args:
        law ([`Law`]): A law of N, D and G. Its loss is the mean over the members.
        C (`float`): The budget of each side, in FLOPs.
        members (`Sequence[float]`): Sizes of the members as rising shares of N. The last is 1. See
            `even_members`.
        split (`str`): `"tokens"` if all dense models train on the same number of tokens, `"flops"`
            if they all spend the same FLOPs.
        flops (`Callable`): FLOP model `flops(N, D, G)`, used with G = 1 for a dense model. Default:
            6ND.
        dense (`tuple`): Law and coefficients of dense models, assumed to be exact. Default: the
            family's law at G = 1.

    Raises:
        ScalingError: If `members` or `split` is invalid, or the law does not use G.

    Example:
        >>> law = get_law("familial")
        >>> gain = loss_leverage(law, 1e21, even_members(4))
        >>> gain.of(law.published["assumed"].values)
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
    """Return the FLOPs of separate dense models divided by the family's FLOPs, at equal mean loss.

    The result is the quantity `EL = C_dense / C`, where `C_dense` solves `mean_g L_dense(m_g N,
    D_g(C_dense)) = L(N, D, G)`. It is infinite if dense models of these sizes never reach the
    family's loss. Arguments and errors are those of [`loss_leverage`].

    For mixtures of experts, the quotient compares one dense model with one mixture of equal loss
    (arXiv:2507.17702). A family replaces G models, so `C_dense` pays for all of them.
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
    """A comparison of a family with dense models of its members' sizes."""

    law: Law
    C: float
    members: Sequence[float]
    split: str
    flops: Flops | None
    dense: tuple[Law, Mapping[str, float]] | None

    def __post_init__(self) -> None:
        if "G" not in self.law.variable_names:
            raise ScalingError(
                f"Efficiency Leverage needs a law of `G`, and `{self.law.name}` does not use it."
            )
        if self.split not in ("tokens", "flops"):
            raise ScalingError(f"`split` must be 'tokens' or 'flops', got {self.split!r}.")
        shares = self.shares = np.asarray(self.members, float)
        if shares.ndim != 1 or not len(shares) or shares[0] <= 0 or np.any(np.diff(shares) <= 0):
            raise ScalingError(
                f"`members` must be positive shares of N in rising order, got {self.members}."
            )
        if shares[-1] != 1:
            raise ScalingError(
                f"The last of `members` must be 1 (the whole model), got {shares[-1]}."
            )

    @property
    def words(self) -> str:
        return f"G={len(self.shares)} at {self.C:.4g} FLOPs"

    def family(self, values: Values) -> tuple[np.ndarray, np.ndarray]:
        """Return N and the loss of the best run of the family."""
        G = float(len(self.shares))
        N, D = best(self.law, values, self.C, self.flops, G=G)
        return N, self.law.predict(values, N=N, D=D, G=G)

    def dense_loss(self, values: Values, N: Any, C: Any) -> np.ndarray:
        """Return the mean loss of the dense models that share C FLOPs, in the shape of N."""
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
