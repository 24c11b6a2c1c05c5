"""What a fit makes small: Huber's function or the square of residuals, and its slopes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.observations import Observations
from ..laws.duals import Dual, grad_of, value_of
from ..laws.law import Law, Namespace
from .space import Space


@dataclass(frozen=True)
class Loss:
    """A function of residuals: a parabola up to `delta`, straight lines beyond.

    Attributes:
        logs (`bool`): Whether residuals are differences of logs.
        delta (`float`): Where the lines begin; infinite for squares alone.
    """

    logs: bool
    delta: float

    @classmethod
    def of(cls, objective: str, delta: float) -> Loss:
        """The loss of an objective's name, see `Settings.objective`."""
        return cls(objective == "log_huber", np.inf if objective == "mse" else delta)

    def value(self, residual: np.ndarray) -> np.ndarray:
        """Huber's function of every residual; same shape."""
        size = np.abs(residual)
        if np.isinf(self.delta):
            return 0.5 * size * size
        inner = np.minimum(size, self.delta)
        return inner * (size - 0.5 * inner)

    def pull(self, residual: np.ndarray) -> np.ndarray:
        """Its derivative divided by the residual: the weight of an equivalent square."""
        if np.isinf(self.delta):
            return np.ones_like(residual)
        return self.delta / np.maximum(np.abs(residual), self.delta)

    def curved(self, residual: np.ndarray) -> np.ndarray:
        """Its second derivative: 1 in the parabola, 0 on the lines."""
        return (np.abs(residual) < self.delta).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Problem:
    """A law, rows and an objective, ready to be evaluated at many points at once.

    A point is a vector of the search, see `Space`; points come as (points, free).

    Attributes:
        law ([`Law`]): The law.
        space ([`Space`]): From points to parameters.
        x (`Namespace`): Variables, each of shape (rows,).
        target (`np.ndarray`): Losses, or their logs; (rows,) or one row per point.
        weight (`np.ndarray`): Of shape (rows,) or (points, rows).
        loss ([`Loss`]): Function of residuals.
    """

    law: Law
    space: Space
    x: Namespace
    target: np.ndarray
    weight: np.ndarray
    loss: Loss

    @classmethod
    def of(cls, law: Law, space: Space, data: Observations, loss: Loss) -> Problem:
        """The problem of some rows."""
        x = Namespace(**{name: data.columns[name] for name in law.variable_names})
        target = np.log(data.loss) if loss.logs else data.loss
        return cls(law, space, x, target, data.weight, loss)

    def take(self, index: np.ndarray) -> Problem:
        """The same problem for some of the points, where rows differ from point to point."""
        target = self.target[index] if self.target.ndim > 1 else self.target
        weight = self.weight[index] if self.weight.ndim > 1 else self.weight
        return Problem(self.law, self.space, self.x, target, weight, self.loss)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.target.shape[-1])

    def nothing(self, share: float = 1e-15) -> np.ndarray:
        """An objective so small that it is none: every residual a `share` of the losses."""
        scale = 1.0 if self.loss.logs else float(np.abs(self.target).max())
        return self.weight.sum(-1) * self.loss.value(np.array(share * scale))

    def residual(self, points: np.ndarray) -> np.ndarray:
        """Predicted minus measured, (points, rows); NaN where the law has no value."""
        predicted = value_of(self.law.evaluate(self.x, self.space.parameters(points)))
        shape = (len(points), self.rows)
        with np.errstate(invalid="ignore", divide="ignore"):
            result = (np.log(predicted) if self.loss.logs else predicted) - self.target
        return np.broadcast_to(result, shape)

    def value(self, points: np.ndarray) -> np.ndarray:
        """The objective, (points,); infinite where the law has no value."""
        with np.errstate(over="ignore", invalid="ignore"):
            terms = self.weight * self.loss.value(self.residual(points))
            total = terms.sum(-1)
        return np.where(np.isfinite(total), total, np.inf)

    def jacobian(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals (points, rows) and their derivatives (points, rows, free)."""
        predicted = self.law.evaluate(self.x, self.space.parameters(points, duals=True))
        if self.loss.logs:
            predicted = np.log(predicted)
        shape = (len(points), self.rows)
        residual = np.broadcast_to(value_of(predicted) - self.target, shape)
        slopes = np.zeros((*shape, len(self.space.free)))
        grad = grad_of(predicted) if isinstance(predicted, Dual) else {}
        for column, name in enumerate(self.space.free):
            slopes[..., column] = grad.get(name, 0.0)
        return residual, slopes

    def curvature(self, points: np.ndarray, pulls: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """Sum over rows of `pulls` times the second derivatives of the residual.

        By differences of the exact first ones, all directions in one evaluation.

        Args:
            points (`np.ndarray`): (points, free).
            pulls (`np.ndarray`): (points, rows).
            forces (`np.ndarray`): Sum over rows of `pulls` times the first derivatives there,
                (points, free).

        Returns:
            `np.ndarray`: (points, free, free), symmetric.
        """
        count, free = points.shape
        steps = 1e-6 * np.maximum(np.abs(points), 0.1)
        moved = points[:, None, :] + steps[:, :, None] * np.eye(free)
        spread = self._repeated(free)
        _, slopes = spread.jacobian(moved.reshape(count * free, free))
        slopes = slopes.reshape(count, free, self.rows, free)
        raised = np.einsum("pn,pdnf->pdf", pulls, slopes)
        second = (raised - forces[:, None, :]) / steps[:, :, None]
        return 0.5 * (second + second.transpose(0, 2, 1))

    def _repeated(self, times: int) -> Problem:
        target = np.repeat(self.target, times, 0) if self.target.ndim > 1 else self.target
        return Problem(self.law, self.space, self.x, target, self.weight, self.loss)
