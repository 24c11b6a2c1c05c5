"""Quality of every exit against what it costs, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter


if TYPE_CHECKING:
    from .results import ExitRow


# field of a row -> what its panel is called, and how much of the height it gets
PANELS = {
    "loss": ("loss\n(nats per token)", 1.6),
    "agreement": ("agreement with\nthe deepest exit", 1.0),
    "expected_calibration_error": ("expected\ncalibration error", 1.0),
}
LABEL_INCHES = 0.62  # room that the name of an exit takes
GREY = "0.72"


def draw_exits(rows: Sequence[ExitRow]) -> Figure:
    """Draw one panel per measure over a common axis of FLOPs per token, which starts at zero.

    Args:
        rows (`Sequence[ExitRow]`): One per exit, shallowest first.

    Returns:
        `matplotlib.figure.Figure`: With the exits named above, and room for all of the names.
    """
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
    _name_exits(panels[0], rows, room=LABEL_INCHES / (0.85 * width))
    # ticks follow from the panels' sizes and those from the ticks: a first layout settles them
    figure.draw_without_rendering()
    return figure


def _name_exits(axes: Axes, rows: Sequence[ExitRow], room: float) -> None:
    """Write every exit's name above the panel, tied to its line where it had to move aside."""
    right = axes.get_xlim()[1]
    at = [row.flops_per_token / right for row in rows]
    for row, start, end in zip(rows, at, spread(at, room), strict=True):
        axes.plot(
            [start, end],
            [1, 1.05],
            color=GREY,
            linewidth=0.8,
            transform=axes.transAxes,
            clip_on=False,
            zorder=1,
        )
        axes.text(
            end,
            1.06,
            f"exit {row.exit_idx}\ndepth {row.depth}",
            transform=axes.transAxes,
            ha="center",
            va="bottom",
            fontsize=9,
        )


def spread(positions: Sequence[float], gap: float) -> np.ndarray:
    """Move positions apart, as little as can be in squares, until neighbours are `gap` apart.

    Args:
        positions (`Sequence[float]`): Increasing, between 0 and 1.
        gap (`float`): Least distance, as far as 0 to 1 has room for it.

    Returns:
        `numpy.ndarray` of shape `(len(positions),)`: Increasing, between 0 and 1.
    """
    count = len(positions)
    steps = min(gap, 1 / max(1, count - 1)) * np.arange(count)
    # without the steps they need only not decrease: pool neighbours that do, at their mean
    pools: list[list[float]] = []
    for value in np.asarray(positions) - steps:
        pools.append([float(value)])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    pooled = [float(np.mean(pool)) for pool in pools for _ in pool]
    return np.clip(pooled, 0, 1 - steps[-1]) + steps
