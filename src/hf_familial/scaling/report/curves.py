"""The numbers behind the pictures and tables of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ...errors import NotIdentifiedError, TooFewError
from .._covariance import CoefficientCovariance
from ..isoflop import budgets
from ..optima import best
from ..quantities import DerivedQuantity, optimal
from .figures import Budget, Group
from .study import Study
from .wording import count


MOST_BUDGETS, MOST_SETTINGS, LEAST_SIZES = 9, 6, 3
CURVE_POINTS, PENALTY_POINTS = 60, 17
SAME = 1.25  # ratio of computes up to which runs without gaps count as one budget
# what adds to the loss of an exit or a family, and the value at which it adds nothing
COSTS = {"G": 1.0, "U": 0.0, "V": 0.0}


def has_sizes(study: Study) -> bool:
    """Whether the law gives a loss by size and data, so that runs of a budget form a curve."""
    return {"N", "D"} <= set(study.fit.law.variable_names) and study.fit.law.family != "rule"


def has_optimum(study: Study) -> bool:
    """Whether a budget has a best size: not for one exit, whose run pays for the others too."""
    return has_sizes(study) and not {"U", "V"} & set(study.fit.law.variable_names)


def settings_of(study: Study) -> list[dict[str, float]]:
    """The values of the law's variables other than N and D that the rows have, at most six."""
    names = [name for name in study.fit.law.variable_names if name not in ("N", "D")]
    if not names:
        return [{}]
    columns = np.column_stack([study.fit.data.columns[name] for name in names])
    found, counts = np.unique(columns, axis=0, return_counts=True)
    if len(found) > MOST_SETTINGS:
        found = found[np.sort(np.argsort(-counts, kind="stable")[:MOST_SETTINGS])]
    return [dict(zip(names, map(float, row), strict=True)) for row in found]


def named(setting: Mapping[str, float]) -> str:
    """A setting in words, such as `G = 4`."""
    return ", ".join(
        f"{name} = {value:g}" if abs(value) < 1e4 else f"{name} = {count(value)}"
        for name, value in setting.items()
    )


def rows_of(study: Study, setting: Mapping[str, float]) -> np.ndarray:
    """Which rows have a setting; booleans of shape (rows,)."""
    keep = np.ones(len(study.fit.data), bool)
    for name, value in setting.items():
        keep &= study.fit.data.columns[name] == value
    return keep


def flops_of(study: Study) -> np.ndarray:
    """Compute of every row, of shape (rows,)."""
    columns = study.fit.data.columns
    return columns["C"] if "C" in columns else 6 * columns["N"] * columns["D"]


def isoflop_curves(study: Study, setting: Mapping[str, float]) -> list[Budget]:
    """The law and the runs along each budget.

    Args:
        study ([`Study`]): Of a law of N and D.
        setting (`Mapping[str, float]`): Which rows, by the law's other variables.

    Returns:
        `list[Budget]`: By rising compute, at most nine; those with three sizes or more.
    """
    fit, rows = study.fit, np.flatnonzero(rows_of(study, setting))
    size, tokens, flops = fit.data.columns["N"], fit.data.columns["D"], flops_of(study)
    groups = _budgets(flops, size, rows)
    found = []
    for group in groups:
        # what the runs paid per parameter and token: 6, and more where heads are counted
        price = float(np.median(flops[group] / (size[group] * tokens[group])))
        budget = float(np.exp(np.log(flops[group]).mean()))
        low, high = size[group].min() / 1.3, size[group].max() * 1.3
        sizes = np.geomspace(low, high, CURVE_POINTS)
        losses = fit.predict(N=sizes, D=budget / (price * sizes), **setting)
        at = int(np.argmin(losses))
        inside = 0 < at < CURVE_POINTS - 1
        least = (sizes[at], losses[at]) if inside else (math.nan, math.nan)
        found.append(
            Budget(budget, size[group], fit.data.loss[group], sizes, losses, *map(float, least))
        )
    return found


def _budgets(flops: np.ndarray, size: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Rows of about the same compute, as a picture has room for."""
    groups = []
    for group in budgets(flops[rows]):
        found = rows[group]
        logs = np.log(flops[found])
        # computes without gaps run on and on: cut them at round places
        cells = np.floor((logs - logs.min()) / math.log(SAME)).astype(int)
        groups += [found[cells == cell] for cell in np.unique(cells)]
    groups = [group for group in groups if len(np.unique(size[group])) >= LEAST_SIZES]
    if len(groups) <= MOST_BUDGETS:
        return groups
    # those that hold most runs, one in each ninth of the computes
    middles = np.array([np.log(flops[group]).mean() for group in groups])
    ninths = np.linspace(middles[0], middles[-1], MOST_BUDGETS + 1)[1:-1]
    cell = np.digitize(middles, ninths)
    return [
        max((g for g, c in zip(groups, cell, strict=True) if c == which), key=len)
        for which in np.unique(cell)
    ]


OPTIMA: tuple[Literal["N", "D", "loss"], ...] = ("N", "D", "loss")
Banded = tuple[np.ndarray, np.ndarray, np.ndarray]  # a curve and the ends of its band


def frontier(study: Study, flops: np.ndarray, setting: Mapping[str, float]) -> dict[str, Banded]:
    """N*, D* and the loss there at budgets, each with the ends of its band.

    A run costs what it cost in the study: see `counting`.

    Args:
        study ([`Study`]): Of a law of N and D.
        flops (`np.ndarray` of shape (points,)): Budgets.
        setting (`Mapping[str, float]`): The law's other variables.

    Returns:
        `dict[str, tuple]`: Keys `N`, `D`, `loss`; three arrays of shape (points,), NaN where there
            is no interval.

    Raises:
        NoMinimumError: If the law has no least loss at a budget.
    """
    law, given, cost = study.fit.law, dict[str, Any](setting), study.cost
    best(law, study.fit.values, float(flops[-1]), cost, **given)  # refuses a law without a minimum
    return {
        of: banded(study, [optimal(law, float(budget), of, cost, **given) for budget in flops])
        for of in OPTIMA
    }


def counting(study: Study) -> str:
    """Return how the report's optima count FLOPs, in words."""
    if study.cost is None:
        return "C = 6ND"
    return f"C as the runs count it, 6ND and every head of {study.cost.vocab:,} tokens"


def banded(study: Study, quantities: Sequence[DerivedQuantity]) -> Banded:
    """Quantities at the fit and their intervals by the delta method.

    Args:
        study ([`Study`]): The fit.
        quantities (`Sequence[Quantity]`): Points of a curve.

    Returns:
        `tuple`: Three arrays of shape (points,): the fit, and both ends; NaN where there are none.
    """
    values = {name: np.asarray(value) for name, value in study.fit.values.items()}
    middle = np.array([q.unscaled(float(q.scaled(values))) for q in quantities])
    try:
        spread = CoefficientCovariance.of(study.fit)
        ends = [spread.interval(quantity, study.level) for quantity in quantities]
    except (TooFewError, NotIdentifiedError):
        return middle, np.full(len(middle), np.nan), np.full(len(middle), np.nan)
    return middle, np.array([end.low for end in ends]), np.array([end.high for end in ends])


def penalty(study: Study, name: str) -> tuple[np.ndarray, Group, np.ndarray, np.ndarray, bool]:
    """What a variable of `COSTS` adds to the loss, as ratios to the loss without it.

    Args:
        study ([`Study`]): Of a law that reads the variable.
        name (`str`): `"G"`, `"U"` or `"V"`.

    Returns:
        `tuple`: Of every row the measured ratio, (rows,); the law's curve; both ends of its band,
            (points,); and whether losses are those above E, because it does not touch E.
    """
    law, data = study.fit.law, study.fit.data
    rows = {variable: data.columns[variable] for variable in law.variable_names}
    above = _spares_floor(study, name)
    floor = study.fit.values["E"] if above else 0.0
    without = study.fit.predict(**(rows | {name: COSTS[name]})) - floor
    middle = {other: float(np.median(v)) for other, v in rows.items() if other != name}
    most = float(data.columns[name].max())
    grid = (
        np.linspace(0, most, PENALTY_POINTS)
        if not COSTS[name]
        else np.geomspace(COSTS[name], most, PENALTY_POINTS)
    )

    def ratio_at(value: float) -> DerivedQuantity:
        def ratio(values: Mapping[str, Any]) -> Any:
            below = values["E"] if above else 0.0
            losses = [law.predict(values, **middle, **{name: at}) for at in (value, COSTS[name])]
            return (losses[0] - below) / (losses[1] - below)

        return DerivedQuantity(f"penalty of {name} = {value:.3g}", ratio, "log")

    curve, low, high = banded(study, [ratio_at(float(value)) for value in grid])
    return (data.loss - floor) / without, Group("law", grid, curve), low, high, above


def _spares_floor(study: Study, name: str) -> bool:
    """Whether a variable leaves the irreducible loss E alone."""
    law, rows = study.fit.law, study.fit.data.columns
    if "E" not in [parameter.name for parameter in law.linear] or law.outer is not None:
        return False
    none = {**study.fit.values, **{p.name: 0.0 for p in law.linear if p.name != "E"}}
    some = {variable: rows[variable][:1] for variable in law.variable_names}
    alone = [float(law.predict(none, **(some | {name: at}))[0]) for at in (1.0, 2.0)]
    return alone[0] == alone[1]


__all__ = [
    "COSTS",
    "banded",
    "counting",
    "flops_of",
    "frontier",
    "has_optimum",
    "has_sizes",
    "isoflop_curves",
    "named",
    "penalty",
    "rows_of",
    "settings_of",
]
