"""The numbers behind the pictures and tables of an analysis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._wording import count
from ..confidence import Estimate
from ..isoflop_optima import budgets as budget_groups
from ..prediction import Estimator
from ..quantities import DerivedQuantity
from .analysis import Analysis


MOST_BUDGETS, MOST_SETTINGS, LEAST_SIZES = 9, 6, 3
CURVE_POINTS, PENALTY_POINTS = 60, 17
SAME = 1.25  # ratio of computes up to which runs without gaps count as one budget
# variables that raise the loss of an exit or a family, and the value that has no effect
COSTS = {"G": 1.0, "U": 0.0, "V": 0.0}


@dataclass(frozen=True)
class Budget:
    """The runs of one budget, the curve of the law at this budget, and its minimum (or NaN)."""

    flops: float
    sizes: np.ndarray
    losses: np.ndarray
    curve_sizes: np.ndarray
    curve_losses: np.ndarray
    best_size: float
    best_loss: float


@dataclass(frozen=True)
class Group:
    """A group of points with its name in the legend, such as `G = 4`."""

    name: str
    x: np.ndarray
    y: np.ndarray


def banded(points: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values and both ends of their intervals, each of shape (points,).

    The ends are NaN if there is no interval.
    """
    ends = [(p.interval.low, p.interval.high) if p.interval else (math.nan,) * 2 for p in points]
    low, high = np.array(ends).T
    return np.array([point.value for point in points]), low, high


def has_sizes(analysis: Analysis) -> bool:
    """Return whether the law predicts a loss from N and D, so that a budget has a curve."""
    return {"N", "D"} <= set(analysis.fit.law.variable_names) and analysis.fit.law.family != "rule"


def has_optimum(analysis: Analysis) -> bool:
    """Return whether a budget has a best size.

    A branch law has none, because the run of one exit also trains the other exits.
    """
    return has_sizes(analysis) and not {"U", "V"} & set(analysis.fit.law.variable_names)


def settings_of(analysis: Analysis) -> list[dict[str, float]]:
    """Return the combinations of the law's variables other than N and D, at most six."""
    names = [name for name in analysis.fit.law.variable_names if name not in ("N", "D")]
    if not names:
        return [{}]
    columns = np.column_stack([analysis.fit.data.columns[name] for name in names])
    found, counts = np.unique(columns, axis=0, return_counts=True)
    if len(found) > MOST_SETTINGS:
        found = found[np.sort(np.argsort(-counts, kind="stable")[:MOST_SETTINGS])]
    return [dict(zip(names, map(float, row), strict=True)) for row in found]


def named(setting: Mapping[str, float]) -> str:
    """Return a setting as text, such as `G = 4`."""
    return ", ".join(
        f"{name} = {value:g}" if abs(value) < 1e4 else f"{name} = {count(value)}"
        for name, value in setting.items()
    )


def rows_of(analysis: Analysis, setting: Mapping[str, float]) -> np.ndarray:
    """Return a mask of the rows with the values of a setting, shape (rows,)."""
    keep = np.ones(len(analysis.fit.data), bool)
    for name, value in setting.items():
        keep &= analysis.fit.data.columns[name] == value
    return keep


def flops_of(analysis: Analysis) -> np.ndarray:
    """Return the FLOPs of every row, shape (rows,)."""
    columns = analysis.fit.data.columns
    return columns["C"] if "C" in columns else 6 * columns["N"] * columns["D"]


def counting(analysis: Analysis) -> str:
    """Return a phrase that describes the FLOP model of the report's optima."""
    if analysis.cost is None:
        return "C = 6ND"
    return (
        "C counted as in the runs, 6ND plus the head of every exit with "
        f"{analysis.cost.vocab:,} tokens"
    )


def isoflop_curves(analysis: Analysis, setting: Mapping[str, float]) -> list[Budget]:
    """Return the runs and the law for each budget with three or more sizes, at most nine."""
    fit, rows = analysis.fit, np.flatnonzero(rows_of(analysis, setting))
    size, tokens, flops = fit.data.columns["N"], fit.data.columns["D"], flops_of(analysis)
    found = []
    for group in _budgets(flops, size, rows):
        # FLOPs per parameter and token in the runs: 6, or more if heads are counted
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
    """Group rows of about the same compute, into at most `MOST_BUDGETS` groups."""
    groups = []
    for group in budget_groups(flops[rows]):
        found = rows[group]
        logs = np.log(flops[found])
        # computes without gaps form one group, which is split at equal ratios
        cells = np.floor((logs - logs.min()) / math.log(SAME)).astype(int)
        groups += [found[cells == cell] for cell in np.unique(cells)]
    groups = [group for group in groups if len(np.unique(size[group])) >= LEAST_SIZES]
    if len(groups) <= MOST_BUDGETS:
        return groups
    # the groups with the most runs, one in each ninth of the range of computes
    middles = np.array([np.log(flops[group]).mean() for group in groups])
    ninths = np.linspace(middles[0], middles[-1], MOST_BUDGETS + 1)[1:-1]
    cell = np.digitize(middles, ninths)
    return [
        max((g for g, c in zip(groups, cell, strict=True) if c == which), key=len)
        for which in np.unique(cell)
    ]


@dataclass(frozen=True)
class Penalty:
    """The ratios of losses at some value of a variable of `COSTS` to the losses without its effect.

    `measured` has shape (rows,). `curve` has the law's ratios and both ends of their band, for the
    values `at` of the variable. If `above` is True, E is subtracted from all losses first, because
    the variable does not change E.
    """

    measured: np.ndarray
    at: np.ndarray
    curve: tuple[np.ndarray, np.ndarray, np.ndarray]
    above: bool


def penalty(analysis: Analysis, name: str) -> Penalty:
    """Compute how much G, U or V raises each loss, as a ratio to the loss without its effect."""
    law, data, values = analysis.fit.law, analysis.fit.data, analysis.fit.values
    rows = {variable: data.columns[variable] for variable in law.variable_names}
    none = COSTS[name]
    above = _spares_floor(analysis, name)
    floor = values["E"] if above else 0.0
    without = analysis.fit.predict(**(rows | {name: none})) - floor
    middle = {other: float(np.median(v)) for other, v in rows.items() if other != name}
    most = float(data.columns[name].max())
    grid = (np.geomspace if none else np.linspace)(none, most, PENALTY_POINTS)

    def ratio_at(value: float) -> DerivedQuantity:
        def ratio(values: Mapping[str, Any]) -> Any:
            below = values["E"] if above else 0.0
            losses = [law.predict(values, **middle, **{name: at}) for at in (value, none)]
            return (losses[0] - below) / (losses[1] - below)

        return DerivedQuantity(f"penalty of {name} = {value:.3g}", ratio, "log")

    estimator = Estimator(analysis.fit, analysis.level)
    curve = banded([estimator(ratio_at(float(value))) for value in grid])
    return Penalty((data.loss - floor) / without, grid, curve, above)


def _spares_floor(analysis: Analysis, name: str) -> bool:
    """Return whether a variable does not change the irreducible loss E."""
    law, rows = analysis.fit.law, analysis.fit.data.columns
    if "E" not in [parameter.name for parameter in law.linear] or law.outer is not None:
        return False
    none = {**analysis.fit.values, **{p.name: 0.0 for p in law.linear if p.name != "E"}}
    some = {variable: rows[variable][:1] for variable in law.variable_names}
    alone = [float(law.predict(none, **(some | {name: at}))[0]) for at in (1.0, 2.0)]
    return alone[0] == alone[1]
