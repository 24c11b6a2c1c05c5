"""Pictures of exits against what they cost."""

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


# field of a row -> the name of its panel, and its share of the height
PANELS = {
    "loss": ("loss\n(nats per token)", 1.6),
    "agreement": ("agreement with\nthe deepest exit", 1.0),
    "expected_calibration_error": ("expected\ncalibration error", 1.0),
}
LABEL_INCHES = 0.62  # width of an exit's name
GREY = "0.72"


def plot_exits(evaluation: ExitEvaluation, path: str | PathLike[str] | None = None) -> Figure:
    """Draw loss, agreement and calibration error of every exit over its FLOPs per token.

    Args:
        evaluation ([`ExitEvaluation`]): From `evaluate_exits`.
        path (`str` or `os.PathLike`, *optional*): File to write; its suffix says the format.

    Returns:
        `matplotlib.figure.Figure`: One panel per measure, the exits named above.
    """
    rows = evaluation.rows
    width = max(8.0, (len(rows) + 2) * LABEL_INCHES)
    figure = Figure(figsize=(width, 6.5), layout="constrained")
    panels = figure.subplots(
        len(PANELS), sharex=True, squeeze=False, height_ratios=[h for _, h in PANELS.values()]
    )[:, 0]
    flops = [row.flops_per_token for row in rows]
    # lightness falls with the depth, so the exits differ without colour too
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
    # ticks follow from the panels' sizes and those from the ticks: a first layout settles them
    figure.draw_without_rendering()
    return _saved(figure, path)


def plot_trade_offs(calibration: Calibration, path: str | PathLike[str] | None = None) -> Figure:
    """Draw agreement against layers and against FLOPs per token, for every setting of thresholds.

    Args:
        calibration ([`Calibration`]): From `calibrate`.
        path (`str` or `os.PathLike`, *optional*): File to write; its suffix says the format.

    Returns:
        `matplotlib.figure.Figure`: One panel for each; the chosen setting is marked.
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
    """Write every exit's name above the panel, tied to its line where it had to move aside."""
    right = axes.get_xlim()[1]
    at = [row.flops_per_token / right for row in rows]
    above: dict[str, Any] = {"transform": axes.transAxes}
    for row, start, end in zip(rows, at, spread(at, gap), strict=True):
        line = [start, end], [1, 1.05]
        axes.plot(*line, color=GREY, linewidth=0.8, clip_on=False, zorder=1, **above)
        name = f"exit {row.exit_idx}\ndepth {row.depth}"
        axes.text(end, 1.06, name, ha="center", va="bottom", fontsize=9, **above)


def spread(positions: Sequence[float], gap: float) -> np.ndarray:
    """Move increasing positions in [0, 1] apart until neighbours are `gap` apart.

    The moves are the least in squares. The gap shrinks where [0, 1] has no room for it.
    """
    count = len(positions)
    steps = min(gap, 1 / max(1, count - 1)) * np.arange(count)
    # without the steps the positions need only not decrease
    kept = isotonic_regression(np.asarray(positions) - steps).x
    return np.clip(kept, 0, 1 - steps[-1]) + steps
