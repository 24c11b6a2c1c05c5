"""Quantities derived from the coefficients of a fit, such as the best N for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..errors import NoMinimumError, ScalingError
from .flop_models import Flops
from .laws.law import Law
from .optima import best, bisect, powers


ENDS = {"low": -math.inf, "high": math.inf}  # the ends of an interval without bounds


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a number.

    Attributes:
        level (`float`): Confidence level, between 0 and 1.
        low (`float`): Lower end. It may be minus infinity.
        high (`float`): Upper end. It may be infinity.
        method (`str`): The method that computed it: `"delta"`, `"profile"`, `"percentile"`,
            `"bca"`, `"t"` (Student's t) or `"chi2"` (chi square).

    Example:
        >>> 0.03 in Interval(0.95, 0.01, 0.05, "delta")
        True
    """

    level: float
    low: float
    high: float
    method: str

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.low > self.high:
            raise ScalingError(f"`low` must not exceed `high`, got {self.low} and {self.high}.")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form. An infinite end becomes null."""
        return {
            name: None if name in ENDS and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Interval:
        """Build an interval from the form that `to_dict` returns."""
        open_ends = {name: end for name, end in ENDS.items() if record[name] is None}
        return cls(**{**record, **open_ends})


def check_level(level: float) -> None:
    """Raise `ScalingError` unless a confidence level is between 0 and 1."""
    if not 0 < level < 1:
        raise ScalingError(f"`level` must be between 0 and 1, such as 0.95, got {level}.")


@dataclass(frozen=True)
class DerivedQuantity:
    """A number computed from the coefficients of a law.

    Attributes:
        name (`str`): A short description, such as `"loss at N=1e+09, D=2e+10"`.
        of (`Callable`): The function that computes it. The argument maps coefficient names to
            numbers or arrays of shape (draws,). The result has the same shape.
        scale (`str`): `"log"` if the number is positive and its logarithm is closer to a normal
            distribution than the number itself, else `"linear"`.
        unit (`str`): Unit of the number, `"1"` if it has none.
    """

    name: str
    of: Callable[[Mapping[str, Any]], Any]
    scale: Literal["linear", "log"] = "linear"
    unit: str = "1"

    def scaled(self, values: Mapping[str, Any]) -> np.ndarray:
        """Return the number, or its logarithm if `scale` is `"log"`. Undefined numbers are NaN."""
        with np.errstate(all="ignore"):
            number = np.asarray(self.of(values), float)
            return np.log(number) if self.scale == "log" else number

    def unscaled(self, number: float) -> float:
        """Return the number itself, given its value on the scale of `scaled`."""
        if self.scale == "linear":
            return float(number)
        return math.exp(number) if number < 700 else math.inf


def coefficient(law: Law, name: str) -> DerivedQuantity:
    """Return a coefficient of a law as a quantity, for `intervals` and the like."""
    return DerivedQuantity(name, lambda values: values[name], law.parameter(name).scale)


def loss_at(law: Law, **variables: float) -> DerivedQuantity:
    """Return the predicted loss as a quantity, given a value for each of the law's variables."""
    where = ", ".join(f"{name}={value:.4g}" for name, value in variables.items())
    return DerivedQuantity(
        f"loss at {where}", lambda values: law.predict(values, **variables), "log", law.target.unit
    )


def optimal(
    law: Law,
    C: float,
    of: Literal["N", "D", "loss"] = "N",
    flops: Flops | None = None,
    max_N: float = math.inf,
    max_D: float = math.inf,
    **given: float,
) -> DerivedQuantity:
    """Return N, D or the loss of the best run for a budget, as a quantity.

    Args:
        law ([`Law`]): A law of N and D.
        C (`float`): The budget in FLOPs.
        of (`str`): The number to return: `"N"` (parameters), `"D"` (tokens) or `"loss"`.
        flops (`Callable`, *optional*): The FLOP model `flops(N, D, G)`. Default: 6ND.
        max_N (`float`): Largest number of parameters.
        max_D (`float`): Largest number of tokens.
        given: Values of the law's other variables.

    Example:
        >>> intervals(fitted, [optimal(fitted.law, C=1e21, G=4)])
    """

    def number(values: Mapping[str, Any]) -> Any:
        try:
            N, D = best(law, values, C, flops, max_N, max_D, **given)
        except NoMinimumError:
            return np.full(np.shape(next(iter(values.values()))), np.nan)
        return {"N": N, "D": D}[of] if of != "loss" else law.predict(values, **given, N=N, D=D)

    unit = {"N": "parameters", "D": "tokens", "loss": law.target.unit}[of]
    return DerivedQuantity(f"{of} at the optimum of {C:.4g} FLOPs", number, "log", unit)


def size_exponent(law: Law, **given: float) -> DerivedQuantity:
    """Return the exponent b of N* ~ C^b at C = 6ND, as a quantity: beta / (alpha + beta).

    N* is the best number of parameters for C FLOPs. Evaluating the quantity raises `ScalingError`
    if the optimum of the law has no closed form.
    """

    def number(values: Mapping[str, Any]) -> Any:
        found = powers(law, values, **given)
        if found is None:
            raise ScalingError(
                f"The optimum of `{law.name}` has no closed form. Use `optimal` at two budgets."
            )
        return found.beta / (found.alpha + found.beta)

    return DerivedQuantity("exponent of N*", number)


def granularity_compute(
    law: Law, G: float, C: float, flops: Flops | None = None
) -> DerivedQuantity:
    """Return the factor by which compute must grow so that G exits reach the loss of one exit.

    One exit (G = 1) reaches some loss with C FLOPs. A family with G exits reaches it with a larger
    budget. The result is that budget divided by C, as a quantity. It is solved numerically with
    the FLOP model `flops(N, D, G)` (default: 6ND).

    For the law `familial` at C = 6ND it equals `G^(gamma (alpha + beta) / (alpha beta))` at any
    C. The reason is that the reducible loss at the optimum falls as `C^-(alpha beta / (alpha +
    beta))`. This formula was derived here.
    """
    if "G" not in law.variable_names:
        raise ScalingError(
            f"`{law.name}` does not use `G`, so it has no cost of granularity. Use a familial law."
        )

    def number(values: Mapping[str, Any]) -> Any:
        shape = np.shape(next(iter(values.values())))
        target = least_loss(law, values, C, flops, G=1.0)
        return compute_for(law, values, target, shape, flops, G=float(G)) / C

    return DerivedQuantity(f"compute of G={G:g} over G=1", number, "log")


def least_loss(
    law: Law, values: Mapping[str, Any], C: Any, flops: Flops | None = None, **given: Any
) -> np.ndarray:
    """Return the least loss for a budget, in the shape of the values. See `best`."""
    N, D = best(law, values, C, flops, **given)
    return law.predict(values, **given, N=N, D=D)


def compute_for(
    law: Law,
    values: Mapping[str, Any],
    loss: Any,
    shape: tuple[int, ...] = (),
    flops: Flops | None = None,
    **given: Any,
) -> np.ndarray:
    """Return the least FLOPs that reach a loss. The result is infinite if no budget reaches it."""
    low, high = np.full(shape, math.log(1e10)), np.full(shape, math.log(1e40))
    low, high = bisect(
        lambda at: least_loss(law, values, np.exp(at), flops, **given) > loss, low, high
    )
    return np.where(high < math.log(1e40) - 1e-6, np.exp((low + high) / 2), np.inf)
