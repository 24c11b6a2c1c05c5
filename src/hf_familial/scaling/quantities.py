"""Quantities that people ask of a fit: numbers that follow from its coefficients."""

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


ENDS = {"low": -math.inf, "high": math.inf}  # of an interval that is open


@dataclass(frozen=True)
class Interval:
    """Two ends between which a number lies with some confidence.

    Attributes:
        level (`float`): Confidence, between 0 and 1.
        low (`float`): Lower end; may be minus infinity.
        high (`float`): Upper end; may be infinity.
        method (`str`): `"delta"`, `"profile"`, `"percentile"` or `"bca"`; `"t"` or `"chi2"` by that
            distribution.
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
        """Return the JSON form; an end that is not finite becomes null."""
        return {
            name: None if name in ENDS and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Interval:
        """Read `to_dict`'s form."""
        open_ends = {name: end for name, end in ENDS.items() if record[name] is None}
        return cls(**{**record, **open_ends})


def check_level(level: float) -> None:
    """Raise `ScalingError` unless a confidence level lies between 0 and 1."""
    if not 0 < level < 1:
        raise ScalingError(f"`level` must lie between 0 and 1, such as 0.95, got {level}.")


@dataclass(frozen=True)
class DerivedQuantity:
    """A number that follows from the coefficients of a law.

    Attributes:
        name (`str`): What it is.
        of (`Callable`): Takes the coefficients by name, numbers or arrays of shape (draws,), and
            returns a number or an array of that shape.
        scale (`str`): `"log"` if it is positive and its logarithm is the more nearly normal one.
        unit (`str`): Of the number.
    """

    name: str
    of: Callable[[Mapping[str, Any]], Any]
    scale: Literal["linear", "log"] = "linear"
    unit: str = "1"

    def scaled(self, values: Mapping[str, Any]) -> np.ndarray:
        """Return the number on its own scale; NaN where it does not exist."""
        with np.errstate(all="ignore"):
            number = np.asarray(self.of(values), float)
            return np.log(number) if self.scale == "log" else number

    def unscaled(self, number: float) -> float:
        """Return a number of its own scale as it is meant."""
        if self.scale == "linear":
            return float(number)
        return math.exp(number) if number < 700 else math.inf


def coefficient(law: Law, name: str) -> DerivedQuantity:
    """Return a coefficient of a law as a quantity."""
    return DerivedQuantity(name, lambda values: values[name], law.parameter(name).scale)


def loss_at(law: Law, **variables: float) -> DerivedQuantity:
    """Return the loss that a law predicts at all its variables, in the unit of its target."""
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
    """Return N, D or the loss at the optimum of a budget.

    Args:
        law ([`Law`]): Reads N and D.
        C (`float`): FLOPs.
        of (`str`): Which of them.
        flops, max_N, max_D: As for `best`: cost of a run, most parameters, most tokens.
        given: The law's other variables, numbers.
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
    """Return the exponent of N* as a power of C at C = 6ND, beta / (alpha + beta).

    `ScalingError` is raised when it is evaluated, if the law has no closed form.
    """

    def number(values: Mapping[str, Any]) -> Any:
        found = powers(law, values, **given)
        if found is None:
            raise ScalingError(f"`{law.name}` has no closed form of its optimum.")
        return found.beta / (found.alpha + found.beta)

    return DerivedQuantity("exponent of N*", number)


def granularity_compute(
    law: Law, G: float, C: float, flops: Flops | None = None
) -> DerivedQuantity:
    """Return the factor of compute that buys back what G exits cost: the loss of `C` at G = 1.

    Where the factor `G^gamma` stands on all that is reducible and C = 6ND this is `G^(gamma (alpha
    + beta) / (alpha beta))`, whatever C is: the reducible loss at the optimum falls as `C^-(alpha
    beta / (alpha + beta))`. Derived here; other laws are solved numerically, at the cost `flops(N,
    D, G)` of a run.
    """
    if "G" not in law.variable_names:
        raise ScalingError(f"`{law.name}` does not read `G`: it has no cost of granularity.")

    def number(values: Mapping[str, Any]) -> Any:
        shape = np.shape(next(iter(values.values())))
        target = least_loss(law, values, C, flops, G=1.0)
        return compute_for(law, values, target, shape, flops, G=float(G)) / C

    return DerivedQuantity(f"compute of G={G:g} over G=1", number, "log")


def least_loss(
    law: Law, values: Mapping[str, Any], C: Any, flops: Flops | None = None, **given: Any
) -> np.ndarray:
    """Return the loss at the optimum of a budget, of the shape of the values; see `best`."""
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
    """Return the FLOPs whose optimum has a loss; infinite where no budget reaches it."""
    low, high = np.full(shape, math.log(1e10)), np.full(shape, math.log(1e40))
    low, high = bisect(
        lambda at: least_loss(law, values, np.exp(at), flops, **given) > loss, low, high
    )
    return np.where(high < math.log(1e40) - 1e-6, np.exp((low + high) / 2), np.inf)
