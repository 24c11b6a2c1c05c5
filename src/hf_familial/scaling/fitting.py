"""Fit a law to runs, and fit it again to many replicates of its rows at once."""

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

FLAT = 1e-6  # range of logs of a variable that does not vary
ALIKE = 0.02  # of that range, within which a power of another variable leaves nothing
# beyond this a combination of parameters moves losses by a millionth of what others do: less
# than the noise of any run
MAX_CONDITION = 1e6
LEAST_EFFECT = 1e-9  # of a parameter on log losses, root mean square


@dataclass(frozen=True, eq=False)
class Refits:
    """A fit made again on replicates of its rows.

    Attributes:
        values (`Mapping[str, np.ndarray]`): Every parameter by name, each of shape (replicates,).
        objective (`np.ndarray`): Of shape (replicates,).
        converged (`np.ndarray`): Booleans of shape (replicates,).
    """

    values: Mapping[str, np.ndarray]
    objective: np.ndarray
    converged: np.ndarray


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
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
    """Fit a law to runs: one optimum, the same every time.

    The nonlinear parameters are tried on a grid, at each point of which least squares gives the
    linear ones; the most promising points, and some of the others, are followed to their optimum.

    Args:
        law (`str` or [`Law`]): Name of a law of the catalogue, or a law.
        data ([`RunTable`] or a table): Runs, one per row; a table is read by `RunTable.read` with
            columns named after the law's variables, its target (`loss`) and, if it is there,
            `run_id`.
        objective (`str`): `"log_huber"`, `"huber"` or `"mse"`, see [`Settings`].
        delta (`float`): Where Huber's function turns linear, nats per token or log loss.
        fixed (`Mapping[str, float]`): Parameters held at a value.
        tied (`Mapping[str, str]`): Parameters held equal to another, such as `{"beta": "alpha"}`.
        bounds (`Mapping[str, tuple[float, float]]`): Bounds in place of the law's.
        weights (array): One positive number per row, times those of the data.
        starts (`Mapping`): Values of the grid, by parameter, in place of the law's. If every free
            parameter is named, these points are followed and nothing else is tried.
        polished (`int`): Starts to follow; 8, or three for each nonlinear parameter, without it.
        outliers ([`LargestLosses`] or [`FarResiduals`]): Rule for leaving rows out.
        max_steps (`int`): Most steps of the search.

    Raises:
        MissingColumnError: If the rows lack a variable of the law.
        BadRowsError: If rows hold what the law cannot take, or are given twice.
        TooFewError: If there are not more rows than free parameters, or a variable takes too few
            values (not judged with parameters fixed or tied).
        NotIdentifiedError: If the rows leave a combination of parameters undetermined.
        NoOptimumError: If the law has no value near any start.
        ScalingError: If a setting is wrong, or the law is unknown.

    Example:
        >>> fit("familial", {"N": sizes, "D": tokens, "G": exits, "loss": losses}).values["gamma"]
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


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
def refit(fit: Fit, weights: np.ndarray, losses: np.ndarray | None = None) -> Refits:
    """Fit again from the optimum of a fit, for many replicates of its rows at once.

    A replicate that leaves a coefficient undetermined keeps it near where it was, and one whose
    search does not end is marked.

    Args:
        fit ([`Fit`]): Its law, rows and settings are used.
        weights (`np.ndarray`): Of shape (replicates, rows): how often each row counts, in place of
            the data's own weights; zero leaves it out.
        losses (`np.ndarray`): Of the same shape, measured losses in place of the data's.

    Example:
        >>> counts = np.random.default_rng(0).multinomial(84, np.full(84, 1 / 84), size=1000)
        >>> refit(answer, counts * answer.data.weight).values["gamma"].std()
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
            raise ScalingError(f"`losses` must be {weights.shape} positive numbers.")
        target = np.log(losses) if problem.loss.logs else losses
    problem = dataclasses.replace(problem, target=target, weight=weights)
    start = problem.space.point(fit.values)
    found = minimise(problem, np.tile(start, (len(weights), 1)), fit.settings.max_steps)
    return Refits(problem.space.values(found.points), found.value, found.converged)


def proportional(law: Law, data: RunTable) -> str:
    """Return which variable follows another in every row, in words; empty if none does.

    Where D is a multiple of N, or a power of it, no row tells their effects apart.
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
            return f"`{second}` goes as `{first}`^{slope:.3g}"
    return ""


def _usable_rows(law: Law, data: Any, weights: Any, settings: Settings) -> RunTable:
    """Read, weight and judge the rows to fit."""
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
            what = "never varies" if levels == 1 else f"takes {levels} values only"
            raise TooFewError(
                f"`{variable.name}` {what}; `{law.name}` needs at least {variable.levels}, or "
                "parameters fixed.",
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
        raise NoOptimumError(f"`{law.name}` has no value near these rows at any start.")
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
    """Return how many points were tried, and those to follow, (starts, free)."""
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
    # the others from all over the better quarter, so that agreement means something
    end = max(near, len(order) // 4)
    far = np.linspace(near, end - 1, settings.polished - near + 1).astype(int)[1:]
    picked = dict.fromkeys([*range(near), *far.tolist()])
    return len(points), points[order[[i for i in picked if i < len(order)]]]


def _agreeing(problem: Problem, found: Found, best: int, share: float) -> np.ndarray:
    """Return which starts ended within a share of the best objective, or fit exactly as well."""
    return found.value <= np.maximum(found.value[best] * (1 + share), problem.nothing(1e-9))


def _condition(problem: Problem, at: np.ndarray, hit: tuple[str, ...], data: RunTable) -> float:
    """Return the condition number at an optimum, without the parameters on a bound.

    It is that of the Jacobian of the residuals, its columns of length 1. `NotIdentifiedError` is
    raised if no row depends on a parameter, or the number exceeds `MAX_CONDITION`.
    """
    space, law = problem.space, problem.law
    names = [name for name in space.free if name not in hit]
    _, slopes = problem.jacobian(at[None])
    columns = [space.free.index(name) for name in names]
    matrix = np.sqrt(problem.weight)[:, None] * slopes[0][:, columns]
    length = np.sqrt(np.square(matrix).sum(0))
    # a parameter's own scale: its logarithm where the search moves that
    size = np.where(space.logs, 1.0, np.maximum(np.abs(at), 1e-3))[columns]
    scale = 1.0 if problem.loss.logs else float(np.abs(problem.target).max())
    least = LEAST_EFFECT * scale * np.sqrt(problem.weight.sum())
    loose = [name for name, effect in zip(names, length * size, strict=True) if not effect > least]
    if loose:
        words, condition = "At the optimum no row depends on {}: fix it, or vary the runs.", np.inf
    elif names:
        _, sizes, directions = np.linalg.svd(matrix / length, full_matrices=False)
        condition = float(sizes[0] / sizes[-1]) if sizes[-1] > 0 else np.inf
        if not condition > MAX_CONDITION:
            return condition
        moved = np.abs(directions[-1])
        loose = [n for n, size in zip(names, moved, strict=True) if size > 0.1 * moved.max()]
        words = (
            f"The rows do not tell {{}} apart (condition number {condition:.1e}, at most "
            f"{MAX_CONDITION:.0e}): vary the runs more, or fix or tie one."
        )
    else:
        return 1.0
    listed = ", ".join(f"`{name}`" for name in loose)
    message, reason = words.format(f"{listed} of `{law.name}`"), proportional(law, data)
    if reason:
        message += f" The reason: {reason} in every row; run some at other ratios."
    raise NotIdentifiedError(message, tuple(loose), condition)
