"""The pictures of a fit, drawn from plain arrays, each one column of a journal wide.

Every function returns a `matplotlib.figure.Figure` that belongs to nobody else: no state of pyplot
is read or changed. Losses are in nats per token, N and D are numbers of parameters and tokens, C is
in FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .canvas import (
    ACCENT,
    CONTRAST,
    HUES,
    INK,
    MARKERS,
    MAX_POINTS,
    SOFT,
    blank,
    few_axis,
    linear_axis,
    log_axis,
    shades,
    spread,
    styled,
    thin,
)
from .wording import scientific


LOSS = "loss (nats/token)"
FEW = 6  # values of a variable that all get a tick


@dataclass(frozen=True)
class Budget:
    """Runs and the law at one number of FLOPs.

    Attributes:
        flops (`float`): The budget C.
        sizes, losses (`numpy.ndarray` of shape `(runs,)`): N and measured loss of its runs.
        curve_sizes, curve_losses (`numpy.ndarray` of shape `(points,)`): The law there.
        best_size, best_loss (`float`): The minimum of the law; NaN where it has none.
    """

    flops: float
    sizes: np.ndarray
    losses: np.ndarray
    curve_sizes: np.ndarray
    curve_losses: np.ndarray
    best_size: float
    best_loss: float


@dataclass(frozen=True)
class Group:
    """Points that belong together and how the legend calls them.

    Attributes:
        name (`str`): As `G = 4`; empty for no legend.
        x, y (`numpy.ndarray` of shape `(points,)`): Where they stand.
    """

    name: str
    x: np.ndarray
    y: np.ndarray


@styled
def draw_isoflop(budgets: Sequence[Budget], limits: tuple[float, float] | None = None) -> Figure:
    """Loss against size at constant FLOPs: runs, the law, and its minimum per budget.

    Args:
        budgets (`Sequence[Budget]`): In the order of their FLOPs.
        limits (`tuple[float, float]`, *optional*): Of the losses shown, to compare pictures.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, axes = blank(3.3)
    for budget, colour in zip(budgets, shades(len(budgets)), strict=True):
        axes.plot(budget.curve_sizes, budget.curve_losses, color=colour, zorder=2)
        index = thin(len(budget.sizes), MAX_POINTS // len(budgets))
        points = budget.sizes[index], budget.losses[index]
        axes.plot(*points, "o", ms=3.4, mec="none", color=colour, zorder=3)
        if np.isfinite(budget.best_size):
            axes.plot(
                budget.best_size, budget.best_loss, "D", ms=5, mfc="none", mec=INK, mew=1, zorder=4
            )
    best = [(b.best_size, b.best_loss) for b in budgets if np.isfinite(b.best_size)]
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=INK, lw=0.8, ls=(0, (2, 2)), zorder=1.5)
    axes.set(xlabel="parameters N", ylabel=LOSS)
    if limits is not None:
        axes.set_ylim(*limits)
    log_axis(axes, "x")
    linear_axis(axes, "y")
    _name_curves(axes, budgets)
    return figure


def _name_curves(axes: Axes, budgets: Sequence[Budget]) -> None:
    """Write each budget at the right end of its curve, moved apart where they crowd."""
    low, high = axes.get_ylim()
    ends = np.array([budget.curve_losses[-1] for budget in budgets])
    at = spread(((ends - low) / (high - low)).clip(0, 1), 0.062)
    axes.set_ylim(low, high)
    for budget, height, colour in zip(budgets, at, shades(len(budgets)), strict=True):
        words = scientific(budget.flops, 2).replace(".0×", "×")
        axes.text(
            1.02, height, words, transform=axes.transAxes, color=colour, va="center", size=7.5
        )
    axes.text(1.02, 1.03, "FLOPs", transform=axes.transAxes, color=SOFT, va="bottom", size=7.5)


@styled
def draw_agreement(groups: Sequence[Group], label: str = LOSS) -> Figure:
    """Measured against predicted loss; on the diagonal they are equal.

    Args:
        groups (`Sequence[Group]`): x predicted, y measured.
        label (`str`): What is predicted and measured.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, axes = blank(3.3)
    _scatter(axes, groups)
    low, high = (f(f(g.x.tolist() + g.y.tolist()) for g in groups) for f in (min, max))
    pad = 0.04 * (high - low or 1)
    ends = (low - pad, high + pad)
    axes.plot(ends, ends, color=SOFT, lw=0.9, zorder=1)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel="predicted " + label, ylabel="measured " + label)
    for which in "xy":
        linear_axis(axes, which)
    if len(groups) > 1:
        axes.legend(loc="upper left", ncols=1 + (len(groups) > 5), columnspacing=0.8)
    return figure


@styled
def draw_residuals(groups: Sequence[Group], label: str, kind: str = "count") -> Figure:
    """Residuals against one variable, with the medians of its parts.

    Args:
        groups (`Sequence[Group]`): x the variable, y measured loss over predicted, minus 1.
        label (`str`): Of the variable's axis.
        kind (`str`): How its ticks are written; see `canvas.log_axis`. A variable of few values
            gets a tick at each.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, axes = blank(2.4)
    x, y = (np.concatenate([getattr(g, field) for g in groups]) for field in "xy")
    axes.axhline(0, color=SOFT, lw=0.9, zorder=1)
    _scatter(axes, [Group(g.name, g.x, 100 * g.y) for g in groups])
    middles = [(m, 100 * np.median(y[part])) for m, part in _parts(x)]
    if len(middles) > 2:
        axes.plot(*zip(*middles, strict=True), color=INK, lw=1.1, zorder=4)
    axes.set(xlabel=label, ylabel="residual (%)")
    reach = 1.08 * max(float(np.abs(100 * y).max()), 1e-9)
    axes.set_ylim(-reach, reach)
    linear_axis(axes, "y")
    few_axis(axes, x, kind) if len(np.unique(x)) <= FEW else log_axis(axes, "x", kind)
    return figure


def _parts(x: np.ndarray, most: int = 9) -> list[tuple[float, np.ndarray]]:
    """Points cut into parts of equal number, each with its geometric middle."""
    if len(np.unique(x)) <= most:
        return [(float(value), np.flatnonzero(x == value)) for value in np.unique(x)]
    cut = np.array_split(np.argsort(x, kind="stable"), max(1, min(most, len(x) // 5)))
    return [(float(np.median(x[part])), part) for part in cut]


@styled
def draw_penalty(
    granularity: np.ndarray,
    measured: np.ndarray,
    curve: Group,
    low: np.ndarray,
    high: np.ndarray,
    axis: str = "granularity G (exits)",
    label: str = "reducible loss over dense (%)",
) -> Figure:
    """What exits cost: the loss with them over the loss without.

    Args:
        granularity (`numpy.ndarray` of shape `(runs,)`): G of every run, or its neighbours.
        measured (`numpy.ndarray` of shape `(runs,)`): Its loss over the law's without them.
        curve ([`Group`]): x G, y the law.
        low, high (`numpy.ndarray` of shape `(points,)`): Band of the curve; NaN where there is
            none.
        axis, label (`str`): Of the x and the y axis.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, axes = blank()
    axes.axhline(0, color=SOFT, lw=0.9, zorder=1)
    index = thin(len(granularity))
    values = np.unique(granularity)
    # spread over a little width, for many runs share one G; the same every time
    jitter = np.sin(2.4 * np.arange(len(index)))
    near = granularity * np.exp(0.035) if values[0] > 0 else granularity + 0.02 * np.ptp(values)
    axes.plot(
        granularity[index] + jitter * (near - granularity)[index],
        100 * (measured[index] - 1),
        "o",
        ms=3,
        mec="none",
        color=SOFT,
        alpha=0.55,
        zorder=2,
        label="runs",
    )
    medians = [100 * (np.median(measured[granularity == value]) - 1) for value in values]
    axes.plot(values, medians, "D", ms=5, mfc="none", mec=INK, zorder=4, label="median")
    axes.fill_between(curve.x, 100 * (low - 1), 100 * (high - 1), color=ACCENT, alpha=0.22, lw=0)
    axes.plot(curve.x, 100 * (curve.y - 1), color=ACCENT, zorder=3, label=curve.name)
    axes.set(xlabel=axis, ylabel=label)
    few_axis(axes, values)
    linear_axis(axes, "y")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1)
    return figure


@styled
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
    """What the law calls best at every compute budget, with its band.

    Args:
        flops (`numpy.ndarray` of shape `(points,)`): Budgets C.
        best (`numpy.ndarray` of shape `(points,)`): N*, D* or the loss there.
        low, high (`numpy.ndarray` of shape `(points,)`): Its band; NaN where there is none.
        label (`str`): Of the y axis.
        seen (`tuple[float, float]`, *optional*): Least and most FLOPs of the runs; beyond them the
            curve is dashed.
        points ([`Group`], *optional*): Measured points.
        loss (`bool`): Whether y is a loss, on a linear axis.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, axes = blank()
    axes.fill_between(flops, low, high, color=ACCENT, alpha=0.22, lw=0)
    inside = np.ones(len(flops), bool) if seen is None else _between(flops, *seen)
    axes.plot(flops, best, color=ACCENT, ls=(0, (3, 2)), lw=1.1)
    axes.plot(np.where(inside, flops, np.nan), best, color=ACCENT, lw=1.6)
    if points is not None and len(points.x):
        index = thin(len(points.x))
        axes.plot(
            points.x[index], points.y[index], "o", ms=3.2, mec="none", color=CONTRAST, alpha=0.8
        )
    axes.set(xlabel="compute C (FLOPs)", ylabel=label)
    log_axis(axes, "x", "power")
    linear_axis(axes, "y") if loss else log_axis(axes, "y")
    return figure


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values >= low * (1 - 1e-9)) & (values <= high * (1 + 1e-9))


@styled
def draw_cloud(
    x: np.ndarray, y: np.ndarray, estimate: tuple[float, float], labels: tuple[str, str]
) -> Figure:
    """Two coefficients over the draws of a bootstrap, with their estimates and 95 % intervals.

    Args:
        x, y (`numpy.ndarray` of shape `(draws,)`): The draws.
        estimate (`tuple[float, float]`): The coefficients of the fit itself.
        labels (`tuple[str, str]`): Their names.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, axes = blank()
    index = thin(len(x))
    axes.plot(x[index], y[index], "o", ms=2.2, mec="none", color=ACCENT, alpha=0.35)
    for values, line, span in ((x, axes.axvline, axes.axvspan), (y, axes.axhline, axes.axhspan)):
        low, high = np.percentile(values, [2.5, 97.5])
        span(low, high, color=SOFT, alpha=0.1, lw=0, zorder=0)
        line(estimate[0] if values is x else estimate[1], color=CONTRAST, lw=0.8, zorder=2)
    axes.plot(*estimate, "o", ms=5, mfc="none", mec=CONTRAST, mew=1.3, zorder=3)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    for which, values in (("x", x), ("y", y)):
        if values.min() > 0 and values.max() > 3 * values.min():
            log_axis(axes, which, "plain")
        else:
            linear_axis(axes, which)
    return figure


@styled
def draw_profile(
    values: np.ndarray,
    rise: np.ndarray,
    estimate: float,
    label: str,
    level: float,
    interval: tuple[float, float],
) -> Figure:
    """How much worse the fit gets when one coefficient is held elsewhere.

    Args:
        values (`numpy.ndarray` of shape `(points,)`): Where it is held.
        rise (`numpy.ndarray` of shape `(points,)`): Of the objective there: 0 at the best, 1 at the
            ends of the interval.
        estimate (`float`): The coefficient of the fit.
        label (`str`): Its name.
        level (`float`): Coverage of the interval.
        interval (`tuple[float, float]`): Its ends.

    Returns:
        `matplotlib.figure.Figure`
    """
    figure, axes = blank(2.4)
    axes.axhline(1, color=SOFT, lw=0.9, ls=(0, (3, 2)))
    axes.axvspan(*np.clip(interval, values[0], values[-1]), color=SOFT, alpha=0.1, lw=0, zorder=0)
    axes.plot(values, rise, color=ACCENT)
    axes.plot(estimate, 0, "o", ms=5, mfc="none", mec=CONTRAST, mew=1.3, zorder=3)
    transform = axes.get_yaxis_transform()
    axes.text(0.5, 1.03, f"{level:.0%}", transform=transform, ha="center", va="bottom", color=SOFT)
    # traced farther than needed where the objective is far from a parabola
    inside = np.where(np.isfinite(interval), interval, (values[0], values[-1]))
    room = 0.35 * float(np.ptp(inside))
    limits = (max(values[0], inside[0] - room), min(values[-1], inside[1] + room))
    axes.set(xlabel=label, ylabel="rise of the objective", xlim=limits)
    axes.set_ylim(-0.12, 2.1)
    axes.set_yticks([0, 0.5, 1, 1.5, 2])
    linear_axis(axes, "x")
    return figure


def _scatter(axes: Axes, groups: Sequence[Group]) -> None:
    """Groups by hue and by shape of marker."""
    ordered = len(groups) > len(HUES)
    colours = shades(len(groups)) if ordered else HUES
    for i, group in enumerate(groups):
        index = thin(len(group.x))
        axes.plot(
            group.x[index],
            group.y[index],
            MARKERS[i % len(MARKERS)],
            ms=3.4,
            mec="none",
            alpha=0.8,
            color=colours[i],
            label=group.name,
            zorder=3,
        )


__all__ = [
    "Budget",
    "Group",
    "draw_agreement",
    "draw_cloud",
    "draw_frontier",
    "draw_isoflop",
    "draw_penalty",
    "draw_profile",
    "draw_residuals",
]
