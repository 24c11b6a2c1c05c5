"""Intervals without resampling: the delta method with a covariance that trusts no noise model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from ...errors import NotIdentifiedError, TooFewError
from ..fitting.objective import Loss, Problem
from ..fitting.result import Fit
from ..fitting.space import Space
from ..optima.quantity import Interval, Quantity, check_level
from .profile import PROBE, Profile, profile


LEAST_STEP = 1e-6  # of them, relative to the coefficient
CURVED = 2  # rows on the curved part of Huber's function, per coefficient, that tell its size
LEAST = 0.05  # of a run's residual that is taken to be left where the fit bends to it


def problem_of(fit: Fit) -> Problem:
    """The problem a fit solved, to be evaluated elsewhere."""
    settings = fit.settings
    space = Space.of(fit.law, settings.fixed, settings.tied, settings.bounds)
    return Problem.of(fit.law, space, fit.data, Loss.of(settings.objective, settings.delta))


@dataclass(frozen=True, eq=False)
class Spread:
    """How far the coefficients of a fit may be off, to first order.

    The covariance is a sandwich: the observed curvature of the objective outside, the scores of
    the runs inside. It stays right where noise differs from run to run, has heavy tails, or is
    shared by checkpoints of one run, and where many rows lie on the straight part of Huber's
    function. Scores are raised by the leverage of their run as a jackknife would (HC3, CR3).

    Attributes:
        fit ([`Fit`]): The fit.
        problem ([`Problem`]): What it solved.
        point (`np.ndarray`): The optimum as the search sees it, (free,).
        inverse (`np.ndarray`): Inverse of the curvature, (free, free); zero in rows and columns of
            coefficients on a bound.
        scores (`np.ndarray`): Pull of every run on the coefficients, (runs, free).
        leverage (`np.ndarray`): Share of every row's fitted value that is its own, (rows,).
        dof (`int`): Degrees of freedom of Student's t.

    Reference: MacKinnon, Nielsen and Webb 2023, arXiv:2205.03285 (CR3 and t(runs - 1)); Huber 1981,
    "Robust Statistics".
    """

    fit: Fit
    problem: Problem
    point: np.ndarray
    inverse: np.ndarray
    scores: np.ndarray
    leverage: np.ndarray
    dof: int

    @classmethod
    @np.errstate(all="ignore")  # a law may have no value nearby; NaN is judged by name
    def of(cls, fit: Fit) -> Spread:
        """The spread of a fit's coefficients.

        Raises:
            TooFewError: If there are no more runs than coefficients.
            NotIdentifiedError: If the curvature is singular.
        """
        problem, data = problem_of(fit), fit.data
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
        curvature = _curvature(problem, residual, slopes, squares)
        inner = _inverse(curvature, problem, inside)
        pull = data.weight * problem.loss.pull(residual) * residual
        scores = _raised_scores(pull, slopes, plain, data.weight, data.run_id)
        full = np.zeros((len(point), len(point)))
        full[np.ix_(inside, inside)] = inner
        padded = np.zeros((len(scores), len(point)))
        padded[:, inside] = scores
        dof = len(data) - free if data.runs == len(data) else min(data.runs - 1, len(data) - free)
        leverage = data.weight * np.einsum("ni,ij,nj->n", slopes, plain, slopes)
        leverage = np.minimum(leverage, 1 - LEAST)
        return cls(fit, problem, point, full, padded, leverage, dof)

    @cached_property
    def influence(self) -> np.ndarray:
        """What leaving a run out would move each coefficient by, about; (runs, free)."""
        return self.scores @ self.inverse

    @cached_property
    def covariance(self) -> np.ndarray:
        """Covariance of the coefficients as the search moves them (logs of positive ones)."""
        return self.influence.T @ self.influence

    def estimate(self, quantity: Quantity) -> float:
        """The quantity at the optimum, on its own scale."""
        return float(self.at(quantity, self.point[None])[0])

    def slope(self, quantity: Quantity) -> np.ndarray:
        """Its derivative by every coordinate of the search, (free,), from central differences."""
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

    def standard_error(self, quantity: Quantity) -> float:
        """Of the quantity on its own scale."""
        return float(np.sqrt(np.square(self.influence @ self.slope(quantity)).sum()))

    def draws(self, count: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Coefficients as they may be: normal on the search's scale, kept inside their bounds.

        Args:
            count (`int`): How many.
            seed (`int`, *optional*, defaults to 0): Of the generator.

        Returns:
            `dict[str, np.ndarray]`: By parameter, of shape (count,).
        """
        noise = np.random.default_rng(seed).standard_normal((count, len(self.influence)))
        points = self.point + noise @ self.influence
        space = self.problem.space
        return space.values(np.clip(points, space.low, space.high))

    def interval(self, quantity: Quantity, level: float = 0.95) -> Interval:
        """By the delta method, with Student's t.

        Args:
            quantity ([`Quantity`]): What it is of.
            level (`float`, *optional*, defaults to 0.95): Confidence.

        Raises:
            ScalingError: If `level` is not between 0 and 1.
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

    def profile(self, quantity: Quantity, level: float = 0.95) -> Profile:
        """How the least objective rises as a quantity is moved; see `profile`."""
        return profile(self, quantity, level)

    def t(self, level: float) -> float:
        """Half the width of an interval, in standard errors."""
        return float(stats.t.ppf((1 + level) / 2, self.dof))

    def at(self, quantity: Quantity, points: np.ndarray) -> np.ndarray:
        """A quantity on its own scale at points of the search, moved into the bounds."""
        inside = np.clip(points, self.problem.space.low, self.problem.space.high)
        return np.broadcast_to(quantity.scaled(self.problem.space.values(inside)), (len(points),))


def _curvature(
    problem: Problem, residual: np.ndarray, slopes: np.ndarray, squares: np.ndarray
) -> np.ndarray:
    """Of the objective: rows on the straight part of Huber's function have none."""
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
    """Inverse of a symmetric matrix, brought to a unit diagonal first."""
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
    pull: np.ndarray,
    slopes: np.ndarray,
    plain: np.ndarray,
    weight: np.ndarray,
    run_id: np.ndarray,
) -> np.ndarray:
    """Scores of runs, (runs, free), raised by leverage: `J' (I - H)^-1 pull` of each run."""
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
