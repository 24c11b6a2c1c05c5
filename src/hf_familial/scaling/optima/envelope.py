"""IsoFLOP approach 1: the size that leads at each compute, read off training curves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ...errors import TooFewError
from .parabola import IsoFlop
from .power_law import check_columns, power_law


MIN_SIZES = 3  # that lead somewhere


def envelope(
    C: ArrayLike,
    N: ArrayLike,
    loss: ArrayLike,
    run_id: ArrayLike,
    D: ArrayLike | None = None,
    points: int = 1500,
) -> IsoFlop:
    """Approach 1: power laws through the runs of least loss at each compute.

    Curves are joined in logs of loss and FLOPs. A compute at which the smallest or the largest of
    the sizes trained that far leads is left out: a size that was not run might have led. The
    losses must come from schedules that end where they are read, or from one that does not
    decay; a checkpoint in the middle of a cosine is too high.

    Args:
        C (`ArrayLike` of shape `(n,)`): FLOPs spent at each checkpoint.
        N (`ArrayLike` of shape `(n,)`): Parameters.
        loss (`ArrayLike` of shape `(n,)`): Nats per token, smoothed.
        run_id (`ArrayLike` of shape `(n,)`): Run of each checkpoint.
        D (`ArrayLike` of shape `(n,)`, *optional*): Tokens seen; `C / 6N` if not given.
        points (`int`, *optional*, defaults to 1500): Computes looked at, evenly spaced in logs.

    Returns:
        [`IsoFlop`]: Without curves. The error of the exponents is that of a line through the sizes
        that lead: neighbouring computes are not independent.

    Raises:
        BadRowsError: If a number is not positive and finite.
        TooFewError: If fewer than 3 sizes lead between others.

    Reference: Hoffmann et al. 2022, arXiv:2203.15556, section 3.1.
    """
    columns = {
        "C": np.asarray(C, float),
        "N": np.asarray(N, float),
        "loss": np.asarray(loss, float),
    }
    columns["D"] = columns["C"] / (6 * columns["N"]) if D is None else np.asarray(D, float)
    check_columns(columns)
    logs = {name: np.log(column) for name, column in columns.items()}
    names, run = np.unique(np.asarray(run_id).astype(str), return_inverse=True)
    grid = np.linspace(logs["C"].min(), logs["C"].max(), points)
    heights = np.full((len(names), points), np.inf)
    tokens = np.zeros((len(names), points))
    size = np.array([logs["N"][run == number].mean() for number in range(len(names))])
    for number in range(len(names)):
        rows = np.flatnonzero(run == number)
        rows = rows[np.argsort(logs["C"][rows])]
        at = logs["C"][rows]
        covered = (grid >= at[0]) & (grid <= at[-1])
        heights[number, covered] = np.interp(grid[covered], at, logs["loss"][rows])
        tokens[number] = np.interp(grid, at, logs["D"][rows])
    leader = np.argmin(heights, axis=0)
    there = np.isfinite(heights)
    smallest = np.where(there, size[:, None], np.inf).min(0)
    largest = np.where(there, size[:, None], -np.inf).max(0)
    kept = np.flatnonzero((size[leader] > smallest) & (size[leader] < largest))
    sizes = np.unique(size[leader[kept]])
    if len(sizes) < MIN_SIZES:
        raise TooFewError(
            f"approach 1 needs {MIN_SIZES} sizes that lead between smaller and larger ones, got "
            f"{len(sizes)}.",
            what="N",
            got=len(sizes),
            needed=MIN_SIZES,
        )
    lead, flops = leader[kept], np.exp(grid[kept])
    laws = []
    for values in (size[lead], tokens[lead, kept]):
        reigns = [size[lead] == one for one in sizes]
        means = [(grid[kept][reign].mean(), values[reign].mean()) for reign in reigns]
        coarse = power_law(*np.exp(np.array(means).T))
        fine = power_law(flops, np.exp(values))
        laws.append(replace(fine, exponent_error=coarse.exponent_error, points=len(sizes)))
    left_out = np.isfinite(heights).any(0).sum() - len(kept)
    notes = []
    if left_out > 0.5 * points:
        notes.append(
            f"{left_out / points:.0%} of the computes were left out: the smallest or the largest "
            "size trained that far leads there."
        )
    return IsoFlop(1, laws[0], laws[1], (), "loss", tuple(notes))
