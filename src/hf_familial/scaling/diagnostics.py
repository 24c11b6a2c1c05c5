"""Diagnostics of a fit: what speaks against its numbers, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .fitting import proportional
from .laws import LAWS
from .quantities import Interval
from .results import Fit, FitStatus
from .tables._files import some


AGREE = 0.5  # least share of starts that should end at the optimum
CONDITION = 1e5  # beyond it coefficients move together more than each by itself
RUNS_PER_COEFFICIENT = 5
FAR = 6.0  # robust standard deviations
REPEATED = 1.05  # passes over the data that count as more than one


def diagnose(fit: Fit, intervals: Mapping[str, Interval] | None = None) -> tuple[str, ...]:
    """Return what speaks against a fit, one sentence each; `intervals` are of its coefficients."""
    return (
        *_of_search(fit),
        *_of_rows(fit),
        *_of_columns(fit),
        *_of_intervals(fit, intervals or {}),
    )


def _of_search(fit: Fit) -> Iterator[str]:
    if fit.status is FitStatus.NOT_CONVERGED:
        yield (
            "The search ran out of steps: the coefficients are the best it saw, not an optimum. "
            "Give more steps or starts, or a law with fewer coefficients."
        )
    if fit.bounds_hit:
        yield (
            f"On a bound: {some(f'`{name}` = {fit.values[name]:.4g}' for name in fit.bounds_hit)}. "
            "The rows would have it go on; intervals hold it there."
        )
    if fit.starts > 1 and fit.agreement < AGREE:
        yield (
            f"Only {fit.agreement:.0%} of {fit.starts} starts ended within 1% of the best "
            "objective: there are other optima, and a still better one may exist."
        )
    if fit.condition > CONDITION:
        yield (
            f"The coefficients are barely told apart (condition number {fit.condition:.1e}): "
            "single values mean little, predictions within the rows may still be good."
        )


def _of_rows(fit: Fit) -> Iterator[str]:
    runs, free = fit.data.runs, len(fit.free)
    if runs < RUNS_PER_COEFFICIENT * free:
        yield f"{runs} runs for {free} coefficients are few: expect wide intervals."
    residual = fit.residuals()
    middle = float(np.median(residual))
    spread = 1.4826 * float(np.median(np.abs(residual - middle)))
    # a fit that is exact has no outliers
    far = np.flatnonzero(np.abs(residual - middle) > max(FAR * spread, 1e-9))
    if len(far):
        names = some((fit.data.run_names[fit.data.run_id[i]] for i in far), 5)
        yield (
            f"{len(far)} of {len(residual)} rows lie more than {FAR:g} robust standard deviations "
            f"from the law: {names}."
        )


def _of_columns(fit: Fit) -> Iterator[str]:
    """Yield what the columns of the rows say against the law."""
    law, columns = fit.law, fit.data.columns
    followers = proportional(law, fit.data)
    if followers:
        yield (f"{followers}: single coefficients mean little; run some at other ratios.")
    if {"D", "D_unique"} <= set(columns) and "D_unique" not in law.variable_names:
        epochs = columns["D"] / columns["D_unique"]
        if (epochs > REPEATED).any():
            able = [other for other in LAWS.values() if "D_unique" in other.variable_names]
            others = " or ".join(f"`{other.name}`" for other in able)
            yield (
                f"{int((epochs > REPEATED).sum())} of {len(epochs)} rows repeat their data, up to "
                f"{epochs.max():.3g} times; `{law.name}` takes repeated tokens for new ones, which "
                f"bends its exponents: fit {others}, or leave these rows out."
            )
    if law.target.name != "loss":
        names = [name for name in dict.fromkeys((*law.variable_names, "N", "D")) if name in columns]
        table = np.column_stack([columns[name] for name in names])
        counts = np.unique(table, axis=0, return_counts=True)[1]
        if (counts > 1).any():
            yield (
                f"{int(counts[counts > 1].sum())} rows share their {' and '.join(names)}: the rule "
                f"is of the best {law.target.name}; if these were tried, give a column of their "
                "loss, or the best of each alone."
            )


def _of_intervals(fit: Fit, intervals: Mapping[str, Interval]) -> Iterator[str]:
    for parameter in fit.law.nonlinear:
        interval = intervals.get(parameter.name)
        low, high = parameter.bounds
        if interval is not None and interval.low <= 0 <= interval.high and low <= 0 <= high:
            yield (
                f"The interval of `{parameter.name}` holds 0: the rows do not show that it has an "
                "effect."
            )
