"""From vectors of the search to the parameters of a law: fixed, tied, bounded, in logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ScalingError
from ..laws.duals import Dual
from ..laws.law import Law, Namespace


TINY = 1e-300  # stands for a bound of zero where the search moves in logs


@dataclass(frozen=True, eq=False)
class Space:
    """The free parameters of a fit and what becomes of the others.

    Attributes:
        law ([`Law`]): The law.
        free (`tuple[str, ...]`): Names of the free parameters: a point's coordinates.
        fixed (`Mapping[str, float]`): Values of the fixed ones.
        tied (`Mapping[str, str]`): Of each tied one, the free or fixed one it follows.
        low (`np.ndarray`): Lower bounds of the coordinates, (free,).
        high (`np.ndarray`): Upper bounds.
        logs (`np.ndarray`): Which coordinates are logarithms, booleans (free,).
    """

    law: Law
    free: tuple[str, ...]
    fixed: Mapping[str, float]
    tied: Mapping[str, str]
    low: np.ndarray
    high: np.ndarray
    logs: np.ndarray

    @classmethod
    def of(
        cls,
        law: Law,
        fixed: Mapping[str, float],
        tied: Mapping[str, str],
        bounds: Mapping[str, tuple[float, float]],
    ) -> Space:
        """Check what the caller wants of each parameter.

        Raises:
            ScalingError: If a name is unknown, a parameter is both fixed and tied, tied to
                a tied one or to one of another kind, nothing is free, a value lies outside its
                bounds or bounds are the wrong way round.
        """
        for name in [*fixed, *tied, *tied.values(), *bounds]:
            law.parameter(name)
        _check_ties(law, fixed, tied)
        free = tuple(n for n in law.names if n not in fixed and n not in tied)
        if not free:
            raise ScalingError(f"No parameter of `{law.name}` is free: nothing to fit.")
        limits = {}
        for parameter in law.parameters:
            low, high = bounds.get(parameter.name, parameter.bounds)
            if not low < high:
                raise ScalingError(
                    f"`bounds` of `{parameter.name}` must be (low, high), got {(low, high)}; use "
                    "`fixed` to hold it at a value."
                )
            if parameter.scale == "log" and low < 0:
                raise ScalingError(f"`{parameter.name}` is positive: {low} cannot bound it.")
            limits[parameter.name] = (low, high)
        for name, value in fixed.items():
            low, high = limits[name]
            if not low <= value <= high:
                raise ScalingError(f"`{name}` must be in [{low:g}, {high:g}], got {value}.")
        logs = np.array([law.parameter(name).scale == "log" for name in free])
        edges = np.array([limits[name] for name in free], dtype=np.float64)
        with np.errstate(divide="ignore"):
            edges[logs] = np.log(np.maximum(edges[logs], TINY))
        return cls(law, free, dict(fixed), dict(tied), edges[:, 0], edges[:, 1], logs)

    def parameters(self, points: np.ndarray, duals: bool = False) -> Namespace:
        """Every parameter at some points.

        Args:
            points (`np.ndarray`): (points, free).
            duals (`bool`): Whether to carry derivatives with respect to the coordinates.

        Returns:
            `Namespace`: Of arrays (points, 1), or `Dual`s of them.
        """
        result: dict[str, object] = {name: np.float64(value) for name, value in self.fixed.items()}
        for column, name in enumerate(self.free):
            value = points[:, column : column + 1]
            slope: object = 1.0
            if self.logs[column]:
                with np.errstate(over="ignore"):
                    value = slope = np.exp(value)  # infinite far out, where nothing is taken
            result[name] = Dual(value, {name: slope}) if duals else value
        result |= {name: result[master] for name, master in self.tied.items()}
        return Namespace(**result)

    def point(self, values: Mapping[str, Any]) -> np.ndarray:
        """The coordinates of values, moved into the bounds.

        Args:
            values (`Mapping`): By parameter, numbers or arrays (points,); at least the free ones.

        Returns:
            `np.ndarray`: (free,), or (points, free).
        """
        raw = np.stack([np.asarray(values[name], np.float64) for name in self.free], -1)
        raw[..., self.logs] = np.log(np.maximum(raw[..., self.logs], TINY))
        return np.clip(raw, self.low, self.high)

    def values(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Every parameter at some points, by name in the law's order, each (points,)."""
        p = vars(self.parameters(points))
        return {n: np.broadcast_to(p[n], (len(points), 1))[:, 0] for n in self.law.names}

    def on_bound(self, point: np.ndarray) -> tuple[str, ...]:
        """Names of the coordinates of one point that stand on a bound."""
        slack = 1e-9 * np.maximum(1.0, np.abs(point))
        at = (point <= self.low + slack) | (point >= self.high - slack)
        return tuple(name for name, hit in zip(self.free, at, strict=True) if hit)


def _check_ties(law: Law, fixed: Mapping[str, float], tied: Mapping[str, str]) -> None:
    linear = {parameter.name for parameter in law.linear}
    for name, master in tied.items():
        if name in fixed:
            raise ScalingError(f"`{name}` cannot be both fixed and tied.")
        if master in tied or master == name:
            raise ScalingError(f"`{name}` must be tied to a parameter that is not, got {master!r}.")
        if (name in linear) != (master in linear) or {name, master} & set(law.links):
            raise ScalingError(
                f"`{name}` cannot be tied to `{master}`: one weights a column, the other shapes it."
            )
