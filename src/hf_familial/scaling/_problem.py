"""The minimisation problem of a fit: its free parameters, residuals and objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ScalingError
from .data import RunTable
from .laws._duals import Dual, grad_of, value_of
from .laws.law import Law, Namespace
from .results import Settings


TINY = 1e-300  # replaces a bound of zero for a parameter whose logarithm is searched


@dataclass(frozen=True, eq=False)
class Space:
    """The search space of a fit: the coordinates of its free parameters, and the other parameters.

    A point is an array of coordinates of shape (free,).
    """

    law: Law
    free: tuple[str, ...]
    fixed: Mapping[str, float]
    tied: Mapping[str, str]  # the free or fixed parameter that each tied one equals
    low: np.ndarray  # bounds of the coordinates, (free,)
    high: np.ndarray
    logs: np.ndarray  # which coordinates are logarithms, booleans (free,)

    @classmethod
    def of(cls, law: Law, settings: Settings) -> Space:
        """Build the space from the settings. `ScalingError` is raised if they are invalid."""
        fixed, tied, bounds = settings.fixed, settings.tied, settings.bounds
        for name in [*fixed, *tied, *tied.values(), *bounds]:
            law.parameter(name)
        _check_ties(law, fixed, tied)
        free = tuple(n for n in law.names if n not in fixed and n not in tied)
        if not free:
            raise ScalingError(
                f"All parameters of `{law.name}` are fixed or tied, so there is nothing to fit."
            )
        limits = {p.name: bounds.get(p.name, p.bounds) for p in law.parameters}
        for name, (low, high) in limits.items():
            if not low < high:
                raise ScalingError(
                    f"`bounds` of `{name}` must be (low, high), got {(low, high)}. Use `fixed` to "
                    "set it to one value."
                )
            if law.parameter(name).scale == "log" and low < 0:
                raise ScalingError(
                    f"`bounds` of `{name}` must be 0 or more, because it is positive, got {low}."
                )
            if not low <= fixed.get(name, low) <= high:
                raise ScalingError(f"`{name}` must be in [{low:g}, {high:g}], got {fixed[name]}.")
        logs = np.array([law.parameter(name).scale == "log" for name in free])
        edges = np.array([limits[name] for name in free], dtype=np.float64)
        with np.errstate(divide="ignore"):
            edges[logs] = np.log(np.maximum(edges[logs], TINY))
        return cls(law, free, dict(fixed), dict(tied), edges[:, 0], edges[:, 1], logs)

    def parameters(self, points: np.ndarray, duals: bool = False) -> Namespace:
        """Return every parameter at points (points, free), as arrays (points, 1) or `Dual`s."""
        result: dict[str, object] = {name: np.float64(value) for name, value in self.fixed.items()}
        for column, name in enumerate(self.free):
            value = points[:, column : column + 1]
            slope: object = 1.0
            if self.logs[column]:
                with np.errstate(over="ignore"):
                    value = slope = np.exp(value)  # can be infinite; such points are not accepted
            result[name] = Dual(value, {name: slope}) if duals else value
        result |= {name: result[master] for name, master in self.tied.items()}
        return Namespace(**result)

    def point(self, values: Mapping[str, Any]) -> np.ndarray:
        """Return the coordinates of values, (free,) or (points, free), moved into the bounds."""
        raw = np.stack([np.asarray(values[name], np.float64) for name in self.free], -1)
        raw[..., self.logs] = np.log(np.maximum(raw[..., self.logs], TINY))
        return np.clip(raw, self.low, self.high)

    def values(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Return the values of every parameter at points, each of shape (points,)."""
        p = vars(self.parameters(points))
        return {n: np.broadcast_to(p[n], (len(points), 1))[:, 0] for n in self.law.names}

    def on_bound(self, point: np.ndarray) -> tuple[str, ...]:
        """Return the names of the parameters that are on a bound at one point."""
        slack = 1e-9 * np.maximum(1.0, np.abs(point))
        at = (point <= self.low + slack) | (point >= self.high - slack)
        return tuple(name for name, hit in zip(self.free, at, strict=True) if hit)


def _check_ties(law: Law, fixed: Mapping[str, float], tied: Mapping[str, str]) -> None:
    linear = {parameter.name for parameter in law.linear}
    for name, master in tied.items():
        if name in fixed:
            raise ScalingError(f"`{name}` cannot be both fixed and tied.")
        if master in tied or master == name:
            raise ScalingError(
                f"`{name}` must be tied to a parameter that is not tied itself, got {master!r}."
            )
        if (name in linear) != (master in linear) or {name, master} & set(law.links):
            raise ScalingError(
                f"`{name}` cannot be tied to `{master}`, because one is the weight of a column and "
                "the other is not."
            )


@dataclass(frozen=True)
class Loss:
    """Huber's function of residuals: a parabola up to `delta`, and straight lines beyond."""

    logs: bool  # whether residuals are differences of logs
    delta: float  # infinite for least squares

    def value(self, residual: np.ndarray) -> np.ndarray:
        """Return Huber's function of every residual, in the same shape."""
        size = np.abs(residual)
        if np.isinf(self.delta):
            return 0.5 * size * size
        inner = np.minimum(size, self.delta)
        return inner * (size - 0.5 * inner)

    def pull(self, residual: np.ndarray) -> np.ndarray:
        """Return the pull: the derivative divided by the residual.

        It is the weight of the row in the equivalent least-squares problem.
        """
        if np.isinf(self.delta):
            return np.ones_like(residual)
        return self.delta / np.maximum(np.abs(residual), self.delta)

    def curved(self, residual: np.ndarray) -> np.ndarray:
        """Return the second derivative: 1 on the parabola, 0 on the lines."""
        return (np.abs(residual) < self.delta).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Problem:
    """A law, rows and an objective, evaluated at many points (points, free) at once."""

    law: Law
    space: Space
    x: Namespace  # variables, each of shape (rows,)
    target: np.ndarray  # losses or their logs, (rows,) or (points, rows)
    weight: np.ndarray  # (rows,) or (points, rows)
    loss: Loss

    @classmethod
    def of(cls, law: Law, data: RunTable, settings: Settings) -> Problem:
        """Build the problem of fitting a law to rows."""
        objective = settings.objective
        loss = Loss(objective == "log_huber", np.inf if objective == "mse" else settings.delta)
        x = Namespace(**{name: data.columns[name] for name in law.variable_names})
        target = np.log(data.loss) if loss.logs else data.loss
        return cls(law, Space.of(law, settings), x, target, data.weight, loss)

    def take(self, index: np.ndarray) -> Problem:
        """Return the problem for some of the points, if targets or weights differ by point."""
        target = self.target[index] if self.target.ndim > 1 else self.target
        weight = self.weight[index] if self.weight.ndim > 1 else self.weight
        return Problem(self.law, self.space, self.x, target, weight, self.loss)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.target.shape[-1])

    def nothing(self, share: float = 1e-15) -> np.ndarray:
        """Return the objective for residuals of `share` of the loss. A fit below it is exact."""
        scale = 1.0 if self.loss.logs else float(np.abs(self.target).max())
        return self.weight.sum(-1) * self.loss.value(np.array(share * scale))

    def residual(self, points: np.ndarray) -> np.ndarray:
        """Return predicted minus measured, (points, rows), or NaN where the law is undefined."""
        predicted = value_of(self.law.evaluate(self.x, self.space.parameters(points)))
        with np.errstate(invalid="ignore", divide="ignore"):
            result = (np.log(predicted) if self.loss.logs else predicted) - self.target
        return np.broadcast_to(result, (len(points), self.rows))

    def value(self, points: np.ndarray) -> np.ndarray:
        """Return the objective, (points,). It is infinite where the law is undefined."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = (self.weight * self.loss.value(self.residual(points))).sum(-1)
        return np.where(np.isfinite(total), total, np.inf)

    def jacobian(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return residuals, (points, rows), and their derivatives, (points, rows, free)."""
        predicted = self.law.evaluate(self.x, self.space.parameters(points, duals=True))
        if self.loss.logs:
            predicted = np.log(predicted)
        shape = (len(points), self.rows)
        residual = np.broadcast_to(value_of(predicted) - self.target, shape)
        slopes = np.zeros((*shape, len(self.space.free)))
        grad = grad_of(predicted)
        for column, name in enumerate(self.space.free):
            slopes[..., column] = grad.get(name, 0.0)
        return residual, slopes

    def curvature(self, points: np.ndarray, pulls: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """Return the sum over rows of `pulls` times the second derivatives of the residuals.

        They are differences of first derivatives. `forces` are the sums of the first derivatives
        at the points.
        """
        count, free = points.shape
        steps = 1e-6 * np.maximum(np.abs(points), 0.1)
        moved = points[:, None, :] + steps[:, :, None] * np.eye(free)
        target = np.repeat(self.target, free, 0) if self.target.ndim > 1 else self.target
        repeated = Problem(self.law, self.space, self.x, target, self.weight, self.loss)
        _, slopes = repeated.jacobian(moved.reshape(count * free, free))
        slopes = slopes.reshape(count, free, self.rows, free)
        raised = np.einsum("pn,pdnf->pdf", pulls, slopes)
        second = (raised - forces[:, None, :]) / steps[:, :, None]
        return 0.5 * (second + second.transpose(0, 2, 1))
