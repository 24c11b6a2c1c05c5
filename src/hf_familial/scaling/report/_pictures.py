"""The pictures that an analysis has, with their captions; those that make no sense are left out."""

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
EXTRAPOLATE = 100.0  # how far beyond the largest budget the frontier goes
ISOFLOP_CAPTION = (
    "Runs (dots) and the law (lines) at constant FLOPs; diamonds mark the law’s minima and the "
    "dashed line joins them."
)
LEAST_DRAWS = 20  # of a cloud
# by variable: the label of its axis, and the kind of its ticks
AXES = {
    "N": ("parameters N", "count"),
    "D": ("training tokens D", "count"),
    "C": ("compute C (FLOPs)", "power"),
    "G": ("granularity G (exits)", "plain"),
    "U": ("shallower exits U", "plain"),
    "V": ("deeper exits V", "plain"),
}
PENALTIES = {"G": "granularity", "U": "shallower neighbours", "V": "deeper neighbours"}
FRONTIERS = {
    "N": ("optimal parameters N*", "Compute-optimal size"),
    "D": ("optimal training tokens D*", "Compute-optimal data"),
    "loss": ("loss at the optimum (nats/token)", "Loss at the optimum"),
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture: the stem of its file, the title of its section, and how to read it."""

    name: str
    section: str
    title: str
    caption: str
    figure: Figure


def pictures(analysis: Analysis) -> list[Picture]:
    """Draw every picture that makes sense for an analysis, section by section."""
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
            ISOFLOP_CAPTION if i == 0 else "As before.",
            figures.draw_isoflop(budgets, limits),
        )


def _frontier(analysis: Analysis) -> Iterator[Picture]:
    if not curves.has_optimum(analysis):
        return
    flops = curves.flops_of(analysis)
    seen = (float(flops.min()), float(flops.max()))
    setting = curves.settings_of(analysis)[0]
    where = f" at {curves.named(setting)}" if setting else ""
    counting = f"By the law with {curves.counting(analysis)}{where}"
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
        band = f"; band: {analysis.level:.0%}, delta method" if np.isfinite(curve[1]).any() else ""
        caption = f"{counting}; dashed beyond the budgets that were run{band}."
        caption += " Dots: runs." if loss else ""
        yield Picture(f"frontier_{name}", "What is best for a budget", title, caption, figure)


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
            "What granularity costs",
            f"Penalty against {title}",
            f"Every run’s {kind}{more} over what the law says at {none} and the same N and D; the "
            f"line is the law{band}.",
            figures.draw_penalty(columns[name], found, AXES[name][0], f"{kind} over {none} (%)"),
        )


def _groups(analysis: Analysis, x: np.ndarray, y: np.ndarray) -> list[curves.Group]:
    """Group points by the law's further variables."""
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
        "Predicted against measured",
        f"{len(measured):,} rows; root mean square error {100 * error:.2g}%, largest "
        f"{100 * worst:.2g}%. On the diagonal both are equal.",
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
            "Measured over predicted, minus 1; the line joins medians and should show no trend.",
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
    # each coefficient with the one that it is most entangled with
    partners = {
        a: max((b for b in moving if b != a), key=lambda b: abs(_correlation(draws, a, b)))
        for a in moving
    }
    pairs = list(dict.fromkeys(tuple(sorted(pair, key=moving.index)) for pair in partners.items()))
    for a, b in pairs:
        one, other = (fit.law.parameter(name).symbol for name in (a, b))
        yield Picture(
            f"cloud_{a}_{b}",
            "How sure the coefficients are",
            f"{symbol_text(one)} and {symbol_text(other)}",
            f"Correlation {_correlation(draws, a, b):.2f}.".replace("-", "−"),
            figures.draw_cloud(
                draws[a], draws[b], (fit.values[a], fit.values[b]), (f"${one}$", f"${other}$")
            ),
        )


def _correlation(draws: Mapping[str, np.ndarray], a: str, b: str) -> float:
    """Correlate two coefficients, in logs where they are positive."""
    x, y = (np.log(draws[n]) if draws[n].min() > 0 else draws[n] for n in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def _profiles(analysis: Analysis) -> Iterator[Picture]:
    fit = analysis.fit
    for name, profile in analysis.profiles.items():
        if len(profile.values) < 2:
            continue  # an exact fit has no curve
        symbol = fit.law.parameter(name).symbol
        yield Picture(
            f"profile_{name}",
            "Profiles of the coefficients",
            f"Profile of {symbol_text(symbol)}",
            "How the objective rises as this coefficient is held and all others are fitted again.",
            figures.draw_profile(profile, fit.values[name], f"${symbol}$", analysis.level),
        )
