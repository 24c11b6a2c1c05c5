"""Profiles: the least objective for each value of a quantity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import PchipInterpolator

from ...errors import NotIdentifiedError
from ..optima.quantity import Interval, Quantity, check_level


if TYPE_CHECKING:
    from .delta import Spread


PROBE = 0.05  # step of derivatives of a quantity, in standard errors of the coefficients
EXACT = 1e-10  # relative standard error below which a fit has no noise
SPAN = 1.4  # how far a profile is traced, in half widths of its interval
POINTS = 12  # of a profile, on each side
STEPS = 60  # most steps to a point of a profile


@dataclass(frozen=True, eq=False)
class Profile:
    """How the least objective rises as a quantity is moved.

    Attributes:
        values (`np.ndarray`): The quantity, rising, (points,).
        rise (`np.ndarray`): Objective above its optimum, (points,).
        threshold (`float`): Rise at the ends of the interval.
        interval ([`Interval`]): Where the rise stays below; open where it never reaches it.
    """

    values: np.ndarray
    rise: np.ndarray
    threshold: float
    interval: Interval


def profile(spread: Spread, quantity: Quantity, level: float = 0.95) -> Profile:
    """The least objective for each value of a quantity, and the interval it gives.

    Every point makes `objective - multiplier quantity` least. The objective is no likelihood:
    its rise is measured in units that give the delta method's interval if everything is
    linear, so that what is left is the curvature of the law alone.

    Args:
        spread ([`Spread`]): How far the coefficients may be off.
        quantity ([`Quantity`]): What it is of.
        level (`float`, *optional*, defaults to 0.95): Confidence.

    Raises:
        ScalingError: If `level` is not between 0 and 1.
        NotIdentifiedError: If the quantity does not depend on the coefficients.

    Reference: Chandler and Bate 2007, Biometrika 94(1), "Inference for clustered data using the
    independence loglikelihood" (the vertical adjustment).
    """
    check_level(level)
    slope = spread.slope(quantity)
    along = float(slope @ spread.inverse @ slope)
    if not along > 0:
        raise NotIdentifiedError(f"{quantity.name} does not depend on the coefficients.")
    error, middle = spread.standard_error(quantity), spread.estimate(quantity)
    if error <= EXACT * max(1.0, abs(middle)):  # rounding is all that is left
        value = quantity.unscaled(middle)
        at = Interval(level, value, value, "profile")
        return Profile(np.array([value]), np.zeros(1), 0.0, at)
    unit, reach = error**2 / along, SPAN * spread.t(level)
    marks = np.linspace(-reach, reach, 2 * POINTS + 1)
    # far points overflow; they are seen not to be finite
    with np.errstate(over="ignore", invalid="ignore"):
        points = _trace(spread, quantity, marks * math.sqrt(unit / along))
    best = spread.problem.value(spread.point[None])[0]
    rise = np.maximum(spread.problem.value(points) - best, 0)
    scaled = spread.at(quantity, points)
    roots = np.sign(scaled - middle) * np.sqrt(2 * rise / unit)
    keep = np.concatenate([[True], np.diff(np.maximum.accumulate(scaled)) > 0])
    keep &= np.isfinite(scaled) & np.isfinite(roots)
    ends = _crossings(scaled[keep], roots[keep], spread.t(level))
    return Profile(
        values=np.array([quantity.unscaled(value) for value in scaled[keep]]),
        rise=rise[keep],
        threshold=0.5 * unit * spread.t(level) ** 2,
        interval=Interval(level, quantity.unscaled(ends[0]), quantity.unscaled(ends[1]), "profile"),
    )


def _trace(spread: Spread, quantity: Quantity, multipliers: np.ndarray) -> np.ndarray:
    """Points of least `objective - multiplier quantity`, (multipliers, free)."""
    space = spread.problem.space
    points = spread.point + np.outer(multipliers, spread.inverse @ spread.slope(quantity))
    points = np.clip(points, space.low, space.high)

    def merit(at: np.ndarray) -> np.ndarray:
        total = spread.problem.value(at) - multipliers * spread.at(quantity, at)
        return np.where(np.isfinite(total), total, np.inf)

    bad = ~np.isfinite(merit(points))
    points[bad] = spread.point
    value = merit(points)
    size = np.maximum(PROBE * np.sqrt(np.diag(spread.covariance)), spread.least_steps)
    for _ in range(STEPS):
        residual, slopes = spread.problem.jacobian(points)
        pull = spread.problem.weight * spread.problem.loss.pull(residual)
        force = np.einsum("pn,pni->pi", pull * residual, slopes)
        force -= multipliers[:, None] * _slopes(spread, quantity, points, size)
        moves = -force @ spread.inverse
        # the equivalent least squares bounds the objective from above: its step descends
        whole = np.einsum("pn,pni,pnj->pij", pull, slopes, slopes)
        whole += 1e-12 * np.eye(len(size)) * np.trace(whole, axis1=1, axis2=2)[:, None, None]
        held = size == 0
        whole[:, held, :] = whole[:, :, held] = 0
        whole[:, held, held] = 1
        safe = np.linalg.solve(whole, np.where(held, 0, -force)[..., None])[..., 0]
        gained = np.zeros(len(points))
        for step in (moves, 2 * safe, safe, 0.5 * moves, 0.1 * safe):
            there = np.clip(points + step, space.low, space.high)
            reached = merit(there)
            better = reached < value
            gained += np.where(better, value - reached, 0)
            points = np.where(better[:, None], there, points)
            value = np.where(better, reached, value)
        if np.all(gained <= 1e-10 * np.abs(spread.problem.value(points))):
            break
    return points


def _slopes(spread: Spread, quantity: Quantity, points: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Derivatives of the quantity at many points, (points, free)."""
    count, free = points.shape
    moves = np.diag(np.where(size > 0, size, 0))
    ends = [
        spread.at(quantity, (points[:, None] + sign * moves).reshape(-1, free)) for sign in (1, -1)
    ]
    rates = (ends[0] - ends[1]).reshape(count, free)
    return np.divide(rates, 2 * size, out=np.zeros_like(rates), where=size > 0)


def _crossings(x: np.ndarray, z: np.ndarray, t: float) -> tuple[float, float]:
    """Where a rising curve passes -t and t; infinite where it never does."""
    curve = PchipInterpolator(x, z)
    ends = []
    for level, none in ((-t, -math.inf), (t, math.inf)):
        roots = curve.solve(level, extrapolate=False)
        inner = [float(root) for root in np.atleast_1d(roots) if math.isfinite(root)]
        ends.append((max(inner) if level < 0 else min(inner)) if inner else none)
    return ends[0], ends[1]
