"""Diagnostics of a fit: sentences that say why its numbers may be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .fitting import proportional
from .laws import LAWS
from .quantities import Interval
from .results import Fit, FitStatus
from .tables._files import some


AGREE = 0.5  # smallest share of starts that should end at the optimum
CONDITION = 1e5  # above this condition number, the rows barely separate the coefficients
RUNS_PER_COEFFICIENT = 5
FAR = 6.0  # distance of an outlier, in robust standard deviations
REPEATED = 1.05  # above this number of passes, data count as repeated


def diagnose(fit: Fit, intervals: Mapping[str, Interval] | None = None) -> tuple[str, ...]:
    """Return the reasons to doubt a fit, one or two sentences each.

    Args:
        fit ([`Fit`]): The fit.
        intervals (`Mapping[str, Interval]`): The intervals of its coefficients by name.
    """
    return (
        *_of_search(fit),
        *_of_rows(fit),
        *_of_columns(fit),
        *_of_intervals(fit, intervals or {}),
    )


def _of_search(fit: Fit) -> Iterator[str]:
    if fit.status is FitStatus.NOT_CONVERGED:
        yield (
            "The search ran out of steps, so the coefficients are not an optimum. Allow more "
            "steps (`max_steps`), or fit a law with fewer coefficients."
        )
    if fit.bounds_hit:
        yield (
            "Some coefficients ended on their bounds: "
            f"{some(f'`{name}` = {fit.values[name]:.4g}' for name in fit.bounds_hit)}. A value "
            "beyond the bound would fit better. All intervals assume the bound as its value."
        )
    if fit.starts > 1 and fit.agreement < AGREE:
        yield (
            f"Only {fit.agreement:.0%} of {fit.starts} starts ended within 1% of the best "
            "objective. There are other optima, and one of them may be better."
        )
    if fit.condition > CONDITION:
        yield (
            "The rows barely separate the effects of the coefficients (condition number "
            f"{fit.condition:.1e}). Do not rely on single coefficients. Predictions in the range "
            "of the rows may still be good."
        )


def _of_rows(fit: Fit) -> Iterator[str]:
    runs, free = fit.data.runs, len(fit.free)
    if runs < RUNS_PER_COEFFICIENT * free:
        yield f"{runs} runs are few for {free} coefficients. Expect wide intervals."
    residual = fit.residuals()
    middle = float(np.median(residual))
    spread = 1.4826 * float(np.median(np.abs(residual - middle)))
    # a fit that is exact has no outliers
    far = np.flatnonzero(np.abs(residual - middle) > max(FAR * spread, 1e-9))
    if len(far):
        names = some((fit.data.run_names[fit.data.run_id[i]] for i in far), 5)
        yield (
            f"{len(far)} of {len(residual)} rows are more than {FAR:g} robust standard deviations "
            f"from the law: {names}."
        )


def _of_columns(fit: Fit) -> Iterator[str]:
    """Yield reasons to doubt the fit that come from the variables of the runs."""
    law, columns = fit.law, fit.data.columns
    followers = proportional(law, fit.data)
    if followers:
        yield (
            f"{followers} in every row. Do not rely on single coefficients, and add runs at other "
            "ratios."
        )
    if {"D", "D_unique"} <= set(columns) and "D_unique" not in law.variable_names:
        epochs = columns["D"] / columns["D_unique"]
        if (epochs > REPEATED).any():
            able = [other for other in LAWS.values() if "D_unique" in other.variable_names]
            others = " or ".join(f"`{other.name}`" for other in able)
            yield (
                f"{int((epochs > REPEATED).sum())} of {len(epochs)} rows repeat their data, up to "
                f"{epochs.max():.3g} times. `{law.name}` counts repeated tokens as new ones, which "
                f"biases its exponents. Fit {others}, or leave these rows out."
            )
    if law.target.name != "loss":
        names = [name for name in dict.fromkeys((*law.variable_names, "N", "D")) if name in columns]
        table = np.column_stack([columns[name] for name in names])
        counts = np.unique(table, axis=0, return_counts=True)[1]
        if (counts > 1).any():
            yield (
                f"{int(counts[counts > 1].sum())} rows share their {' and '.join(names)}, but the "
                f"rule predicts the best {law.target.name} only. Add a column with the loss of "
                "each row, or keep the best row of each setting."
            )


def _of_intervals(fit: Fit, intervals: Mapping[str, Interval]) -> Iterator[str]:
    for parameter in fit.law.nonlinear:
        interval = intervals.get(parameter.name)
        low, high = parameter.bounds
        if interval is not None and interval.low <= 0 <= interval.high and low <= 0 <= high:
            yield (
                f"The interval of `{parameter.name}` contains 0, so the rows do not show that it "
                "has an effect."
            )
