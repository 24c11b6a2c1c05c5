"""What laws are described with: variables, parameters, published values, domains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ...errors import ScalingError


@dataclass(frozen=True)
class Variable:
    """A quantity that a run has and a law reads.

    Attributes:
        name (`str`): Name of its column.
        symbol (`str`): LaTeX.
        unit (`str`): Unit of its numbers; "1" where they have none.
        meaning (`str`): What it counts.
        minimum (`float`): Smallest lawful value.
        maximum (`float`): Smallest value that is too large.
        open_minimum (`bool`): Whether `minimum` itself is unlawful.
        levels (`int`): Different values it takes to identify the law.
    """

    name: str
    symbol: str
    unit: str
    meaning: str
    minimum: float = 0.0
    maximum: float = math.inf
    open_minimum: bool = True
    levels: int = 3

    def lawful(self, values: np.ndarray) -> np.ndarray:
        """Which values the variable can take; NaN and infinity never.

        Args:
            values (`np.ndarray`): Any shape.

        Returns:
            `np.ndarray`: Booleans of the same shape.
        """
        above = values > self.minimum if self.open_minimum else values >= self.minimum
        return above & (values < self.maximum) & np.isfinite(values)

    @property
    def range_text(self) -> str:
        """The lawful values in words, such as `> 0 and finite`."""
        sign = ">" if self.open_minimum else ">="
        top = "finite" if math.isinf(self.maximum) else f"< {self.maximum:g}"
        return f"{sign} {self.minimum:g} and {top}"


LOSS = Variable("loss", "L", "nats per token", "mean cross entropy of held-out or training tokens")


@dataclass(frozen=True)
class Parameter:
    """One coefficient of a law.

    Attributes:
        name (`str`): Its key in `Fit.values`.
        symbol (`str`): LaTeX.
        meaning (`str`): What it stands for; its unit where it has one.
        bounds (`tuple[float, float]`): Smallest and largest value.
        starts (`tuple[float, ...]`): Values the grid of starts tries. A linear parameter needs
            one only if the law's columns read it.
        scale (`str`): `"log"` if the search moves its logarithm (it is then positive), else
            `"linear"`.
    """

    name: str
    symbol: str
    meaning: str
    bounds: tuple[float, float] = (-math.inf, math.inf)
    starts: tuple[float, ...] = ()
    scale: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not low <= high:
            raise ScalingError(f"`bounds` of `{self.name}` must be (low, high), got {self.bounds}.")
        if self.scale == "log" and low < 0:
            raise ScalingError(f"`{self.name}` moves in logs: its bounds must not be negative.")


@dataclass(frozen=True)
class Published:
    """Values of a law's parameters as someone printed them.

    Attributes:
        values (`Mapping[str, float]`): By parameter.
        source (`str`): Where they stand: arXiv number or URL, table or equation.
        note (`str`): Data they were fitted on, or how sure they are.
    """

    values: Mapping[str, float]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Domain:
    """Where a law was fitted, and where it is known to fail.

    Attributes:
        ranges (`Mapping[str, tuple[float, float]]`): By variable, smallest and largest value of
            the runs behind the published values.
        architectures (`tuple[str, ...]`): Kinds of model: `"dense"`, `"moe"`, `"sparse"`,
            `"familial"`.
        settings (`str`): Data, schedule, how N and the FLOPs were counted.
        failures (`tuple[str, ...]`): Known failure modes, one sentence each.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    architectures: tuple[str, ...] = ("dense",)
    settings: str = ""
    failures: tuple[str, ...] = ()

    def outside(self, **variables: Any) -> tuple[str, ...]:
        """One sentence for every variable that leaves its range.

        Args:
            variables (`float` or `np.ndarray`): By name; those without a range are not judged.

        Returns:
            `tuple[str, ...]`: Empty inside the domain.
        """
        sentences = []
        for name, value in variables.items():
            low, high = self.ranges.get(name, (-math.inf, math.inf))
            small, large = float(np.min(value)), float(np.max(value))
            for got, bad, edge in ((small, small < low, low), (large, large > high, high)):
                if bad:
                    side = "below" if edge == low else "above"
                    sentences.append(
                        f"`{name}` = {got:.4g} is {side} {edge:.4g}, the edge of the runs this "
                        "law was fitted on."
                    )
        return tuple(sentences)
