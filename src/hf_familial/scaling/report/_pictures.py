"""The pictures of an analysis with their captions. Pictures without data are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ...errors import NoMinimumError
from . import _curves as curves
from . import _figures as figures
from ._style import symbol_text
from .analysis import Analysis
from .tables import optimal_runs


FRONTIER_POINTS = 25
EXTRAPOLATE = 100.0  # largest budget of the frontier, relative to the largest budget of the runs
ISOFLOP_CAPTION = (
    "Each colour is one compute budget. Dots are runs and lines are the fitted law. Diamonds are "
    "the law’s minima, and the dashed line connects them."
)
LEAST_DRAWS = 20  # smallest number of replicates in a cloud
# label of the axis of each variable, and the kind of its ticks
AXES = {
    "N": ("parameters N", "count"),
    "D": ("training tokens D", "count"),
    "C": ("compute C (FLOPs)", "power"),
    "G": ("granularity G (exits)", "plain"),
    "U": ("shallower exits U", "plain"),
    "V": ("deeper exits V", "plain"),
}
PENALTIES = {"G": "granularity", "U": "shallower exits", "V": "deeper exits"}
FRONTIERS = {
    "N": ("optimal parameters N*", "Best number of parameters"),
    "D": ("optimal training tokens D*", "Best number of training tokens"),
    "loss": ("least loss (nats/token)", "Least loss"),
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture with its file name (without suffix), section, title and caption."""

    name: str
    section: str
    title: str
    caption: str
    figure: Figure


def pictures(analysis: Analysis) -> list[Picture]:
    """Draw all pictures of an analysis for which there are data, in order of their sections."""
    makers = (_isoflop, _frontier, _penalties, _agreement, _residuals, _clouds, _profiles)
    return [picture for make in makers for picture in make(analysis)]


def _isoflop(analysis: Analysis) -> Iterator[Picture]:
    if not curves.has_sizes(analysis):
        return
    settings = curves.settings_of(analysis)
    found = [(setting, curves.isoflop_curves(analysis, setting)) for setting in settings]
    found = [(setting, budgets) for setting, budgets in found if budgets]
    if not found:
        return
    every = [budget for _, budgets in found for budget in budgets]
    losses = np.concatenate([part for b in every for part in (b.losses, b.curve_losses)])
    room = 0.04 * np.ptp(losses)
    limits = (float(losses.min() - room), float(losses.max() + room))
    for i, (setting, budgets) in enumerate(found):
        yield Picture(
            f"isoflop_{i}" if len(found) > 1 else "isoflop",
            "Loss at equal compute",
            f"IsoFLOP curves, {curves.named(setting)}" if setting else "IsoFLOP curves",
            ISOFLOP_CAPTION if i == 0 else "Dots, lines and diamonds are as in the first figure.",
            figures.draw_isoflop(budgets, limits),
        )


def _frontier(analysis: Analysis) -> Iterator[Picture]:
    if not curves.has_optimum(analysis):
        return
    flops = curves.flops_of(analysis)
    seen = (float(flops.min()), float(flops.max()))
    setting = curves.settings_of(analysis)[0]
    where = f" at {curves.named(setting)}" if setting else ""
    counting = f"Best value by the fitted law{where}. FLOPs: {curves.counting(analysis)}."
    grid = np.geomspace(seen[0], seen[1] * EXTRAPOLATE, FRONTIER_POINTS)
    try:
        found = optimal_runs(analysis.fit, grid, analysis.cost, analysis.level, **setting)
    except NoMinimumError:
        return
    rows = curves.rows_of(analysis, setting)
    runs = curves.Group("", flops[rows], analysis.fit.data.loss[rows])
    for name, (label, title) in FRONTIERS.items():
        loss = name == "loss"
        curve = curves.banded([getattr(run, name) for run in found])
        figure = figures.draw_frontier(grid, *curve, label, seen, runs if loss else None, loss)
        band = f" The band is the {analysis.level:.0%} interval (delta method)."
        caption = f"{counting} The line is dashed beyond the budgets of the runs."
        caption += band if np.isfinite(curve[1]).any() else ""
        caption += " Dots are runs." if loss else ""
        yield Picture(f"frontier_{name}", "Best run for each budget", title, caption, figure)


def _penalties(analysis: Analysis) -> Iterator[Picture]:
    columns = analysis.fit.data.columns
    for name, title in PENALTIES.items():
        if name not in analysis.fit.law.variable_names or len(np.unique(columns[name])) < 2:
            continue
        found, none = curves.penalty(analysis, name), f"{name} = {curves.COSTS[name]:g}"
        kind, more = ("reducible loss", " (above E)") if found.above else ("loss", "")
        band = f" with its {analysis.level:.0%} band (delta method)"
        band = band if np.isfinite(found.curve[1]).any() else ""
        yield Picture(
            f"penalty_{name}",
            "Cost of granularity",
            f"Penalty against {title}",
            f"Each dot is a run’s {kind}{more}, compared with the law’s prediction for {none} and "
            f"the same N and D. The line is the law{band}.",
            figures.draw_penalty(columns[name], found, AXES[name][0], f"{kind} over {none} (%)"),
        )


def _groups(analysis: Analysis, x: np.ndarray, y: np.ndarray) -> list[curves.Group]:
    """Group points by the law's variables other than N and D."""
    groups = []
    for setting in curves.settings_of(analysis):
        rows = curves.rows_of(analysis, setting)
        groups.append(curves.Group(curves.named(setting), x[rows], y[rows]))
    return groups if sum(len(g.x) for g in groups) == len(x) else [curves.Group("", x, y)]


def _agreement(analysis: Analysis) -> Iterator[Picture]:
    predicted, measured = analysis.fit.fitted(), analysis.fit.data.loss
    error = float(np.sqrt(np.mean((measured / predicted - 1) ** 2)))
    worst = float(np.abs(measured / predicted - 1).max())
    target = analysis.fit.law.target
    unit = "" if target.unit == "1" else f" ({target.unit.replace('nats per token', 'nats/token')})"
    yield Picture(
        "agreement",
        "How well the law fits",
        "Measured against predicted",
        f"Dots on the diagonal are predicted exactly. For {len(measured):,} rows, the root mean "
        f"square error is {100 * error:.2g}% and the largest error {100 * worst:.2g}%.",
        figures.draw_agreement(
            _groups(analysis, predicted, measured), target.name.replace("_", " ") + unit
        ),
    )


def _residuals(analysis: Analysis) -> Iterator[Picture]:
    columns = dict(analysis.fit.data.columns)
    ratio = analysis.fit.data.loss / analysis.fit.fitted() - 1
    wanted = list(analysis.fit.law.variable_names)
    if curves.has_sizes(analysis):
        columns["C"] = curves.flops_of(analysis)
        wanted.append("C")
    for name in wanted:
        x = columns[name]
        if len(np.unique(x)) < 2 or (x <= 0).all():
            continue
        yield Picture(
            f"residuals_{name}",
            "How well the law fits",
            f"Residuals against {name}",
            "A residual is measured / predicted − 1. The line connects medians. It should show no "
            "trend.",
            figures.draw_residuals(_groups(analysis, x, ratio), *AXES.get(name, (name, "plain"))),
        )


def _clouds(analysis: Analysis) -> Iterator[Picture]:
    fit, replicates = analysis.fit, analysis.replicates
    if replicates is None or len(replicates) < LEAST_DRAWS:
        return
    draws = {n: replicates.values[n] for n in fit.free if np.ptp(replicates.values[n]) > 0}
    moving = list(draws)
    if len(moving) < 2:
        return
    # each coefficient is paired with the one that it correlates with most
    partners = {
        a: max((b for b in moving if b != a), key=lambda b: abs(_correlation(draws, a, b)))
        for a in moving
    }
    pairs = list(dict.fromkeys(tuple(sorted(pair, key=moving.index)) for pair in partners.items()))
    for a, b in pairs:
        one, other = (fit.law.parameter(name).symbol for name in (a, b))
        yield Picture(
            f"cloud_{a}_{b}",
            "Coefficients of the bootstrap replicates",
            f"{symbol_text(one)} and {symbol_text(other)}",
            "Each dot is a bootstrap replicate. The correlation is "
            + f"{_correlation(draws, a, b):.2f}.".replace("-", "−"),
            figures.draw_cloud(
                draws[a], draws[b], (fit.values[a], fit.values[b]), (f"${one}$", f"${other}$")
            ),
        )


def _correlation(draws: Mapping[str, np.ndarray], a: str, b: str) -> float:
    """Return the correlation of two coefficients, in logs if they are positive."""
    x, y = (np.log(draws[n]) if draws[n].min() > 0 else draws[n] for n in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def _profiles(analysis: Analysis) -> Iterator[Picture]:
    fit = analysis.fit
    for name, profile in analysis.profiles.items():
        if len(profile.values) < 2:
            continue  # the profile of an exact fit is a single point
        symbol = fit.law.parameter(name).symbol
        yield Picture(
            f"profile_{name}",
            "Profiles of the coefficients",
            f"Profile of {symbol_text(symbol)}",
            "The curve shows how the objective rises if this coefficient is fixed at other values "
            "and all others are fitted again. The interval ends where the rise is 1.",
            figures.draw_profile(profile, fit.values[name], f"${symbol}$", analysis.level),
        )
