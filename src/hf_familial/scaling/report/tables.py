"""Tables of an analysis as words, for the page, a terminal or a notebook."""

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


@dataclass(frozen=True)
class Table:
    """A table of words whose first column names its rows.

    Attributes:
        title (`str`): Its title.
        head (`Sequence[str]`): Names of the columns.
        rows (`Sequence[Sequence[str]]`): The cells.
        note (`str`): What the table shows.
        prose (`tuple[int, ...]`): Columns of sentences; the others are numbers.

    Raises:
        ValueError: If a row has another number of cells than the head: what follows a missing cell
            would stand under a wrong name.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    prose: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Count the cells."""
        wrong = [row[0] for row in self.rows if len(row) != len(self.head)]
        if wrong:
            raise ValueError(f"rows {wrong} must have {len(self.head)} cells.")


@dataclass(frozen=True)
class OptimalRun:
    """The best run of a budget C, with intervals where the fit has rows for them.

    Attributes:
        C (`float`): FLOPs.
        N, D, loss ([`Estimate`]): Parameters, training tokens, and the loss by the law.
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
    """Find the best size, data and loss for each compute budget.

    Args:
        fit ([`Fit`] or [`PublishedFit`]): A law that reads N and D, with its coefficients.
        budgets (`Sequence[float]`): FLOPs, rising.
        flops (`Callable`, *optional*): FLOPs of a run, `flops(N, D, G)`; 6ND without it.
        level (`float`, *optional*, defaults to 0.95): Coverage of the intervals (delta method).
        given: The law's other variables, such as `G=4`.

    Returns:
        `list[OptimalRun]`: One per budget.

    Raises:
        NoMinimumError: If the law has no least loss at the largest budget.

    Example:
        >>> for run in optimal_runs(answer, [1e20, 1e21], G=4):
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
    """Yield the name, value and intervals of every coefficient; a missing interval is a dash."""
    fit = analysis.fit
    for name, value in fit.values.items():
        words, spans = "", []
        for found in analysis.intervals.values():
            # an interval that could not be had leaves its cell empty, and no other cell moves
            known = found.get(name)
            shown = estimate(value, known.low, known.high) if known else ("", MISSING)
            words = words or shown[0]
            spans.append(shown[1])
        yield name, words or significant(value), spans


def interval_head(analysis: Analysis) -> list[str]:
    """Name the columns of `coefficient_words`' intervals."""
    return [f"{analysis.level:.0%}, {method}" for method in analysis.intervals]


def optimum_table(analysis: Analysis) -> Table | None:
    """Return the best N, D and loss of round budgets; `None` for a law without an optimum."""
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
    note = f"By the law with {counting(analysis)}{where}"
    note += ", delta-method intervals." if sure else "."
    note += " † beyond the largest run: an extrapolation." if budgets[-1] > flops.max() else ""
    return Table(title, head, rows, note)


def granularity_table(analysis: Analysis) -> Table | None:
    """Return what exits cost at the largest budget: loss, and compute to buy it back."""
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
    head = ["granularity G", "loss at the optimum", span, "compute for the loss of G = 1", span]
    note = (
        f"At {scientific(budget)} FLOPs with {counting(analysis)}"
        f"{', heads not counted' if cost is None else ''}. The last columns say by which "
        "factor compute must rise to win back what the exits cost."
    )
    return Table("What exits cost in compute", head, rows, note)


def record_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Word rows of numbers and words that share their names."""
    head = list(rows[0])
    return Table(title, head, [[_cell(row.get(name)) for name in head] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return significant(value) if isinstance(value, float) else str(value)


def _three(value: float) -> str:
    return significant(value, 3)


def _interval(number: Estimate, words: Any) -> tuple[str, str]:
    """Word a number and its interval."""
    known = number.interval
    span = f"[{words(known.low)}, {words(known.high)}]" if known else MISSING
    return words(number.value), span
