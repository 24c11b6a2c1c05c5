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
LEAST_STEP = 1e-6  # of them, relative to the coefficient
CURVED = 2  # rows on the curved part of Huber's function, per coefficient, that tell its size
LEAST = 0.05  # of a run's residual that is taken to be left where the fit bends to it
EXACT = 1e-10  # relative standard error below which a fit has no noise
SPAN = 1.4  # how far a profile is traced, in half widths of its interval
POINTS = 12  # of a profile, on each side
STEPS = 60  # most steps to a point of a profile


@dataclass(frozen=True, eq=False)
class Profile:
    """A profile: the least objective as a quantity is moved."""

    values: np.ndarray  # the quantity, rising, (points,)
    rise: np.ndarray  # objective above its optimum, (points,)
    threshold: float  # rise at the ends of the interval
    interval: Interval  # where the rise stays below; open where it never reaches it


@dataclass(frozen=True, eq=False)
class CoefficientCovariance:
    """Covariance of a fit's coefficients that trusts no noise model: a sandwich.

    The observed curvature of the objective stands outside, the scores of the runs inside. It stays
    right where noise differs from run to run, has heavy tails, or is shared by checkpoints of one
    run. Scores are raised by the leverage of their run as a jackknife would (HC3, CR3).

    Attributes:
        problem: What the fit solved.
        point (`np.ndarray`): The optimum as the search sees it, (free,).
        inverse (`np.ndarray`): Inverse of the curvature, (free, free); zero in rows and columns of
            coefficients on a bound.
        scores (`np.ndarray`): Pull of every run on the coefficients, (runs, free).
        leverage (`np.ndarray`): Share of every row's fitted value that is its own, (rows,).
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
    @np.errstate(all="ignore")  # a law may have no value nearby; NaN is judged by name
    def of(cls, fit: Fit) -> CoefficientCovariance:
        """Compute the covariance of a fit.

        Raises:
            TooFewError: If there are no more runs than coefficients.
            NotIdentifiedError: If the curvature is singular.
        """
        problem, data = Problem.of(fit.law, fit.data, fit.settings), fit.data
        point = problem.space.point(fit.values)
        inside = [name not in fit.bounds_hit for name in problem.space.free]
        free = sum(inside)
        if data.runs <= free:
            raise TooFewError(
                f"intervals of {free} coefficients need more than {free} runs, got {data.runs}.",
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
        """The approximate move of each coefficient if a run is left out; (runs, free)."""
        return self.scores @ self.inverse

    @cached_property
    def covariance(self) -> np.ndarray:
        """Covariance of the coefficients as the search moves them (logs of positive ones)."""
        return self.influence.T @ self.influence

    def estimate(self, quantity: DerivedQuantity) -> float:
        """Return the quantity at the optimum, on its own scale."""
        return float(self.at(quantity, self.point[None])[0])

    def slope(self, quantity: DerivedQuantity) -> np.ndarray:
        """Return its derivative by every coordinate, (free,), from central differences."""
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
        """Steps of derivatives that rounding still bears; zero where a bound holds."""
        inside = np.diag(self.inverse) > 0
        return np.where(inside, LEAST_STEP * np.maximum(np.abs(self.point), 0.1), 0.0)

    def standard_error(self, quantity: DerivedQuantity) -> float:
        """Return the standard error of the quantity on its own scale."""
        return float(np.sqrt(np.square(self.influence @ self.slope(quantity)).sum()))

    def draws(self, count: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Draw coefficients, each (count,): normal on the search's scale, inside their bounds."""
        noise = np.random.default_rng(seed).standard_normal((count, len(self.influence)))
        return self.problem.space.values(self._inside(self.point + noise @ self.influence))

    def interval(self, quantity: DerivedQuantity, level: float = 0.95) -> Interval:
        """Return the interval by the delta method, with Student's t.

        Raises:
            NotIdentifiedError: If the quantity does not exist at the optimum or close to it.
        """
        check_level(level)
        middle, error = self.estimate(quantity), self.standard_error(quantity)
        if not math.isfinite(middle) or not math.isfinite(error):
            raise NotIdentifiedError(
                f"{quantity.name} does not exist for every coefficient near the fit's."
            )
        reach = self.t(level) * error
        low, high = quantity.unscaled(middle - reach), quantity.unscaled(middle + reach)
        return Interval(level, low, high, "delta")

    def profile(self, quantity: DerivedQuantity, level: float = 0.95) -> Profile:
        """Return the least objective for each value of a quantity, and the interval it gives.

        Every point makes `objective - multiplier quantity` least. The objective is no likelihood:
        its rise is measured in units that give the delta method's interval if everything is
        linear, so that what is left is the curvature of the law alone.

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
        if error <= EXACT * max(1.0, abs(middle)):  # rounding is all that is left
            value = quantity.unscaled(middle)
            at = Interval(level, value, value, "profile")
            return Profile(np.array([value]), np.zeros(1), 0.0, at)
        unit, reach = error**2 / along, SPAN * self.t(level)
        marks = np.linspace(-reach, reach, 2 * POINTS + 1)
        # far points overflow; they are seen not to be finite
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
        """Return half the width of an interval, in standard errors."""
        return float(stdtrit(self.dof, (1 + level) / 2))

    def at(self, quantity: DerivedQuantity, points: np.ndarray) -> np.ndarray:
        """Return a quantity on its own scale at points of the search, moved into the bounds."""
        values = self.problem.space.values(self._inside(points))
        return np.broadcast_to(quantity.scaled(values), (len(points),))

    def _inside(self, points: np.ndarray) -> np.ndarray:
        return np.clip(points, self.problem.space.low, self.problem.space.high)

    def _traced(self, quantity: DerivedQuantity, multipliers: np.ndarray) -> np.ndarray:
        """Return points of least `objective - multiplier quantity`, (multipliers, free)."""
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
            # the equivalent least squares bounds the objective from above: its step descends
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
        """Return derivatives of the quantity at many points, (points, free)."""
        moves = np.diag(np.where(size > 0, size, 0))
        ahead, back = (
            self.at(quantity, (points[:, None] + sign * moves).reshape(-1, points.shape[1]))
            for sign in (1, -1)
        )
        rates = (ahead - back).reshape(points.shape)
        return np.divide(rates, 2 * size, out=np.zeros_like(rates), where=size > 0)


def _crossings(x: np.ndarray, z: np.ndarray, t: float) -> tuple[float, float]:
    """Return where a rising curve passes -t and t; infinite where it never does."""
    from scipy.interpolate import PchipInterpolator

    curve = PchipInterpolator(x, z)
    found = [np.atleast_1d(curve.solve(level, extrapolate=False)) for level in (-t, t)]
    low, high = (roots[np.isfinite(roots)] for roots in found)
    return float(low.max(initial=-np.inf)), float(high.min(initial=np.inf))


def _curvature(
    problem: Problem, residual: np.ndarray, slopes: np.ndarray, squares: np.ndarray
) -> np.ndarray:
    """Return that of the objective: rows on the straight part of Huber's function have none."""
    weight, free = problem.weight * problem.loss.curved(residual), len(squares)
    curved = np.count_nonzero(weight)
    if curved >= CURVED * free or curved == np.count_nonzero(problem.weight):
        return np.einsum("n,ni,nj->ij", weight, slopes, slopes)
    # too few to be counted one by one: their share follows from how dense residuals are near 0
    ordered = np.sort(np.abs(residual))
    near = min(max(2 * CURVED * free, len(ordered) // 4), len(ordered))
    reach = max(float(ordered[near - 1]), problem.loss.delta)
    return squares * (near / len(ordered) * problem.loss.delta / reach)


def _inverse(matrix: np.ndarray, problem: Problem, inside: list[bool]) -> np.ndarray:
    """Invert a symmetric matrix, brought to a unit diagonal first."""
    size = np.sqrt(np.diag(matrix))
    names = tuple(n for n, kept in zip(problem.space.free, inside, strict=True) if kept)
    dead = tuple(n for n, s in zip(names, size, strict=True) if not s > 0)
    if dead:
        raise NotIdentifiedError(f"the rows do not depend on {list(dead)}.", dead)
    scaled = matrix / np.outer(size, size)
    condition = float(np.linalg.cond(scaled))
    if not condition < 1e15:
        raise NotIdentifiedError(
            f"the rows do not determine {list(names)} (condition number {condition:.1g}).",
            names,
            condition,
        )
    return np.linalg.inv(scaled) / np.outer(size, size)


def _raised_scores(
    pull: np.ndarray, slopes: np.ndarray, plain: np.ndarray, weight: np.ndarray, run_id: np.ndarray
) -> np.ndarray:
    """Return scores of runs, (runs, free), raised by leverage: `J' (I - H)^-1 pull` of each."""
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
