"""The search for a fit's optimum: starts by variable projection, then damped Newton steps.

The search moves many points at once and stays inside the bounds. Its coordinates turn the
equivalent least-squares problem, in which Huber's pull weights each row, into a sphere. They come
from a QR factorisation of the Jacobian, which is never squared. So the result does not depend on
units. The search stops when the decrease that is still possible is a tiny share of the objective.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ._problem import Problem, Space
from .laws._duals import Dual, grad_of, value_of
from .laws.law import Law, Namespace, Parameter


MOST_POINTS = 1024  # largest number of grid points
MOST_ROWS = 512  # largest number of rows used to rank grid points
SMALL = 1e-3  # first size of a term, as a share of the loss, if least squares makes it negative


def grid(law: Law, space: Space, starts: Mapping[str, tuple[float, ...]]) -> dict[str, np.ndarray]:
    """Return the grid of the free nonlinear parameters, each of shape (points,).

    The grid has all combinations of the starts. If these are too many, it has points spread
    evenly over them (a Halton sequence).
    """
    moving = [p for p in law.nonlinear if p.name in space.free]
    axes = [_inside(space, p, starts.get(p.name, p.starts)) for p in moving]
    sizes = [len(axis) for axis in axes]
    if not moving:
        return {}
    if np.prod(sizes) <= MOST_POINTS:
        chosen = np.array(list(itertools.product(*(range(size) for size in sizes))))
    else:
        from scipy.stats import qmc  # this import takes half a second

        halton = qmc.Halton(len(sizes), scramble=False).fast_forward(1)
        chosen = (halton.random(MOST_POINTS) * sizes).astype(int)
    return {p.name: a[c] for p, a, c in zip(moving, axes, chosen.T, strict=True)}


def project(
    problem: Problem, chosen: Mapping[str, np.ndarray], starts: Mapping[str, tuple[float, ...]]
) -> np.ndarray:
    """Return the grid points with their best linear parameters, shape (points, free).

    The weights of least squares make it equal, to first order, to the sum of squares of the
    objective's residuals. A term that must not be negative is left out where it would be.
    """
    law, space = problem.law, problem.space
    count = len(next(iter(chosen.values()))) if chosen else 1
    values = {name: np.full((count, 1), value) for name, value in space.fixed.items()}
    values |= {name: v[:, None] for name, v in chosen.items()}
    read = False
    for parameter in law.linear:
        if parameter.name in space.free:
            first = starts.get(parameter.name, parameter.starts)
            read |= bool(first)
            values[parameter.name] = np.full((count, 1), first[0] if first else 1.0)
    few = thinned(problem)
    for _ in range(4 if read else 1):
        values |= {name: values[master] for name, master in space.tied.items()}
        values |= _linear(few, Namespace(**values), count)
    flat = {name: np.broadcast_to(values[name], (count, 1))[:, 0] for name in space.free}
    usable = np.all([np.isfinite(value) for value in flat.values()], axis=0)
    return space.point({name: value[usable] for name, value in flat.items()})


def corrected(problem: Problem, points: np.ndarray, pulls: np.ndarray) -> np.ndarray:
    """Return points with new linear parameters. `pulls` (points, rows) are the row weights."""
    space = problem.space
    p = space.parameters(points)
    values = vars(p) | _linear(dataclasses.replace(problem, weight=pulls), p, len(points))
    shape = (len(points), 1)
    flat = {name: np.broadcast_to(values[name], shape)[:, 0] for name in space.free}
    with np.errstate(invalid="ignore"):
        found = space.point(flat)
    return np.where(np.isfinite(found).all(-1, keepdims=True), found, points)


def _linear(problem: Problem, p: Namespace, count: int) -> dict[str, np.ndarray]:
    """Return the free linear parameters, each (points, 1), or NaN where the law is undefined."""
    law, space, rows = problem.law, problem.space, problem.rows
    loss = np.exp(problem.target) if problem.loss.logs else problem.target
    with np.errstate(all="ignore"):
        columns = [np.broadcast_to(c, (count, rows)) for c in law.columns(problem.x, p)]
        total, slope = loss, np.ones(rows)
        if law.outer is not None:
            total = law.outer.invert(loss, problem.x, p)
            slope = grad_of(law.outer.apply(Dual(total, {"t": 1.0}), problem.x, p))["t"]
        slope = slope / loss if problem.loss.logs else slope
        weight = np.broadcast_to(problem.weight * np.square(slope), (count, rows))
        total = np.broadcast_to(total, (count, rows))
        bases: dict[str, np.ndarray] = {}
        for parameter, column in zip(law.linear, columns, strict=True):
            name = space.tied.get(parameter.name, parameter.name)
            if name in space.fixed:
                total = total - value_of(law.weight(name, p)) * column
            else:
                bases[name] = bases[name] + column if name in bases else column
        if not bases:
            return {}
        positive = [n in law.links or law.parameter(n).bounds[0] >= 0 for n in bases]
        factors = _least_squares(
            np.stack(list(bases.values()), 1), total, weight, np.array(positive)
        )
        result = {}
        for i, (name, column) in enumerate(bases.items()):
            factor = factors[:, i : i + 1]
            if law.parameter(name).scale == "log" or name in law.links:
                least = SMALL * np.abs(total).mean(-1, keepdims=True)
                least = least / np.abs(column).mean(-1, keepdims=True)
                factor = np.maximum(factor, least)
            link = law.links.get(name)
            result[name] = factor if link is None else link.value(factor, p)
    return result


def _least_squares(
    columns: np.ndarray, total: np.ndarray, weight: np.ndarray, positive: np.ndarray
) -> np.ndarray:
    """Return the weights with which columns (points, columns, rows) best sum to `total`."""
    count, terms, _ = columns.shape
    length = np.sqrt((weight[:, None] * np.square(columns)).sum(-1))
    length = np.where(length > 0, length, 1.0)
    unit = columns / length[..., None]
    weighted = unit * weight[:, None]
    gram = np.matmul(weighted, unit.transpose(0, 2, 1)) + 1e-13 * np.eye(terms)
    right = np.matmul(weighted, total[..., None])[..., 0]
    bad = ~(np.isfinite(gram).all((-2, -1)) & np.isfinite(right).all(-1))
    gram[bad], right[bad] = np.eye(terms), 0.0
    inside = np.ones((count, terms), bool)
    found = np.linalg.solve(gram, right[..., None])[..., 0]
    for _ in range(terms - 1):
        wrong = positive & inside & (found < 0)
        if not wrong.any():
            break
        worst = np.argmin(np.where(wrong, found, np.inf), -1)
        inside[np.arange(count), worst] &= ~wrong.any(-1)
        both = inside[:, :, None] & inside[:, None, :]
        kept = np.where(both, gram, np.eye(terms))
        found = np.linalg.solve(kept, np.where(inside, right, 0.0)[..., None])[..., 0]
    found = np.where(positive & (found < 0), 0.0, found)
    return np.where(bad[:, None], np.nan, found / length)


def thinned(problem: Problem) -> Problem:
    """Return the problem with at most `MOST_ROWS` rows, evenly spread over the table."""
    if problem.rows <= MOST_ROWS:
        return problem
    keep = np.linspace(0, problem.rows - 1, MOST_ROWS).astype(int)
    x = Namespace(**{name: values[keep] for name, values in vars(problem.x).items()})
    target, weight = problem.target[keep], problem.weight[keep]
    return dataclasses.replace(problem, x=x, target=target, weight=weight)


def _inside(space: Space, parameter: Parameter, starts: tuple[float, ...]) -> np.ndarray:
    """Return the starts of a parameter inside its bounds, or the middle of the bounds if none."""
    column = space.free.index(parameter.name)
    low, high = space.low[column], space.high[column]
    if space.logs[column]:
        low, high = np.exp(low), np.exp(high)
    kept = np.array([s for s in starts if low <= s <= high], dtype=np.float64)
    if len(kept):
        return kept
    edges = [edge for edge in (low, high) if np.isfinite(edge)]
    return np.array([np.mean(edges) if edges else 0.0])


RIDGE = 1e-9  # makes the factorisation regular, relative to the length of a column
NO_LENGTH = 1e-100  # a parameter has no effect if its column is shorter than this
FLOOR = 1e-6  # smallest curvature, relative to the equivalent least squares
ENOUGH = 1e-13  # a smaller decrease, as a share of the objective, counts as none
ALMOST = 1e-8  # a stuck search has converged if the possible decrease is below this share
LEAST, MOST = 1e-12, 1e10  # smallest and largest damping
TRIED = np.array([1e-4, 1e-2, 1.0, 1e2])  # multiples of the last damping, all used in each step
LARGEST = 1 << 18  # largest number of elements in one array, so that it fits in the cache


@dataclass(frozen=True, eq=False)
class Found:
    """The results of the search for every start, of shape (starts,) or (starts, free)."""

    points: np.ndarray
    value: np.ndarray
    converged: np.ndarray
    steps: int


def minimise(
    problem: Problem, starts: np.ndarray, max_steps: int = 200, correct: bool = False
) -> Found:
    """Search for the minimum from every start, (starts, free).

    With `correct`, each move is also tried with new linear parameters from least squares. This
    helps far from the optimum, where valleys of the objective bend.
    """
    free = starts.shape[1]
    size = max(1, LARGEST // (problem.rows * free * free))
    parts = np.array_split(np.arange(len(starts)), -(-len(starts) // size))
    # a law can be undefined far from the optimum, and such points are not accepted
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
    """The best move of each point."""

    target: np.ndarray  # (points, free)
    value: np.ndarray  # (points,)
    damping: np.ndarray  # (points,)
    left: np.ndarray  # expected decrease of an undamped move, (points,)


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
    """Quadratic models of the objective around some points, in the search's coordinates."""

    slope: np.ndarray
    basis: np.ndarray
    curvature: np.ndarray
    upper: np.ndarray
    held: np.ndarray
    pull: np.ndarray

    @classmethod
    def at(cls, problem: Problem, points: np.ndarray) -> _Models:
        """Build the models at points where the law is defined."""
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
        # with NaN as slope, the point is dropped from the search and does not count as converged
        slope = np.where(bad[:, None], np.nan, slope)
        return cls(slope, basis, curvature, upper, held, pull)

    def steps(self, damping: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the moves (points, tried, free) for dampings (points, tried).

        Also return the expected decrease of an undamped move, (points,).
        """
        along = np.matmul(self.slope[:, None, :], self.basis)
        size = np.maximum(np.abs(self.curvature), FLOOR)[:, None, :] + damping[..., None]
        turned = -along / size
        moves = np.matmul(turned, self.basis.transpose(0, 2, 1))
        moves = np.linalg.solve(self.upper, moves.transpose(0, 2, 1)).transpose(0, 2, 1)
        decrease = 0.5 * (np.square(along[:, 0]) / np.maximum(self.curvature, 1e-3)).sum(-1)
        return np.where(self.held[:, None, :], 0.0, moves), decrease

    def corrected(self, problem: Problem, targets: np.ndarray) -> np.ndarray:
        """Return targets (points, tried, free), then the same with new linear parameters."""
        count, tried, free = targets.shape
        pulls = np.repeat(self.pull, tried, axis=0)
        other = corrected(problem, targets.reshape(-1, free), pulls).reshape(targets.shape)
        return np.concatenate([targets, other], axis=1)

    def promise(self) -> np.ndarray:
        """Return the expected decrease of the equivalent least squares: half the squared slope."""
        return 0.5 * np.square(self.slope).sum(-1)

    def renewed(
        self,
        problem: Problem,
        points: np.ndarray,
        alive: np.ndarray,
        moved: np.ndarray,
        left: np.ndarray,
    ) -> _Models:
        """Return the models of the remaining points, with new models where the point moved."""
        fields = {name: getattr(self, name)[left] for name in self.__dataclass_fields__}
        fresh = moved[left]
        if fresh.any():
            index = alive[left][fresh]
            new = _Models.at(problem.take(index), points[index])
            for name, array in fields.items():
                array[fresh] = getattr(new, name)
        return _Models(**fields)
