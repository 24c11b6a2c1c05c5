"""Starts by variable projection: a grid over nonlinear parameters, least squares for the linear."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from ._problem import Problem, Space
from .laws._duals import Dual, grad_of, value_of
from .laws.law import Law, Namespace, Parameter


MOST_POINTS = 1024  # of the grid
MOST_ROWS = 512  # that the grid is judged on
SMALL = 1e-3  # share of the loss that a term starts with if least squares would have it negative


def grid(law: Law, space: Space, starts: Mapping[str, tuple[float, ...]]) -> dict[str, np.ndarray]:
    """Values of the free nonlinear parameters to try."""
    moving = [p for p in law.nonlinear if p.name in space.free]
    axes = [_inside(space, p, starts.get(p.name, p.starts)) for p in moving]
    sizes = [len(axis) for axis in axes]
    if not moving:
        return {}
    if np.prod(sizes) <= MOST_POINTS:
        chosen = np.array(list(itertools.product(*(range(size) for size in sizes))))
    else:
        from scipy.stats import qmc  # takes half a second to import

        halton = qmc.Halton(len(sizes), scramble=False).fast_forward(1)
        chosen = (halton.random(MOST_POINTS) * sizes).astype(int)
    return {p.name: a[c] for p, a, c in zip(moving, axes, chosen.T, strict=True)}


def project(
    problem: Problem, chosen: Mapping[str, np.ndarray], starts: Mapping[str, tuple[float, ...]]
) -> np.ndarray:
    """The best linear parameters at every point of a grid."""
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
    """The same points with linear parameters that suit the nonlinear ones."""
    space = problem.space
    p = space.parameters(points)
    values = vars(p) | _linear(dataclasses.replace(problem, weight=pulls), p, len(points))
    shape = (len(points), 1)
    flat = {name: np.broadcast_to(values[name], shape)[:, 0] for name in space.free}
    with np.errstate(invalid="ignore"):
        found = space.point(flat)
    return np.where(np.isfinite(found).all(-1, keepdims=True), found, points)


def _linear(problem: Problem, p: Namespace, count: int) -> dict[str, np.ndarray]:
    """Free linear parameters, each (points, 1); NaN where the law cannot give the losses."""
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
    """Weights of columns (points, columns, rows) that best give `total`; (points, columns)."""
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
    """The problem on a few rows, evenly spread over the table."""
    if problem.rows <= MOST_ROWS:
        return problem
    keep = np.linspace(0, problem.rows - 1, MOST_ROWS).astype(int)
    x = Namespace(**{name: values[keep] for name, values in vars(problem.x).items()})
    target, weight = problem.target[keep], problem.weight[keep]
    return dataclasses.replace(problem, x=x, target=target, weight=weight)


def _inside(space: Space, parameter: Parameter, starts: tuple[float, ...]) -> np.ndarray:
    """The starts of a parameter that its bounds allow; else the middle of the bounds."""
    column = space.free.index(parameter.name)
    low, high = space.low[column], space.high[column]
    if space.logs[column]:
        low, high = np.exp(low), np.exp(high)
    kept = np.array([s for s in starts if low <= s <= high], dtype=np.float64)
    if len(kept):
        return kept
    edges = [edge for edge in (low, high) if np.isfinite(edge)]
    return np.array([np.mean(edges) if edges else 0.0])
