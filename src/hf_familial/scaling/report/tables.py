"""Tables of an analysis as text, for the HTML page, a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._wording import MISSING, count, estimate, scientific, significant
from ...errors import NoMinimumError
from ..confidence import Estimate
from ..flop_models import Flops
from ..optima import best
from ..prediction import Estimator, PublishedFit
from ..quantities import granularity_compute, optimal
from ..results import Fit
from ._curves import counting, flops_of, has_optimum, named, settings_of
from .analysis import Analysis


MOST_EXITS = 8
BUDGETS = 10.0 ** np.arange(9, 31)
NOTES = {
    "Laws compared": (
        "AICc is Akaike’s information criterion for small samples. A smaller value is better. The "
        "weight is the support of a law among those compared. The error is that of the fitted "
        "rows. The held-out error is that of larger runs, which the law was not fitted to."
    ),
    "Error on larger budgets": (
        "Each law was fitted to the rows up to C FLOPs. The errors (root mean square) are those of "
        "the held-out rows with more FLOPs."
    ),
}


@dataclass(frozen=True)
class Table:
    """A table of text. Its first column names the rows.

    Attributes:
        title (`str`): The title.
        head (`Sequence[str]`): Names of the columns.
        rows (`Sequence[Sequence[str]]`): The cells.
        note (`str`): A description of the table.
        prose (`tuple[int, ...]`): Indices of the columns with sentences. The others have numbers.

    Raises:
        ValueError: If a row does not have one cell per column.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    prose: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the number of cells in every row."""
        wrong = [row[0] for row in self.rows if len(row) != len(self.head)]
        if wrong:
            raise ValueError(f"Rows {wrong} must have {len(self.head)} cells.")


@dataclass(frozen=True)
class OptimalRun:
    """The best run for a budget. Its numbers have intervals if the fit has rows.

    Attributes:
        C (`float`): The budget in FLOPs.
        N ([`Estimate`]): Parameters.
        D ([`Estimate`]): Training tokens.
        loss ([`Estimate`]): Predicted loss in nats per token.
    """

    C: float
    N: Estimate
    D: Estimate
    loss: Estimate


def optimal_runs(
    fit: Fit | PublishedFit,
    budgets: Sequence[float] | np.ndarray,
    flops: Flops | None = None,
    level: float = 0.95,
    **given: float,
) -> list[OptimalRun]:
    """Return the best run for each compute budget.

    Args:
        fit ([`Fit`] or [`PublishedFit`]): A law of N and D with its coefficients.
        budgets (`Sequence[float]`): Rising budgets in FLOPs.
        flops (`Callable`, *optional*): FLOP model `flops(N, D, G)`. Default: 6ND.
        level (`float`, *optional*, defaults to 0.95): Confidence level of the intervals (delta
            method).
        given: Values of the law's other variables, such as `G=4`.

    Returns:
        `list[OptimalRun]`: One run per budget.

    Raises:
        NoMinimumError: If the law has no best size at the largest budget.

    Example:
        >>> for run in optimal_runs(fitted, [1e20, 1e21], G=4):
        ...     print(run.C, run.N.value, run.loss.value)
    """
    estimator, other = Estimator(fit, level), dict[str, Any](given)
    best(fit.law, fit.values, float(budgets[-1]), flops, **other)
    return [
        OptimalRun(
            float(budget),
            estimator(optimal(fit.law, float(budget), "N", flops, **other)),
            estimator(optimal(fit.law, float(budget), "D", flops, **other)),
            estimator(optimal(fit.law, float(budget), "loss", flops, **other)),
        )
        for budget in budgets
    ]


def coefficient_words(analysis: Analysis) -> Iterable[tuple[str, str, list[str]]]:
    """Yield the name, value and intervals of every coefficient. A missing interval is a dash."""
    fit = analysis.fit
    for name, value in fit.values.items():
        words, spans = "", []
        for found in analysis.intervals.values():
            # a missing interval keeps its cell, so that the other cells stay in their columns
            known = found.get(name)
            shown = estimate(value, known.low, known.high) if known else ("", MISSING)
            words = words or shown[0]
            spans.append(shown[1])
        yield name, words or significant(value), spans


def interval_head(analysis: Analysis) -> list[str]:
    """Return the column names of the intervals that `coefficient_words` yields."""
    return [f"{analysis.level:.0%}, {method}" for method in analysis.intervals]


def optimum_table(analysis: Analysis) -> Table | None:
    """Return the best N, D and loss for powers of ten of C, `None` for a law without an optimum."""
    if not has_optimum(analysis):
        return None
    flops, setting = flops_of(analysis), settings_of(analysis)[0]
    budgets = BUDGETS[(flops.min() / 3 <= BUDGETS) & (flops.max() * 1e3 >= BUDGETS)]
    if not len(budgets):
        return None
    title = "Compute-optimal training"
    try:
        runs = optimal_runs(analysis.fit, budgets, analysis.cost, analysis.level, **setting)
    except NoMinimumError as error:
        return Table(title, [], [], str(error))
    sure = any(run.N.interval for run in runs)
    rows = []
    for run in runs:
        cells = [(run.N, count), (run.D, count), (run.loss, significant)]
        N, D, loss = (_interval(number, words)[: 1 + sure] for number, words in cells)
        far = " †" if run.C > flops.max() else ""
        ratio = significant(run.D.value / run.N.value, 3)
        rows.append([scientific(run.C) + far, *N, *D, ratio, *loss])
    span = [f"{analysis.level:.0%} interval"] if sure else []
    head = ["compute C (FLOPs)", "parameters N*", *span, "tokens D*", *span, "D*/N*", "loss", *span]
    where = f" at {named(setting)}" if setting else ""
    note = (
        "N* and D* are the parameters and tokens with the least predicted loss for C FLOPs"
        f"{where}. FLOPs: {counting(analysis)}."
    )
    note += " Intervals: delta method." if sure else ""
    note += " † is an extrapolation beyond the largest run." if budgets[-1] > flops.max() else ""
    return Table(title, head, rows, note)


def granularity_table(analysis: Analysis) -> Table | None:
    """Return the least loss for each G at the largest budget, and the compute cost of G exits.

    The result is `None` if the law does not have exactly the variables N, D and G.
    """
    law, columns = analysis.fit.law, analysis.fit.data.columns
    if not has_optimum(analysis) or set(law.variable_names) != {"N", "D", "G"}:
        return None
    values = np.unique(columns["G"])
    if values[-1] <= 1:
        return None
    budget, cost = float(flops_of(analysis).max()), analysis.cost
    estimator = Estimator(analysis.fit, analysis.level)
    rows: list[Sequence[str]] = []
    try:
        for exits in [1.0, *values[values > 1][:MOST_EXITS].tolist()]:
            loss = _interval(estimator(optimal(law, budget, "loss", cost, G=exits)), significant)
            factor = estimator(granularity_compute(law, exits, budget, cost))
            compute = _interval(factor, _three) if exits > 1 else ("1", MISSING)
            rows.append([f"{exits:g}", *loss, *compute])
    except NoMinimumError:
        return None
    span = f"{analysis.level:.0%} interval"
    head = ["granularity G", "least loss", span, "factor on compute", span]
    note = (
        "G is the number of exits. The loss is that of the best run at "
        f"{scientific(budget)} FLOPs ({counting(analysis)}"
        f"{', heads not counted' if cost is None else ''}). With this factor on compute, G exits "
        "reach the loss of one exit."
    )
    return Table("Compute cost of exits", head, rows, note)


def record_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Build a table from records of numbers and text that have the same keys."""
    head = list(rows[0])
    cells = [[_cell(row.get(name)) for name in head] for row in rows]
    return Table(title, head, cells, NOTES.get(title, ""))


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return significant(value) if isinstance(value, float) else str(value)


def _three(value: float) -> str:
    return significant(value, 3)


def _interval(number: Estimate, words: Any) -> tuple[str, str]:
    """Return a number and its interval as text."""
    known = number.interval
    span = f"[{words(known.low)}, {words(known.high)}]" if known else MISSING
    return words(number.value), span
