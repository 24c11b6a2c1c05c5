"""Fits of a law to runs, and refits to many replicates of the same rows at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NoOptimumError, NotIdentifiedError, ScalingError, TooFewError
from ._problem import Problem
from ._search import Found, grid, minimise, project, thinned
from .data import RunTable, best_of_each, columns_of
from .laws import get_law
from .laws.law import LOSS, Law
from .results import FarResiduals, Fit, FitStatus, LargestLosses, Objective, Outliers, Settings


OBJECTIVES = ("log_huber", "huber", "mse")

FLAT = 1e-6  # a variable is constant if its logs span less than this
# a variable follows a power of another if its logs differ from that power by at most this share
# of their range
ALIKE = 0.02
# Above this condition number, some combination of parameters moves the losses a million times
# less than another does. That is less than the noise of any run.
MAX_CONDITION = 1e6
LEAST_EFFECT = 1e-9  # smallest effect of a parameter on the log losses (root mean square)


@dataclass(frozen=True, eq=False)
class Refits:
    """The results of `refit`: one fit for each replicate of the rows.

    Attributes:
        values (`Mapping[str, np.ndarray]`): Every parameter by name, each of shape (replicates,).
        objective (`np.ndarray`): The minimised objective, shape (replicates,).
        converged (`np.ndarray`): True where the search converged, shape (replicates,).
    """

    values: Mapping[str, np.ndarray]
    objective: np.ndarray
    converged: np.ndarray


@np.errstate(all="ignore")  # a law can be undefined at some points, and they are checked later
def fit(
    law: str | Law,
    data: Any,
    objective: Objective = "log_huber",
    delta: float = 1e-3,
    fixed: Mapping[str, float] | None = None,
    tied: Mapping[str, str] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    weights: Any = None,
    starts: Mapping[str, float | Sequence[float]] | None = None,
    polished: int | None = None,
    outliers: Outliers | None = None,
    max_steps: int = 200,
) -> Fit:
    """Fit the coefficients of a law to runs. The same input always has the same result.

    The search tries the nonlinear parameters on a grid of starting points. At each point, least
    squares finds the linear parameters. It then follows the best points, and some others, to
    their optimum, and returns the best optimum.

    Args:
        law (`str` or [`Law`]): The law, or its name in `LAWS`, such as `"familial"`.
        data ([`RunTable`] or a table): The runs, one per row. `RunTable.read` reads a table. Its
            columns have the names of the law's variables (such as `N`, `D` and `G`), `loss` (the
            law's target) and optionally `run_id`.
        objective (`str`): `"log_huber"` (default), `"huber"` or `"mse"`, see [`Settings`].
        delta (`float`): The residual above which Huber's function is linear. Its unit is the log
            of the loss for `"log_huber"`, else nats per token.
        fixed (`Mapping[str, float]`): Values of parameters that are not fitted.
        tied (`Mapping[str, str]`): Parameters that equal another one: `{"beta": "alpha"}`.
        bounds (`Mapping[str, tuple[float, float]]`): Bounds that replace the law's own.
        weights (array): One positive factor per row. It multiplies the weights of the data.
        starts (`Mapping`): Grid values by parameter. They replace the law's own. If they name
            every free parameter, the search follows all of these points and no others.
        polished (`int`): Number of starting points to follow to their optimum. Default: 8, or
            three per nonlinear parameter if that is more.
        outliers ([`LargestLosses`] or [`FarResiduals`]): The rule for leaving rows out.
        max_steps (`int`): Largest number of search steps.

    Raises:
        MissingColumnError: If the rows lack a variable of the law.
        BadRowsError: If rows have invalid values or are repeated.
        TooFewError: If there are not more rows than free parameters, or a variable has too few
            different values (not checked with `fixed` or `tied`).
        NotIdentifiedError: If the rows do not determine some combination of parameters.
        NoOptimumError: If the law has no finite value near any starting point.
        ScalingError: If a setting is wrong, or the law is unknown.

    Example:
        >>> law = get_law("familial"); truth = law.published["assumed"].values
        >>> design = isoflop_design(law, truth, [1e19, 1e20, 1e21], G=[1, 2, 4, 8])
        >>> fit(law, simulate(law, truth, design)).values["gamma"]  # 0.033
    """
    law = get_law(law)
    settings = Settings(
        objective,
        float(delta),
        {name: float(value) for name, value in (fixed or {}).items()},
        dict(tied or {}),
        {name: (float(low), float(high)) for name, (low, high) in (bounds or {}).items()},
        {n: tuple(np.atleast_1d(v).astype(float).tolist()) for n, v in (starts or {}).items()},
        int(polished if polished is not None else max(8, 3 * len(law.nonlinear))),
        outliers,
        int(max_steps),
    )
    if settings.objective not in OBJECTIVES:
        raise ScalingError(f"`objective` must be one of {OBJECTIVES}, got {settings.objective!r}.")
    for name in ("delta", "polished"):
        if not getattr(settings, name) > 0:
            raise ScalingError(f"`{name}` must be positive, got {getattr(settings, name)}.")
    for name in settings.starts:
        law.parameter(name)
    answer = _search(law, _usable_rows(law, data, weights, settings), settings)
    if isinstance(outliers, FarResiduals):
        reason = f"residual beyond {outliers.threshold:g} robust standard deviations"
        for _ in range(outliers.rounds):
            residual = answer.residuals()
            off = np.abs(residual - np.median(residual))
            far = off > outliers.threshold * 1.4826 * np.median(off)
            if not far.any():
                break
            answer = _search(law, answer.data.without(far, reason), settings)
    return answer


@np.errstate(all="ignore")  # a law can be undefined at some points, and they are checked later
def refit(fit: Fit, weights: np.ndarray, losses: np.ndarray | None = None) -> Refits:
    """Repeat a fit for many replicates of its rows at once, starting from its optimum.

    If a replicate does not determine a coefficient, the value stays near the fit's. If a search
    runs out of steps, `converged` is False for that replicate.

    Args:
        fit ([`Fit`]): The fit whose law, rows and settings are used.
        weights (`np.ndarray`): Weights of shape (replicates, rows). They replace the weights of
            the data. A weight of 0 leaves the row out.
        losses (`np.ndarray`): Losses of the same shape that replace the measured ones.

    Example:
        >>> counts = np.random.default_rng(0).multinomial(84, np.full(84, 1 / 84), size=1000)
        >>> refit(fitted, counts * fitted.data.weight).values["gamma"].std()  # of a fit to 84 rows
    """
    weights, rows = np.asarray(weights, dtype=np.float64), len(fit.data)
    if weights.ndim != 2 or weights.shape[1] != rows:
        raise ScalingError(f"`weights` must be (replicates, {rows}), got {weights.shape}.")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ScalingError("`weights` must be finite and not negative.")
    problem = Problem.of(fit.law, fit.data, fit.settings)
    target = problem.target
    if losses is not None:
        losses = np.asarray(losses, dtype=np.float64)
        if losses.shape != weights.shape or not (losses > 0).all():
            raise ScalingError(
                f"`losses` must be positive numbers of shape {weights.shape}, got shape "
                f"{losses.shape}."
            )
        target = np.log(losses) if problem.loss.logs else losses
    problem = dataclasses.replace(problem, target=target, weight=weights)
    start = problem.space.point(fit.values)
    found = minimise(problem, np.tile(start, (len(weights), 1)), fit.settings.max_steps)
    return Refits(problem.space.values(found.points), found.value, found.converged)


def proportional(law: Law, data: RunTable) -> str:
    """Return a phrase that names a variable that follows another in every row, else `""`.

    For example, if D is a multiple or a power of N, the rows cannot separate their effects.
    """
    names = [name for name in law.variable_names if (data.columns[name] > 0).all()]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            x, y = (np.log(data.columns[name]) for name in (first, second))
            if np.ptp(x) < FLAT or np.ptp(y) < FLAT:
                continue
            slope, offset = np.polyfit(x, y, 1)
            if np.abs(y - slope * x - offset).max() > ALIKE * np.ptp(y):
                continue
            if abs(slope - 1) < 0.02:
                ratio = float(np.exp(np.mean(y - x)))
                return f"`{second}` is proportional to `{first}` (about {ratio:.3g} times it)"
            return f"`{second}` is proportional to `{first}`^{slope:.3g}"
    return ""


def _usable_rows(law: Law, data: Any, weights: Any, settings: Settings) -> RunTable:
    """Read, weight and check the rows to fit."""
    if not isinstance(data, RunTable):
        columns = columns_of(data)
        data = RunTable.read(
            columns,
            loss=law.target.name if law.target.name in columns else LOSS.name,
            run_id="run_id" if "run_id" in columns else None,
            needed=law.variable_names,
        )
    if weights is not None:
        array = np.array(weights, dtype=np.float64)
        if array.shape != data.loss.shape or not (array > 0).all() or not np.isfinite(array).all():
            raise ScalingError(
                f"`weights` must be {len(data)} positive numbers, one per row, got shape "
                f"{array.shape}."
            )
        data = dataclasses.replace(data, weight=array * data.weight)
    data = data.for_law(law)
    if law.target.name != LOSS.name and LOSS.name in data.columns:
        best = best_of_each(data.columns, law.variable_names, data.columns[LOSS.name])
        data = data.without(~best, f"another `{law.target.name}` of its size has a lower loss")
    if isinstance(settings.outliers, LargestLosses) and settings.outliers.count > 0:
        count = min(settings.outliers.count, len(data))
        drop = data.loss >= np.sort(data.loss)[-count]
        data = data.without(drop, f"among the {count} largest losses")
    for variable in () if settings.fixed or settings.tied else law.variables:
        levels = len(np.unique(data.columns[variable.name]))
        if levels < variable.levels:
            what = "never varies" if levels == 1 else f"has {levels} different values only"
            raise TooFewError(
                f"`{variable.name}` {what}. `{law.name}` needs at least {variable.levels}. Add "
                "runs, or fix some parameters (`fixed`).",
                variable.name,
                levels,
                variable.levels,
            )
    return data


def _search(law: Law, data: RunTable, settings: Settings) -> Fit:
    problem = Problem.of(law, data, settings)
    space = problem.space
    if len(data) <= len(space.free):
        raise TooFewError(
            f"{len(data)} rows cannot determine {len(space.free)} parameters of `{law.name}`.",
            "rows",
            len(data),
            len(space.free) + 1,
        )
    tried, points = _starts(problem, settings)
    found = minimise(problem, points, settings.max_steps, correct=True) if len(points) else None
    if found is None or not np.isfinite(found.value.min()):
        raise NoOptimumError(
            f"`{law.name}` has no finite value for these rows at any starting point."
        )
    best = int(np.argmin(found.value))
    at = found.points[best]
    hit = space.on_bound(at)
    condition = _condition(problem, at, hit, data)
    converged = bool(_agreeing(problem, found, best, 1e-9)[found.converged].any())
    status = FitStatus.AT_BOUND if hit else FitStatus.CONVERGED
    return Fit(
        law=law,
        status=status if converged else FitStatus.NOT_CONVERGED,
        values={name: float(value[0]) for name, value in space.values(at[None]).items()},
        objective=float(found.value[best]),
        data=data,
        settings=settings,
        free=space.free,
        bounds_hit=hit,
        condition=condition,
        grid=tried,
        starts=len(points),
        agreement=float(_agreeing(problem, found, best, 1e-2).mean()),
        exact_agreement=float(_agreeing(problem, found, best, 1e-6).mean()),
        steps=found.steps,
    )


def _starts(problem: Problem, settings: Settings) -> tuple[int, np.ndarray]:
    """Return the number of grid points, and the points to follow, shape (starts, free)."""
    space = problem.space
    if settings.starts and set(space.free) <= set(settings.starts):
        axes = np.meshgrid(*(settings.starts[name] for name in space.free), indexing="ij")
        given = np.stack([axis.reshape(-1) for axis in axes], -1)
        return len(given), space.point(dict(zip(space.free, given.T, strict=True)))
    points = project(problem, grid(problem.law, space, settings.starts), settings.starts)
    if not len(points):
        return 0, points
    value = thinned(problem).value(points)
    order = np.argsort(value, kind="stable")
    order = order[: int(np.isfinite(value).sum())]
    near = min(len(order), -(-settings.polished // 2))
    # the others are spread over the better quarter, so that they can disagree with the best
    end = max(near, len(order) // 4)
    far = np.linspace(near, end - 1, settings.polished - near + 1).astype(int)[1:]
    picked = dict.fromkeys([*range(near), *far.tolist()])
    return len(points), points[order[[i for i in picked if i < len(order)]]]


def _agreeing(problem: Problem, found: Found, best: int, share: float) -> np.ndarray:
    """Return a mask of the starts that ended within `share` of the best objective."""
    return found.value <= np.maximum(found.value[best] * (1 + share), problem.nothing(1e-9))


def _condition(problem: Problem, at: np.ndarray, hit: tuple[str, ...], data: RunTable) -> float:
    """Return the condition number of the residuals' Jacobian, with columns scaled to length 1.

    Parameters on a bound are left out. `NotIdentifiedError` is raised if no row depends on a
    parameter, or the number exceeds `MAX_CONDITION`.
    """
    space, law = problem.space, problem.law
    names = [name for name in space.free if name not in hit]
    _, slopes = problem.jacobian(at[None])
    columns = [space.free.index(name) for name in names]
    matrix = np.sqrt(problem.weight)[:, None] * slopes[0][:, columns]
    length = np.sqrt(np.square(matrix).sum(0))
    # the scale of a parameter is 1 where the search moves its logarithm
    size = np.where(space.logs, 1.0, np.maximum(np.abs(at), 1e-3))[columns]
    scale = 1.0 if problem.loss.logs else float(np.abs(problem.target).max())
    least = LEAST_EFFECT * scale * np.sqrt(problem.weight.sum())
    loose = [name for name, effect in zip(names, length * size, strict=True) if not effect > least]
    if loose:
        words, condition = "No row depends on {} at the optimum. Fix it, or vary the runs.", np.inf
    elif names:
        _, sizes, directions = np.linalg.svd(matrix / length, full_matrices=False)
        condition = float(sizes[0] / sizes[-1]) if sizes[-1] > 0 else np.inf
        if not condition > MAX_CONDITION:
            return condition
        moved = np.abs(directions[-1])
        loose = [n for n, size in zip(names, moved, strict=True) if size > 0.1 * moved.max()]
        words = (
            f"The rows cannot separate the effects of {{}} (condition number {condition:.1e}, the "
            f"limit is {MAX_CONDITION:.0e}). Vary the runs more, or fix or tie one of them."
        )
    else:
        return 1.0
    listed = ", ".join(f"`{name}`" for name in loose)
    message, reason = words.format(f"{listed} of `{law.name}`"), proportional(law, data)
    if reason:
        message += f" The reason is that {reason} in every row. Add runs at other ratios."
    raise NotIdentifiedError(message, tuple(loose), condition)
