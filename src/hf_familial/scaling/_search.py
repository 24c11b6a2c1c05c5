"""The search: damped Newton steps from many points at once, inside bounds.

Every step is taken in coordinates in which the equivalent least-squares problem (each row weighted
by Huber's pull) is a sphere, found by a QR factorisation and never by squaring the Jacobian. The
search therefore does not care about units, and stops on the decrease it could still make relative
to the objective, never on an absolute one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ._problem import Problem
from ._starts import corrected


RIDGE = 1e-9  # keeps the factorisation regular; relative to the length of a column
NO_LENGTH = 1e-100  # of a column: the parameter has no effect
FLOOR = 1e-6  # least curvature, relative to the equivalent least squares
ENOUGH = 1e-13  # a decrease of this share of the objective is none
ALMOST = 1e-8  # a search that cannot go on has arrived if this share is left
LEAST, MOST = 1e-12, 1e10  # damping
TRIED = np.array([1e-4, 1e-2, 1.0, 1e2])  # multiples of the last damping, all tried at every step
LARGEST = 1 << 18  # numbers in one array of the search: what caches hold


@dataclass(frozen=True, eq=False)
class Found:
    """Where the search ended, for every start."""

    points: np.ndarray
    value: np.ndarray
    converged: np.ndarray
    steps: int


def minimise(
    problem: Problem, starts: np.ndarray, max_steps: int = 200, correct: bool = False
) -> Found:
    """Go down from every start."""
    free = starts.shape[1]
    size = max(1, LARGEST // (problem.rows * free * free))
    parts = np.array_split(np.arange(len(starts)), -(-len(starts) // size))
    # far from the optimum a law may have no value; its points are then not taken
    with np.errstate(all="ignore"):
        found = [_minimise(problem.take(part), starts[part], max_steps, correct) for part in parts]
    return Found(
        np.concatenate([f.points for f in found]),
        np.concatenate([f.value for f in found]),
        np.concatenate([f.converged for f in found]),
        max(f.steps for f in found),
    )


def _minimise(problem: Problem, starts: np.ndarray, max_steps: int, correct: bool) -> Found:
    points, value = starts.copy(), problem.value(starts)
    converged, damping = np.zeros(len(starts), bool), np.ones(len(starts))
    nothing = np.broadcast_to(problem.nothing(), len(starts))
    alive, step = np.flatnonzero(np.isfinite(value)), 0
    models = _Models.at(problem.take(alive), points[alive]) if len(alive) else None
    while models is not None and len(alive) and step < max_steps:
        step += 1
        move = _best_move(problem, models, points, damping, alive, correct)
        here = value[alive]
        gain = here - move.value
        better = gain > 0
        points[alive[better]], value[alive[better]] = move.target[better], move.value[better]
        damping[alive] = np.where(better, move.damping, damping[alive] * TRIED[-1] ** 2)
        arrived = move.left <= ENOUGH * here + nothing[alive]
        arrived |= value[alive] <= nothing[alive]
        stuck = gain <= ENOUGH * here
        arrived |= stuck & (models.promise() <= ALMOST * here)
        stuck &= ~better & (damping[alive] > MOST)
        converged[alive[arrived]] = True
        left = ~(arrived | stuck)
        models = models.renewed(problem, points, alive, better, left)
        alive = alive[left]
    return Found(points, value, converged, step)


class _Move(NamedTuple):
    """The best of the moves tried, one for each point."""

    target: np.ndarray  # (points, free)
    value: np.ndarray  # (points,)
    damping: np.ndarray  # (points,)
    left: np.ndarray  # what an undamped move promises to gain, (points,)


def _best_move(
    problem: Problem,
    models: _Models,
    points: np.ndarray,
    damping: np.ndarray,
    alive: np.ndarray,
    correct: bool,
) -> _Move:
    tried = np.maximum(damping[alive, None] * TRIED, LEAST)
    moves, left = models.steps(tried)
    targets = np.clip(points[alive][:, None] + moves, problem.space.low, problem.space.high)
    if correct:
        targets = models.corrected(problem, targets)
        tried = np.concatenate([tried, tried], axis=1)
    spread = problem.take(np.repeat(alive, tried.shape[1]))
    reached = spread.value(targets.reshape(-1, targets.shape[-1])).reshape(tried.shape)
    row, pick = np.arange(len(alive)), np.argmin(reached, -1)
    return _Move(targets[row, pick], reached[row, pick], tried[row, pick], left)


@dataclass(frozen=True, eq=False)
class _Models:
    """Quadratic models of the objective around some points, in spherical coordinates."""

    slope: np.ndarray
    basis: np.ndarray
    curvature: np.ndarray
    upper: np.ndarray
    held: np.ndarray
    pull: np.ndarray

    @classmethod
    def at(cls, problem: Problem, points: np.ndarray) -> _Models:
        """The models at points where the law has a value."""
        count, free = points.shape
        residual, slopes = problem.jacobian(points)
        pull = problem.weight * problem.loss.pull(residual)
        root = np.sqrt(pull)
        forces = np.matmul((pull * residual)[:, None, :], slopes)[:, 0]
        space = problem.space
        held = ((points <= space.low) & (forces > 0)) | ((points >= space.high) & (forces < 0))
        slopes = np.where(held[:, None, :], 0.0, slopes)
        stretched = root[..., None] * slopes
        length = np.sqrt(np.square(stretched).sum(1))
        ridge = np.where(length > NO_LENGTH, RIDGE * length, 1.0)[:, None, :] * np.eye(free)
        q, upper = np.linalg.qr(np.concatenate([stretched, ridge], axis=1))
        q = q[:, : problem.rows]
        slope = np.matmul((root * residual)[:, None, :], q)[:, 0]
        curved = problem.loss.curved(residual) / problem.loss.pull(residual)
        first = np.matmul(q.transpose(0, 2, 1), curved[..., None] * q)
        second = problem.curvature(points, pull * residual, forces)
        second = np.where(held[:, None, :] | held[:, :, None], 0.0, second)
        half = np.linalg.solve(upper.transpose(0, 2, 1), second)
        second = np.linalg.solve(upper.transpose(0, 2, 1), half.transpose(0, 2, 1))
        whole = first + 0.5 * (second + second.transpose(0, 2, 1))
        bad = ~np.isfinite(whole).all((-2, -1))
        whole[bad] = np.eye(free)
        curvature, basis = np.linalg.eigh(whole)
        # NaN promises nothing: such a point is left, and has not arrived
        slope = np.where(bad[:, None], np.nan, slope)
        return cls(slope, basis, curvature, upper, held, pull)

    def steps(self, damping: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moves (points, tried, free) for dampings (points, tried), and what is left to gain."""
        along = np.matmul(self.slope[:, None, :], self.basis)
        size = np.maximum(np.abs(self.curvature), FLOOR)[:, None, :] + damping[..., None]
        turned = -along / size
        moves = np.matmul(turned, self.basis.transpose(0, 2, 1))
        moves = np.linalg.solve(self.upper, moves.transpose(0, 2, 1)).transpose(0, 2, 1)
        decrease = 0.5 * (np.square(along[:, 0]) / np.maximum(self.curvature, 1e-3)).sum(-1)
        return np.where(self.held[:, None, :], 0.0, moves), decrease

    def corrected(self, problem: Problem, targets: np.ndarray) -> np.ndarray:
        """Targets (points, tried, free), and after them the same with new linear parameters."""
        count, tried, free = targets.shape
        pulls = np.repeat(self.pull, tried, axis=0)
        other = corrected(problem, targets.reshape(-1, free), pulls).reshape(targets.shape)
        return np.concatenate([targets, other], axis=1)

    def promise(self) -> np.ndarray:
        """Half the squared slope: the decrease of the equivalent least squares."""
        return 0.5 * np.square(self.slope).sum(-1)

    def renewed(
        self,
        problem: Problem,
        points: np.ndarray,
        alive: np.ndarray,
        moved: np.ndarray,
        left: np.ndarray,
    ) -> _Models:
        """The models of those left: new where the point moved, as they are elsewhere."""
        fields = {name: getattr(self, name)[left] for name in self.__dataclass_fields__}
        fresh = moved[left]
        if fresh.any():
            index = alive[left][fresh]
            new = _Models.at(problem.take(index), points[index])
            for name, array in fields.items():
                array[fresh] = getattr(new, name)
        return _Models(**fields)
