"""One door to fitting: `fit`, and `refit` for many replicates of its rows at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import NoOptimumError, NotIdentifiedError, ScalingError, TooFewError
from ..data.observations import Observations
from ..laws.catalogue import get_law
from ..laws.law import Law
from .identification import identify
from .newton import Found, minimise
from .objective import Loss, Problem
from .result import FarResiduals, Fit, FitStatus, Objective, Outliers, Settings
from .rows import far_rows, proportional, usable_rows
from .space import Space
from .varpro import grid, project, thinned


OBJECTIVES = ("log_huber", "huber", "mse")


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
        data ([`Observations`] or a table): Runs, one per row; a table is read by
            `Observations.read` with columns named after the law's variables, after its target
            (`loss`) and, if there is one, `run_id`.
        objective (`str`): `"log_huber"`, `"huber"` or `"mse"`, see [`Settings`].
        delta (`float`): Where Huber's function turns linear, nats per token or log loss.
        fixed (`Mapping[str, float]`, *optional*): Parameters held at a value.
        tied (`Mapping[str, str]`, *optional*): Parameters held equal to another, such as
            `{"beta": "alpha"}`.
        bounds (`Mapping[str, tuple[float, float]]`, *optional*): Bounds in place of the law's.
        weights (array, *optional*): One positive number per row, times those of the data.
        starts (`Mapping`, *optional*): Values of the grid, by parameter, in place of the law's. If
            every free parameter is named, these points are followed and nothing else is tried.
        polished (`int`, *optional*): How many starts are followed; without it 8, or three for
            each nonlinear parameter of the law.
        outliers ([`LargestLosses`] or [`FarResiduals`], *optional*): Rule for leaving rows out.
        max_steps (`int`): Most steps of the search.

    Returns:
        [`Fit`]

    Raises:
        UnknownLawError: If there is no such law.
        MissingColumnError: If the rows lack a variable of the law.
        BadRowsError: If rows hold what the law cannot take, or are given twice.
        TooFewError: If there are not more rows than free parameters, or a variable takes too few
            values; with parameters fixed or tied the condition number alone judges that.
        NotIdentifiedError: If the rows leave a combination of parameters undetermined.
        NoOptimumError: If the law has no value near any start.
        ScalingError: If a setting is wrong.

    Example:
        >>> answer = fit("familial", {"N": sizes, "D": tokens, "G": exits, "loss": losses})
        >>> answer.values["gamma"]
    """
    law = get_law(law)
    settings = Settings(
        objective,
        float(delta),
        {name: float(value) for name, value in (fixed or {}).items()},
        dict(tied or {}),
        {name: (float(low), float(high)) for name, (low, high) in (bounds or {}).items()},
        {
            name: tuple(np.atleast_1d(v).astype(float).tolist())
            for name, v in (starts or {}).items()
        },
        int(polished if polished is not None else max(8, 3 * len(law.nonlinear))),
        outliers,
        int(max_steps),
    )
    _check(law, settings)
    rows = usable_rows(law, data, weights, settings)
    answer = _search(law, rows, settings)
    if isinstance(outliers, FarResiduals):
        for _ in range(outliers.rounds):
            far = far_rows(answer.residuals(), outliers.threshold)
            if not far.any():
                break
            reason = f"residual beyond {outliers.threshold:g} robust standard deviations"
            answer = _search(law, answer.data.without(far, reason), settings)
    return answer


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
def refit(fit: Fit, weights: np.ndarray, losses: np.ndarray | None = None) -> Refits:
    """Fit again from the optimum of a fit, for many replicates of its rows at once.

    Nothing is refused here: a replicate that leaves a coefficient undetermined keeps it near where
    it was, and one whose search does not end is marked.

    Args:
        fit ([`Fit`]): Its law, rows and settings are used.
        weights (`np.ndarray`): Of shape (replicates, rows): how often each of `fit.data`'s rows
            counts in each replicate, in place of the data's own weights; zero leaves it out.
        losses (`np.ndarray`, *optional*): Of the same shape, measured losses in place of the
            data's.

    Returns:
        [`Refits`]

    Raises:
        ScalingError: If a shape is wrong, a weight negative or a loss not positive.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> counts = rng.multinomial(84, np.full(84, 1 / 84), size=1000)
        >>> refit(answer, counts * answer.data.weight).values["gamma"].std()
    """
    weights = np.asarray(weights, dtype=np.float64)
    rows = len(fit.data)
    if weights.ndim != 2 or weights.shape[1] != rows:
        raise ScalingError(f"`weights` must be (replicates, {rows}), got {weights.shape}.")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ScalingError("`weights` must be finite and not negative.")
    problem = _problem(fit.law, fit.data, fit.settings)
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


def _check(law: Law, settings: Settings) -> None:
    if settings.objective not in OBJECTIVES:
        raise ScalingError(f"`objective` must be one of {OBJECTIVES}, got {settings.objective!r}.")
    for name, value in (("delta", settings.delta), ("polished", settings.polished)):
        if not value > 0:
            raise ScalingError(f"`{name}` must be positive, got {value}.")
    for name in settings.starts:
        law.parameter(name)


def _problem(law: Law, data: Observations, settings: Settings) -> Problem:
    space = Space.of(law, settings.fixed, settings.tied, settings.bounds)
    return Problem.of(law, space, data, Loss.of(settings.objective, settings.delta))


def _search(law: Law, data: Observations, settings: Settings) -> Fit:
    problem = _problem(law, data, settings)
    space = problem.space
    if len(data) <= len(space.free):
        raise TooFewError(
            f"{len(data)} rows cannot determine {len(space.free)} parameters of `{law.name}`.",
            "rows",
            len(data),
            len(space.free) + 1,
        )
    tried, points = _starts(problem, settings)
    if not len(points):
        raise NoOptimumError(f"`{law.name}` has no value near these rows at any start.")
    found = minimise(problem, points, settings.max_steps, correct=True)
    best = int(np.argmin(found.value))
    if not np.isfinite(found.value[best]):
        raise NoOptimumError(f"`{law.name}` has no value near these rows at any start.")
    at = found.points[best]
    hit = space.on_bound(at)
    condition = _identify(problem, at, hit, law, data)
    converged = bool(_agreeing(problem, found, best, 1e-9)[found.converged].any())
    status = FitStatus.AT_BOUND if hit else FitStatus.CONVERGED
    values = {name: float(value[0]) for name, value in space.values(at[None]).items()}
    return Fit(
        law=law,
        status=status if converged else FitStatus.NOT_CONVERGED,
        values=values,
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


def _identify(
    problem: Problem, at: np.ndarray, hit: tuple[str, ...], law: Law, data: Observations
) -> float:
    """The condition number; a refusal names variables that follow one another, if any do."""
    try:
        return identify(problem, at, hit)
    except NotIdentifiedError as refusal:
        reason = proportional(law, data)
        if not reason:
            raise
        message = f"{refusal} The reason: {reason} in every row; run some at other ratios."
        raise NotIdentifiedError(message, refusal.parameters, refusal.condition) from None


def _agreeing(problem: Problem, found: Found, best: int, share: float) -> np.ndarray:
    """Which starts ended within a share of the best objective, or fit exactly as well."""
    return found.value <= np.maximum(found.value[best] * (1 + share), problem.nothing(1e-9))


def _starts(problem: Problem, settings: Settings) -> tuple[int, np.ndarray]:
    """How many points were tried, and those to follow, (starts, free)."""
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
