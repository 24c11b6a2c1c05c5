"""Functions that draw the pictures of a fit from plain arrays, as wide as one journal column.

Every function returns a new `matplotlib.figure.Figure` and does not use the state of pyplot. Losses
are in nats per token, N in parameters, D in tokens and C in FLOPs. Arrays have one dimension. The
ends of a band are NaN where there is no band.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..._wording import scientific
from .._covariance import Profile
from . import _style as style
from ._curves import Budget, Group, Penalty


LOSS = "loss (nats/token)"
FEW = 6  # if a variable has at most this many values, each gets a tick
HOLLOW: Any = {"ls": "", "ms": 5, "mfc": "none"}
RING = HOLLOW | {"marker": "o", "mec": style.CONTRAST, "mew": 1.3, "zorder": 3}
DIAMOND = HOLLOW | {"marker": "D", "mec": style.INK, "mew": 1, "zorder": 4}
BAND: Any = {"color": style.ACCENT, "alpha": 0.22, "lw": 0}


@style.styled
def draw_isoflop(budgets: Sequence[Budget], limits: tuple[float, float] | None = None) -> Figure:
    """Draw loss against size at constant FLOPs: runs, the law, and its minimum per budget.

    `budgets` are in the order of their FLOPs. `limits` are those of the loss axis. Equal limits
    make pictures comparable.
    """
    figure, axes = style.blank(3.3, right=0.56, top=0.28)
    for budget, colour in zip(budgets, style.shades(len(budgets)), strict=True):
        axes.plot(budget.curve_sizes, budget.curve_losses, color=colour, zorder=2)
        most = style.MAX_POINTS // len(budgets)
        style.dots(axes, budget.sizes, budget.losses, most, ms=3.4, color=colour, zorder=3)
        if np.isfinite(budget.best_size):
            axes.plot(budget.best_size, budget.best_loss, **DIAMOND)
    best = [(b.best_size, b.best_loss) for b in budgets if np.isfinite(b.best_size)]
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=style.INK, lw=0.8, ls=(0, (2, 2)), zorder=1.5)
    axes.set(xlabel="parameters N", ylabel=LOSS)
    if limits is not None:
        axes.set_ylim(*limits)
    style.log_axis(axes, "x")
    style.linear_axis(axes, "y")
    _name_curves(axes, budgets)
    return figure


def _name_curves(axes: Axes, budgets: Sequence[Budget]) -> None:
    """Write each budget at the right end of its curve. Labels that overlap are moved apart."""
    low, high = axes.get_ylim()
    ends = np.array([budget.curve_losses[-1] for budget in budgets])
    at = style.spread(((ends - low) / (high - low)).clip(0, 1), 0.062)
    axes.set_ylim(low, high)
    look: Any = {"transform": axes.transAxes, "size": 7.5}
    for budget, height, colour in zip(budgets, at, style.shades(len(budgets)), strict=True):
        words = scientific(budget.flops, 2).replace(".0×", "×")
        axes.text(1.02, height, words, color=colour, va="center", **look)
    axes.text(1.02, 1.03, "FLOPs", color=style.SOFT, va="bottom", **look)


@style.styled
def draw_agreement(groups: Sequence[Group], label: str = LOSS) -> Figure:
    """Draw measured (y) against predicted (x). They are equal on the diagonal."""
    figure, axes = style.blank(3.3)
    _scatter(axes, groups)
    low, high = (f(f(g.x.tolist() + g.y.tolist()) for g in groups) for f in (min, max))
    pad = 0.04 * (high - low or 1)
    ends = (low - pad, high + pad)
    axes.plot(ends, ends, color=style.SOFT, lw=0.9, zorder=1)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel="predicted " + label, ylabel="measured " + label)
    for which in "xy":
        style.linear_axis(axes, which)
    if len(groups) > 1:
        axes.legend(loc="upper left", ncols=1 + (len(groups) > 5), columnspacing=0.8)
    return figure


@style.styled
def draw_residuals(groups: Sequence[Group], label: str, kind: str = "count") -> Figure:
    """Draw residuals (measured / predicted - 1) against a variable, with their medians.

    `kind` is the kind of ticks, see `_style.tick`. If the variable has few values, each has a tick.
    """
    figure, axes = style.blank(2.4)
    x, y = (np.concatenate([getattr(g, field) for g in groups]) for field in "xy")
    axes.axhline(0, color=style.SOFT, lw=0.9, zorder=1)
    _scatter(axes, [Group(g.name, g.x, 100 * g.y) for g in groups])
    middles = [(m, 100 * np.median(y[part])) for m, part in _parts(x)]
    if len(middles) > 2:
        axes.plot(*zip(*middles, strict=True), color=style.INK, lw=1.1, zorder=4)
    axes.set(xlabel=label, ylabel="residual (%)")
    reach = 1.08 * max(float(np.abs(100 * y).max()), 1e-9)
    axes.set_ylim(-reach, reach)
    style.linear_axis(axes, "y")
    style.few_axis(axes, x, kind) if len(np.unique(x)) <= FEW else style.log_axis(axes, "x", kind)
    return figure


def _parts(x: np.ndarray, most: int = 9) -> list[tuple[float, np.ndarray]]:
    """Split points into parts of equal number. Return the median and the indices of each part."""
    if len(np.unique(x)) <= most:
        return [(float(value), np.flatnonzero(x == value)) for value in np.unique(x)]
    cut = np.array_split(np.argsort(x, kind="stable"), max(1, min(most, len(x) // 5)))
    return [(float(np.median(x[part])), part) for part in cut]


@style.styled
def draw_penalty(granularity: np.ndarray, found: Penalty, axis: str, label: str) -> Figure:
    """Draw the penalty of exits: the loss of every run relative to the law's loss without them.

    `granularity` is G of every run, or the number of shallower or deeper exits.
    """
    figure, axes = style.blank(top=0.3)
    axes.axhline(0, color=style.SOFT, lw=0.9, zorder=1)
    values = np.unique(granularity)
    # many runs share one G, so points are spread a little, always in the same way
    jitter = np.sin(2.4 * np.arange(len(granularity)))
    near = granularity * np.exp(0.035) if values[0] > 0 else granularity + 0.02 * np.ptp(values)
    x, y = granularity + jitter * (near - granularity), 100 * (found.measured - 1)
    style.dots(axes, x, y, ms=3, color=style.SOFT, alpha=0.55, zorder=2, label="runs")
    medians = [np.median(y[granularity == value]) for value in values]
    axes.plot(values, medians, label="median", **DIAMOND)
    middle, low, high = (100 * (ratio - 1) for ratio in found.curve)
    axes.fill_between(found.at, low, high, **BAND)
    axes.plot(found.at, middle, color=style.ACCENT, zorder=3, label="law")
    axes.set(xlabel=axis, ylabel=label)
    style.few_axis(axes, values)
    style.linear_axis(axes, "y")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1)
    return figure


@style.styled
def draw_frontier(
    flops: np.ndarray,
    best: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    label: str,
    seen: tuple[float, float] | None = None,
    points: Group | None = None,
    loss: bool = False,
) -> Figure:
    """Draw N*, D* or the loss of the best run against the compute budget, with a band.

    The curve is dashed outside `seen`, the smallest and largest FLOPs of the runs. The axis is
    linear if `loss` is True, else logarithmic.
    """
    figure, axes = style.blank()
    axes.fill_between(flops, low, high, **BAND)
    least, most = seen or (0, np.inf)
    inside = (flops >= least * (1 - 1e-9)) & (flops <= most * (1 + 1e-9))
    axes.plot(flops, best, color=style.ACCENT, ls=(0, (3, 2)), lw=1.1)
    axes.plot(np.where(inside, flops, np.nan), best, color=style.ACCENT, lw=1.6)
    if points is not None and len(points.x):
        style.dots(axes, points.x, points.y, ms=3.2, color=style.CONTRAST, alpha=0.8)
    axes.set(xlabel="compute C (FLOPs)", ylabel=label)
    style.log_axis(axes, "x", "power")
    style.linear_axis(axes, "y") if loss else style.log_axis(axes, "y")
    return figure


@style.styled
def draw_cloud(
    x: np.ndarray, y: np.ndarray, estimate: tuple[float, float], labels: tuple[str, str]
) -> Figure:
    """Draw two coefficients of all bootstrap replicates, their estimates and 95% intervals."""
    figure, axes = style.blank()
    style.dots(axes, x, y, ms=2.2, color=style.ACCENT, alpha=0.35)
    for values, line, span in ((x, axes.axvline, axes.axvspan), (y, axes.axhline, axes.axhspan)):
        low, high = np.percentile(values, [2.5, 97.5])
        span(low, high, color=style.SOFT, alpha=0.1, lw=0, zorder=0)
        line(estimate[0] if values is x else estimate[1], color=style.CONTRAST, lw=0.8, zorder=2)
    axes.plot(*estimate, **RING)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    for which, values in (("x", x), ("y", y)):
        if values.min() > 0 and values.max() > 3 * values.min():
            style.log_axis(axes, which, "plain")
        else:
            style.linear_axis(axes, which)
    return figure


@style.styled
def draw_profile(profile: Profile, estimate: float, label: str, level: float) -> Figure:
    """Draw the rise of the objective if one coefficient is fixed at another value.

    The rise is scaled to be 0 at the best value and 1 at the ends of the interval.
    """
    figure, axes = style.blank(2.4)
    values, interval = profile.values, (profile.interval.low, profile.interval.high)
    axes.axhline(1, color=style.SOFT, lw=0.9, ls=(0, (3, 2)))
    ends = np.clip(interval, values[0], values[-1])
    axes.axvspan(*ends, color=style.SOFT, alpha=0.1, lw=0, zorder=0)
    axes.plot(values, profile.rise / profile.threshold, color=style.ACCENT)
    axes.plot(estimate, 0, **RING)
    look: Any = {"transform": axes.get_yaxis_transform(), "color": style.SOFT}
    axes.text(0.5, 1.03, f"{level:.0%}", ha="center", va="bottom", **look)
    # the profile can reach too far if the objective is not like a parabola
    inside = np.where(np.isfinite(interval), interval, (values[0], values[-1]))
    room = 0.35 * float(np.ptp(inside))
    limits = (max(values[0], inside[0] - room), min(values[-1], inside[1] + room))
    axes.set(xlabel=label, ylabel="rise of the objective", xlim=limits)
    axes.set_ylim(-0.12, 2.1)
    axes.set_yticks([0, 0.5, 1, 1.5, 2])
    style.linear_axis(axes, "x")
    return figure


def _scatter(axes: Axes, groups: Sequence[Group]) -> None:
    """Draw groups with different colours and markers. Many points are drawn as one image."""
    colours = style.shades(len(groups)) if len(groups) > len(style.HUES) else style.HUES
    look: Any = {"ms": 3.4, "alpha": 0.8, "zorder": 3}
    look["rasterized"] = sum(len(group.x) for group in groups) > style.RASTER_FROM
    for i, (group, colour) in enumerate(zip(groups, colours, strict=False)):
        marker, most = style.MARKERS[i % len(style.MARKERS)], style.MAX_POINTS // len(groups)
        look |= {"marker": marker, "color": colour, "label": group.name}
        style.dots(axes, group.x, group.y, most, **look)


@style.styled
def draw_formula(tex: str, size: float = 15) -> Figure:
    """Draw a formula (LaTeX without dollar signs) as a picture of its size.

    `ValueError` is raised if matplotlib cannot draw it.
    """
    figure = Figure(figsize=(1, 1))
    text = figure.text(0, 0, f"${tex}$", size=size, math_fontfamily="stix", va="bottom")
    box = text.get_window_extent()
    pad = 2 / 72
    figure.set_size_inches(box.width / figure.dpi + 2 * pad, box.height / figure.dpi + 2 * pad)
    inches = figure.get_size_inches()
    text.set_position((pad / inches[0], (pad - box.y0 / figure.dpi) / inches[1]))
    return figure
