"""Plots of the quality of exits against their cost."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from scipy.optimize import isotonic_regression


if TYPE_CHECKING:
    from .relay_calibration import Calibration
    from .results import ExitEvaluation, ExitRow


# field of `ExitRow` -> axis label of its panel, relative height of the panel
PANELS = {
    "loss": ("loss\n(nats per token)", 1.6),
    "agreement": ("agreement with\nthe deepest exit", 1.0),
    "expected_calibration_error": ("expected\ncalibration error", 1.0),
}
LABEL_INCHES = 0.62  # width of the label of one exit
GREY = "0.72"


def plot_exits(evaluation: ExitEvaluation, path: str | PathLike[str] | None = None) -> Figure:
    """Plot loss, agreement and calibration error of each exit over its FLOPs per token.

    Args:
        evaluation ([`ExitEvaluation`]): The result of [`evaluate_exits`].
        path (`str` or `os.PathLike`, *optional*): The file to write. Its suffix is the format, for
            example `"exits.png"`.

    Returns:
        `matplotlib.figure.Figure`: A figure with one panel per measure.

    Example:
        >>> plot_exits(evaluate_exits(model, blocks), "exits.png")
    """
    rows = evaluation.rows
    width = max(8.0, (len(rows) + 2) * LABEL_INCHES)
    figure = Figure(figsize=(width, 6.5), layout="constrained")
    panels = figure.subplots(
        len(PANELS), sharex=True, squeeze=False, height_ratios=[h for _, h in PANELS.values()]
    )[:, 0]
    flops = [row.flops_per_token for row in rows]
    # deeper exits are darker, so the exits differ in greyscale too
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(rows)))[::-1]
    for axes, (field, (name, _)) in zip(panels, PANELS.items(), strict=True):
        values = [getattr(row, field) for row in rows]
        for at in flops:
            axes.axvline(at, color=GREY, linewidth=0.8, zorder=1)
        axes.plot(flops, values, color="0.45", linewidth=1.2, zorder=2)
        axes.scatter(flops, values, s=48, color=colours, edgecolors="white", zorder=3)
        axes.set_ylabel(name)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].margins(y=0.12)
    panels[1].set_ylim(0, 1.08)
    panels[2].set_ylim(0, max(0.05, *(1.15 * row.expected_calibration_error for row in rows)))
    panels[-1].set_xlim(0, 1.06 * max(flops))
    panels[-1].set_xlabel("FLOPs per token (forward pass)")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.suptitle("Quality of every exit against its FLOPs", x=0.01, ha="left")
    figure.align_ylabels()
    _name_exits(panels[0], rows, gap=LABEL_INCHES / (0.85 * width))
    # a first layout, because panel sizes and tick labels depend on each other
    figure.draw_without_rendering()
    return _saved(figure, path)


def plot_trade_offs(calibration: Calibration, path: str | PathLike[str] | None = None) -> Figure:
    """Plot agreement over layers and over FLOPs per token, for each setting of the thresholds.

    Args:
        calibration ([`Calibration`]): The result of [`calibrate`].
        path (`str` or `os.PathLike`, *optional*): The file to write. Its suffix is the format, for
            example `"trade_offs.png"`.

    Returns:
        `matplotlib.figure.Figure`: A figure with two panels. The chosen setting is marked in both.

    Example:
        >>> plot_trade_offs(calibrate(model, blocks), "trade_offs.png")
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axis_names = {
        "layers_per_token": "layers that a token waits for",
        "flops_per_token": "FLOPs per token, completion included",
    }
    rows, chosen = calibration.rows, calibration.chosen
    label = f"chosen for {calibration.goal} {calibration.target:g}"
    for axes, (name, axis_name) in zip(panels, axis_names.items(), strict=True):
        at = [getattr(row, name) for row in rows]
        axes.plot(at, [row.agreement for row in rows], "o-", ms=3, lw=1.2, color="#3b6ea5")
        axes.plot(getattr(chosen, name), chosen.agreement, "D", ms=8, color="#c8553d", label=label)
        axes.set_xlabel(axis_name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens that are the deepest exit's")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].legend(frameon=False, loc="lower right")
    return _saved(figure, path)


def _saved(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _name_exits(axes: Axes, rows: Sequence[ExitRow], gap: float) -> None:
    """Write the name of each exit above the panel, with a line to its position."""
    right = axes.get_xlim()[1]
    at = [row.flops_per_token / right for row in rows]
    above: dict[str, Any] = {"transform": axes.transAxes}
    for row, start, end in zip(rows, at, spread(at, gap), strict=True):
        line = [start, end], [1, 1.05]
        axes.plot(*line, color=GREY, linewidth=0.8, clip_on=False, zorder=1, **above)
        name = f"exit {row.exit_idx}\ndepth {row.depth}"
        axes.text(end, 1.06, name, ha="center", va="bottom", fontsize=9, **above)


def spread(positions: Sequence[float], gap: float) -> np.ndarray:
    """Move increasing positions in [0, 1] so that neighbours are at least `gap` apart.

    The sum of squared moves is minimal. The gap is smaller if [0, 1] has no room for it.
    """
    count = len(positions)
    steps = min(gap, 1 / max(1, count - 1)) * np.arange(count)
    # after the steps are subtracted, the positions only have to be non-decreasing
    kept = isotonic_regression(np.asarray(positions) - steps).x
    return np.clip(kept, 0, 1 - steps[-1]) + steps
