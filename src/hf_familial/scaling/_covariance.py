"""Covariance of a fit's coefficients, the delta method, and profiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import stdtrit

from ..errors import NotIdentifiedError, TooFewError
from ._problem import Problem
from .quantities import DerivedQuantity, Interval, check_level
from .results import Fit


PROBE = 0.05  # step of derivatives of a quantity, in standard errors of the coefficients
LEAST_STEP = 1e-6  # smallest step, relative to the coefficient
CURVED = (
    2  # smallest number of rows per coefficient to count on the curved part of Huber's function
)
LEAST = 0.05  # smallest value of 1 - leverage that is used
EXACT = 1e-10  # relative standard error below which a fit counts as exact
SPAN = 1.4  # reach of a profile, in half widths of its interval
POINTS = 12  # points of a profile on each side
STEPS = 60  # largest number of steps to find a point of a profile


@dataclass(frozen=True, eq=False)
class Profile:
    """The least objective for each value of a quantity, and the interval that follows from it."""

    values: np.ndarray  # rising values of the quantity, (points,)
    rise: np.ndarray  # least objective minus its optimum, (points,)
    threshold: float  # rise at the ends of the interval
    interval: Interval  # values whose rise is below the threshold, infinite if it never is reached


@dataclass(frozen=True, eq=False)
class CoefficientCovariance:
    """The covariance of a fit's coefficients, as a sandwich estimate without a noise model.

    The estimate is the product of the inverse curvature of the objective, the scores of the runs
    and the inverse curvature again. It is valid if noise differs from run to run, has heavy tails,
    or is shared by checkpoints of one run. The scores are corrected for the leverage of their run,
    like a jackknife (HC3, CR3).

    Attributes:
        problem: The problem that the fit solved.
        point (`np.ndarray`): The optimum in the coordinates of the search, shape (free,).
        inverse (`np.ndarray`): Inverse of the curvature, shape (free, free). Rows and columns of
            coefficients on a bound are zero.
        scores (`np.ndarray`): Gradient of each run's part of the objective, shape (runs, free).
        leverage (`np.ndarray`): Derivative of every fitted value by the measured one, (rows,).
        dof (`int`): Degrees of freedom of Student's t.

    Reference: MacKinnon, Nielsen and Webb 2023, arXiv:2205.03285 (CR3 and t(runs - 1)); Huber 1981,
    "Robust Statistics".
    """

    problem: Problem
    point: np.ndarray
    inverse: np.ndarray
    scores: np.ndarray
    leverage: np.ndarray
    dof: int

    @classmethod
    @np.errstate(all="ignore")  # a law can be undefined nearby, and NaN is checked later
    def of(cls, fit: Fit) -> CoefficientCovariance:
        """Compute the covariance of a fit.

        Raises:
            TooFewError: If there are not more runs than coefficients.
            NotIdentifiedError: If the curvature is singular.
        """
        problem, data = Problem.of(fit.law, fit.data, fit.settings), fit.data
        point = problem.space.point(fit.values)
        inside = [name not in fit.bounds_hit for name in problem.space.free]
        free = sum(inside)
        if data.runs <= free:
            raise TooFewError(
                f"Intervals of {free} coefficients need more than {free} runs, got {data.runs}.",
                what="runs",
                got=data.runs,
                needed=free + 1,
            )
        residual, slopes = (part[0] for part in problem.jacobian(point[None]))
        slopes = slopes[:, inside]
        squares = np.einsum("n,ni,nj->ij", data.weight, slopes, slopes)
        plain = _inverse(squares, problem, inside)
        inner = _inverse(_curvature(problem, residual, slopes, squares), problem, inside)
        pull = data.weight * problem.loss.pull(residual) * residual
        scores = _raised_scores(pull, slopes, plain, data.weight, data.run_id)
        full = np.zeros((len(point), len(point)))
        full[np.ix_(inside, inside)] = inner
        padded = np.zeros((len(scores), len(point)))
        padded[:, inside] = scores
        dof = len(data) - free if data.runs == len(data) else min(data.runs - 1, len(data) - free)
        leverage = data.weight * np.einsum("ni,ij,nj->n", slopes, plain, slopes)
        return cls(problem, point, full, padded, np.minimum(leverage, 1 - LEAST), dof)

    @cached_property
    def influence(self) -> np.ndarray:
        """The approximate change of each coefficient if a run is left out, shape (runs, free)."""
        return self.scores @ self.inverse

    @cached_property
    def covariance(self) -> np.ndarray:
        """The covariance in the coordinates of the search, with logs of positive coefficients."""
        return self.influence.T @ self.influence

    def estimate(self, quantity: DerivedQuantity) -> float:
        """Return the quantity at the optimum, on its `scale`."""
        return float(self.at(quantity, self.point[None])[0])

    def slope(self, quantity: DerivedQuantity) -> np.ndarray:
        """Return the quantity's derivative by every coordinate, shape (free,).

        It is computed by central differences.
        """
        floor = np.diag(np.square(self.least_steps / PROBE))
        values, vectors = np.linalg.eigh(self.covariance + floor)
        steps = PROBE * np.sqrt(np.maximum(values, 0)) * vectors
        ahead = self.at(quantity, self.point + steps.T)
        back = self.at(quantity, self.point - steps.T)
        length = np.sqrt(np.square(steps).sum(0))
        rates = np.divide(ahead - back, 2 * length, out=np.zeros_like(length), where=length > 0)
        return vectors @ rates

    @property
    def least_steps(self) -> np.ndarray:
        """The smallest steps of differences that rounding allows. They are zero on a bound."""
        inside = np.diag(self.inverse) > 0
        return np.where(inside, LEAST_STEP * np.maximum(np.abs(self.point), 0.1), 0.0)

    def standard_error(self, quantity: DerivedQuantity) -> float:
        """Return the standard error of the quantity, on its `scale`."""
        return float(np.sqrt(np.square(self.influence @ self.slope(quantity)).sum()))

    def draws(self, count: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Draw values of every coefficient, each of shape (count,).

        They are normal in the coordinates of the search, and moved into the bounds.
        """
        noise = np.random.default_rng(seed).standard_normal((count, len(self.influence)))
        return self.problem.space.values(self._inside(self.point + noise @ self.influence))

    def interval(self, quantity: DerivedQuantity, level: float = 0.95) -> Interval:
        """Return the interval by the delta method, with Student's t.

        Raises:
            NotIdentifiedError: If the quantity is undefined at the optimum or near it.
        """
        check_level(level)
        middle, error = self.estimate(quantity), self.standard_error(quantity)
        if not math.isfinite(middle) or not math.isfinite(error):
            raise NotIdentifiedError(
                f"{quantity.name} is undefined for some coefficients near those of the fit."
            )
        reach = self.t(level) * error
        low, high = quantity.unscaled(middle - reach), quantity.unscaled(middle + reach)
        return Interval(level, low, high, "delta")

    def profile(self, quantity: DerivedQuantity, level: float = 0.95) -> Profile:
        """Return the least objective for each value of a quantity, and the resulting interval.

        Each point minimises `objective - multiplier * quantity` for one multiplier. The objective
        is not a likelihood, so its rise is scaled. With this scale, the interval of a linear law
        equals that of the delta method. Any difference comes from the curvature of the law.

        Raises:
            NotIdentifiedError: If the quantity does not depend on the coefficients.

        Reference: Chandler and Bate 2007, Biometrika 94(1), "Inference for clustered data using
        the independence loglikelihood" (the vertical adjustment).
        """
        check_level(level)
        slope = self.slope(quantity)
        along = float(slope @ self.inverse @ slope)
        if not along > 0:
            raise NotIdentifiedError(f"{quantity.name} does not depend on the coefficients.")
        error, middle = self.standard_error(quantity), self.estimate(quantity)
        if error <= EXACT * max(1.0, abs(middle)):  # the fit is exact up to rounding
            value = quantity.unscaled(middle)
            at = Interval(level, value, value, "profile")
            return Profile(np.array([value]), np.zeros(1), 0.0, at)
        unit, reach = error**2 / along, SPAN * self.t(level)
        marks = np.linspace(-reach, reach, 2 * POINTS + 1)
        # points far away can overflow, and are left out because they are not finite
        with np.errstate(over="ignore", invalid="ignore"):
            points = self._traced(quantity, marks * math.sqrt(unit / along))
        best = self.problem.value(self.point[None])[0]
        rise = np.maximum(self.problem.value(points) - best, 0)
        scaled = self.at(quantity, points)
        roots = np.sign(scaled - middle) * np.sqrt(2 * rise / unit)
        keep = np.concatenate([[True], np.diff(np.maximum.accumulate(scaled)) > 0])
        keep &= np.isfinite(scaled) & np.isfinite(roots)
        low, high = _crossings(scaled[keep], roots[keep], self.t(level))
        return Profile(
            values=np.array([quantity.unscaled(value) for value in scaled[keep]]),
            rise=rise[keep],
            threshold=0.5 * unit * self.t(level) ** 2,
            interval=Interval(level, quantity.unscaled(low), quantity.unscaled(high), "profile"),
        )

    def t(self, level: float) -> float:
        """Return half the width of an interval in standard errors, by Student's t."""
        return float(stdtrit(self.dof, (1 + level) / 2))

    def at(self, quantity: DerivedQuantity, points: np.ndarray) -> np.ndarray:
        """Return a quantity (on its `scale`) at points (points, free), moved into the bounds."""
        values = self.problem.space.values(self._inside(points))
        return np.broadcast_to(quantity.scaled(values), (len(points),))

    def _inside(self, points: np.ndarray) -> np.ndarray:
        return np.clip(points, self.problem.space.low, self.problem.space.high)

    def _traced(self, quantity: DerivedQuantity, multipliers: np.ndarray) -> np.ndarray:
        """Return points that minimise `objective - multiplier * quantity`, (multipliers, free)."""
        problem = self.problem
        start = self.point + np.outer(multipliers, self.inverse @ self.slope(quantity))
        points = self._inside(start)

        def merit(at: np.ndarray) -> np.ndarray:
            total = problem.value(at) - multipliers * self.at(quantity, at)
            return np.where(np.isfinite(total), total, np.inf)

        points[~np.isfinite(merit(points))] = self.point
        value = merit(points)
        size = np.maximum(PROBE * np.sqrt(np.diag(self.covariance)), self.least_steps)
        held = size == 0
        for _ in range(STEPS):
            residual, slopes = problem.jacobian(points)
            pull = problem.weight * problem.loss.pull(residual)
            force = np.einsum("pn,pni->pi", pull * residual, slopes)
            force -= multipliers[:, None] * self._slopes(quantity, points, size)
            moves = -force @ self.inverse
            # the equivalent least squares is an upper bound of the objective, so its step descends
            whole = np.einsum("pn,pni,pnj->pij", pull, slopes, slopes)
            whole += 1e-12 * np.eye(len(size)) * np.trace(whole, axis1=1, axis2=2)[:, None, None]
            whole[:, held, :] = whole[:, :, held] = 0
            whole[:, held, held] = 1
            safe = np.linalg.solve(whole, np.where(held, 0, -force)[..., None])[..., 0]
            gained = np.zeros(len(points))
            for step in (moves, 2 * safe, safe, 0.5 * moves, 0.1 * safe):
                there = self._inside(points + step)
                reached = merit(there)
                better = reached < value
                gained += np.where(better, value - reached, 0)
                points = np.where(better[:, None], there, points)
                value = np.where(better, reached, value)
            if np.all(gained <= 1e-10 * np.abs(problem.value(points))):
                break
        return points

    def _slopes(
        self, quantity: DerivedQuantity, points: np.ndarray, size: np.ndarray
    ) -> np.ndarray:
        """Return the derivatives of a quantity at many points, shape (points, free)."""
        moves = np.diag(np.where(size > 0, size, 0))
        ahead, back = (
            self.at(quantity, (points[:, None] + sign * moves).reshape(-1, points.shape[1]))
            for sign in (1, -1)
        )
        rates = (ahead - back).reshape(points.shape)
        return np.divide(rates, 2 * size, out=np.zeros_like(rates), where=size > 0)


def _crossings(x: np.ndarray, z: np.ndarray, t: float) -> tuple[float, float]:
    """Return the x at which a rising curve passes -t and t, infinite if it never does."""
    from scipy.interpolate import PchipInterpolator

    curve = PchipInterpolator(x, z)
    found = [np.atleast_1d(curve.solve(level, extrapolate=False)) for level in (-t, t)]
    low, high = (roots[np.isfinite(roots)] for roots in found)
    return float(low.max(initial=-np.inf)), float(high.min(initial=np.inf))


def _curvature(
    problem: Problem, residual: np.ndarray, slopes: np.ndarray, squares: np.ndarray
) -> np.ndarray:
    """Return the curvature of the objective, shape (free, free).

    Rows on the straight part of Huber's function have no curvature.
    """
    weight, free = problem.weight * problem.loss.curved(residual), len(squares)
    curved = np.count_nonzero(weight)
    if curved >= CURVED * free or curved == np.count_nonzero(problem.weight):
        return np.einsum("n,ni,nj->ij", weight, slopes, slopes)
    # There are too few curved rows to count, so their share is estimated from the density of
    # residuals near 0.
    ordered = np.sort(np.abs(residual))
    near = min(max(2 * CURVED * free, len(ordered) // 4), len(ordered))
    reach = max(float(ordered[near - 1]), problem.loss.delta)
    return squares * (near / len(ordered) * problem.loss.delta / reach)


def _inverse(matrix: np.ndarray, problem: Problem, inside: list[bool]) -> np.ndarray:
    """Invert a symmetric matrix after scaling its diagonal to 1."""
    size = np.sqrt(np.diag(matrix))
    names = tuple(n for n, kept in zip(problem.space.free, inside, strict=True) if kept)
    dead = tuple(n for n, s in zip(names, size, strict=True) if not s > 0)
    if dead:
        raise NotIdentifiedError(f"The rows do not depend on {list(dead)}.", dead)
    scaled = matrix / np.outer(size, size)
    condition = float(np.linalg.cond(scaled))
    if not condition < 1e15:
        raise NotIdentifiedError(
            f"The rows do not determine {list(names)} (condition number {condition:.1g}).",
            names,
            condition,
        )
    return np.linalg.inv(scaled) / np.outer(size, size)


def _raised_scores(
    pull: np.ndarray, slopes: np.ndarray, plain: np.ndarray, weight: np.ndarray, run_id: np.ndarray
) -> np.ndarray:
    """Return the scores of the runs, corrected for leverage: `J' (I - H)^-1 pull`, (runs, free)."""
    runs = int(run_id.max()) + 1
    if runs == len(run_id):
        leverage = weight * np.einsum("ni,ij,nj->n", slopes, plain, slopes)
        return slopes * (pull / np.maximum(1 - leverage, LEAST))[:, None]
    scores = np.zeros((runs, slopes.shape[1]))
    for run in range(runs):
        rows = np.flatnonzero(run_id == run)
        inner, root = slopes[rows], np.sqrt(weight[rows])
        hat = (root[:, None] * inner) @ plain @ (root[:, None] * inner).T
        values, vectors = np.linalg.eigh(np.eye(len(rows)) - hat)
        raised = vectors @ ((vectors.T @ (pull[rows] / root)) / np.maximum(values, LEAST))
        scores[run] = inner.T @ (root * raised)
    return scores
