"""What the report of a study says in words and tables: one function per section."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import NoMinimumError
from ..confidence import Estimate
from ..prediction import Estimator
from ..quantities import granularity_compute, optimal
from .canvas import inline_svg
from .curves import counting, flops_of, frontier, has_optimum, has_sizes, named, settings_of
from .formula import draw_formula, symbol_html
from .markup import Symbol, Words, many, prose, section, table
from .study import Study
from .wording import MISSING, count, estimate, scientific, significant


MOST_ROWS = 200  # of the table of runs
MOST_EXITS = 8
BUDGETS = 10.0 ** np.arange(18, 27)
STATUS = {
    "converged": "converged",
    "at_bound": "converged on a bound",
    "not_converged": "did not converge",
}


def head(study: Study) -> str:
    """The title, the formula, and the facts of the fit."""
    fit, law = study.fit, study.fit.law
    predicted = fit.fitted()
    error = float(np.sqrt(np.mean((fit.data.loss / predicted - 1) ** 2)))
    columns = fit.data.columns
    facts = [
        ("runs fitted", f"{fit.data.runs:,}", _of_rows(study)),
        ("search", STATUS[str(fit.status)], f"{fit.agreement:.0%} of {fit.starts} starts agree"),
        ("root mean square error", f"{100 * error:.2g}%", "of the loss, on the rows fitted"),
    ]
    if has_sizes(study):
        flops = flops_of(study)
        facts += [
            ("compute", _span(flops, lambda v: scientific(v, 2)), "FLOPs per run"),
            ("parameters", _span(columns["N"], lambda v: count(v, 2)), _column(study, "N")),
            ("training tokens", _span(columns["D"], lambda v: count(v, 2)), _column(study, "D")),
        ]
    if "G" in law.variable_names:
        values = ", ".join(f"{g:g}" for g in np.unique(columns["G"])[:8])
        facts.append(("granularity G", values, "exits"))
    words = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f' <small>{more}</small>' if more else ''}</dd></div>"
        for name, value, more in facts
    )
    return (
        '<header><p class="kind">Scaling-law fit</p>'
        f"<h1>{html.escape(law.title)}</h1>{_formula(study)}"
        f'<p class="lead">{_abstract(study)}</p><dl class="facts">{words}</dl></header>'
    )


def _formula(study: Study) -> str:
    law = study.fit.law
    try:
        figure = draw_formula(law.formula)
    except ValueError:  # LaTeX that matplotlib cannot set
        return f'<p class="formula"><code>{html.escape(law.formula_text)}</code></p>'
    width, height = 96 * figure.get_size_inches()
    svg = inline_svg(figure, html.escape(law.formula_text))
    svg = svg.replace("<svg ", f'<svg width="{width:.0f}" height="{height:.0f}" ', 1)
    return f'<div class="formula">{svg}</div>'


def _abstract(study: Study) -> str:
    """What the fit says, in a few sentences."""
    fit = study.fit
    rows = f"{many(len(fit.data), 'row')} of " if len(fit.data) != fit.data.runs else ""
    words = [
        f"{rows}{many(fit.data.runs, 'run')} were fitted by "
        f"{OBJECTIVES[fit.settings.objective].format(delta=f'{fit.settings.delta:g}')}."
    ]
    known = next(iter(study.intervals.values()), {})
    found = []
    for name in ("gamma", "alpha", "beta"):
        if name in known:
            value, span = estimate(fit.values[name], known[name].low, known[name].high)
            symbol = symbol_html(fit.law.parameter(name).symbol)
            words_of = f'<span class="symbol">{symbol}</span> = {value} {span}'
            found.append(f'<span class="estimate">{words_of}</span>')
    if found:
        words.append(f"{', '.join(found)} ({study.level:.0%} intervals).")
    return " ".join(words)


OBJECTIVES = {
    "log_huber": "Huber’s function (δ = {delta}) of differences of log losses",
    "huber": "Huber’s function (δ = {delta} nats/token) of differences of losses",
    "mse": "squares of differences of losses",
}


def warnings(study: Study) -> str:
    """What speaks against the fit, or that nothing does."""
    if not study.warnings:
        return (
            '<aside class="warnings good"><h2>No warnings</h2>Every free coefficient is identified '
            "and off its bounds, and the starts of the search agree.</aside>"
        )
    items = "".join(f"<li>{prose(sentence)}</li>" for sentence in study.warnings)
    title = "One warning" if len(study.warnings) == 1 else f"{len(study.warnings)} warnings"
    return f'<aside class="warnings"><h2>{title}</h2><ul>{items}</ul></aside>'


def coefficients(study: Study) -> str:
    """Every coefficient with its intervals."""
    fit = study.fit
    published = next(iter(fit.law.published.items()), None)
    head = ["coefficient", "value", *(f"{study.level:.0%}, {m}" for m in study.intervals)]
    head += [f"published: {published[0]}"] if published else []
    rows = []
    for parameter in fit.law.parameters:
        name, value = parameter.name, fit.values[parameter.name]
        words, spans = significant(value), [MISSING] * len(study.intervals)
        # an interval that could not be had leaves its cell empty, and no other cell moves
        known = [(i, f[name]) for i, f in enumerate(study.intervals.values()) if name in f]
        for place, interval in reversed(known):
            words, spans[place] = estimate(value, interval.low, interval.high)
        if not known and name not in fit.free and spans:
            tied = fit.settings.tied.get(name)
            spans[0] = f"tied to {tied}" if tied else "fixed"
        row: list[str] = [Symbol(parameter.symbol), words, *spans]
        if published:
            row.append(f"{published[1].values[name]:.6g}".replace("-", "−"))
        rows.append([*row, Words(parameter.meaning)])
    note = _interval_note(study)
    if published:
        note += f" Published: {published[1].source}. {published[1].note}"
    return section("Coefficients", table([*head, Words("meaning")], rows, note))


def _interval_note(study: Study) -> str:
    words = " ".join(METHODS[m] for m in study.intervals if m in METHODS)
    if study.replicates is not None:
        words += (
            f" {many(len(study.replicates), 'bootstrap replicate')} of "
            f"{study.replicates.kind}, seed {study.replicates.seed}."
        )
        if study.replicates.failed:
            words += f" {study.replicates.failed} more came to no optimum and are left out."
    return words.strip() or "No intervals could be had."


METHODS = {
    "delta": "delta: sandwich covariance by run, Student’s t.",
    "profile": "profile: where the objective, minimised over the others, has risen by as much.",
    "percentile": "percentile: of the bootstrap.",
    "basic": "basic: of the bootstrap, reflected.",
    "bca": "bca: of the bootstrap, corrected for bias and skewness.",
}


def optima(study: Study) -> str:
    """The best N, D and loss for round budgets."""
    if not has_optimum(study):
        return ""
    flops = flops_of(study)
    wanted = (flops.min() / 3 <= BUDGETS) & (flops.max() * 1e3 >= BUDGETS)
    grid, setting = BUDGETS[wanted], settings_of(study)[0]
    if not len(grid):
        return ""
    try:
        found = frontier(study, grid, setting)
    except NoMinimumError as error:
        return section("Compute-optimal training", f"<p>{prose(str(error))}</p>")
    span = [f"{study.level:.0%} interval"] if np.isfinite(found["N"][1]).any() else []
    head = ["compute C (FLOPs)", "parameters N*", *span, "tokens D*", *span, "D*/N*", "loss", *span]
    rows: list[list[Any]] = []
    for i, budget in enumerate(grid):
        row: list[Any] = [scientific(budget) + ("" if budget <= flops.max() else " †")]
        for name, words in (("N", count), ("D", count), ("loss", significant)):
            middle, low, high = found[name]
            row.append(words(float(middle[i])))
            if span:
                row.append(f"[{words(float(low[i]))}, {words(float(high[i]))}]")
            if name == "D":
                row.append(significant(float(middle[i] / found["N"][0][i]), 3))
        rows.append(row)
    where = f" at {named(setting)}" if setting else ""
    note = f"By the law with {counting(study)}{where}" + (
        ", delta-method intervals." if span else "."
    )
    note += " † beyond the largest run: an extrapolation." if grid[-1] > flops.max() else ""
    return section("Compute-optimal training", table(head, rows, note))


def granularity(study: Study) -> str:
    """What exits cost at the largest budget: loss, and compute to buy it back."""
    law, columns = study.fit.law, study.fit.data.columns
    if "G" not in law.variable_names or not has_optimum(study):
        return ""
    given = [name for name in law.variable_names if name not in ("N", "D", "G")]
    values = np.unique(columns["G"])
    if given or values[-1] <= 1:
        return ""
    budget, estimator = float(flops_of(study).max()), Estimator(study.fit, study.level)
    rows: list[list[str]] = []
    try:
        for exits in [1.0, *values[values > 1][:MOST_EXITS].tolist()]:
            loss = estimator(optimal(law, budget, "loss", study.cost, G=exits))
            compute = granularity_compute(law, exits, budget, study.cost)
            factor = estimator(compute) if exits > 1 else None
            row = [f"{exits:g}", *_estimate(loss, 4)]
            rows.append([*row, *(("1", MISSING) if factor is None else _estimate(factor, 3))])
    except NoMinimumError:
        return ""
    span = f"{study.level:.0%} interval"
    head = ["granularity G", "loss at the optimum", span, "compute for the loss of G = 1", span]
    note = (
        f"At {scientific(budget)} FLOPs with {counting(study)}"
        f"{', heads not counted' if study.cost is None else ''}. The last columns say by which "
        "factor compute must rise to win back what the exits cost."
    )
    return section("What exits cost in compute", table(head, rows, note))


def _estimate(number: Estimate, digits: int) -> tuple[str, str]:
    interval = number.interval
    if interval is None:
        return significant(number.value, digits), MISSING
    ends = (significant(end, digits) for end in (interval.low, interval.high))
    return significant(number.value, digits), f"[{', '.join(ends)}]"


def law_notes(study: Study) -> str:
    """What is known of the law itself."""
    law = study.fit.law
    known = f"Its source: {law.domain.settings}" if law.domain.settings else ""
    parts = [f"<p>{prose(text)}</p>" for text in (law.notes, known) if text]
    if law.domain.failures:
        parts.append(
            f"<ul>{''.join(f'<li>{prose(text)}</li>' for text in law.domain.failures)}</ul>"
        )
    return section("What to know of this law", *parts) if parts else ""


def settings(study: Study) -> str:
    """Every choice the fit was made with."""
    fit, origin = study.fit, study.origin
    settings = fit.settings
    rows = [
        ["law", f"{fit.law.name}: {fit.law.formula_text}"],
        ["source of the law", fit.law.source],
        ["file", f"{origin.file}, {origin.rows} rows" if origin.file else MISSING],
        ["columns", "; ".join(f"{k}: {v}" for k, v in origin.columns.items()) or MISSING],
        ["what the runs tell", origin.facts.words or MISSING],
        ["rows left out", " ".join(origin.notes) or "none"],
        ["objective", OBJECTIVES[settings.objective].format(delta=f"{settings.delta:g}")],
        ["objective at the optimum", f"{fit.objective:.10g}, summed over rows"],
        ["fixed", _pairs(settings.fixed)],
        ["tied", _pairs(settings.tied)],
        ["bounds", _pairs(settings.bounds)],
        ["starts", _pairs(settings.starts) if settings.starts else "of the law"],
        ["outliers", str(settings.outliers) if settings.outliers else "kept"],
        [
            "search",
            f"{fit.grid:,} points of a grid, {fit.starts} followed; within 1% of the best: "
            f"{fit.agreement:.0%}, within 10⁻⁶: {fit.exact_agreement:.0%}; {fit.steps} steps",
        ],
        ["condition number", significant(fit.condition, 3)],
        ["bounds hit", ", ".join(fit.bounds_hit) or "none"],
        ["intervals", _interval_note(study)],
    ]
    cells = [[name, Words(words)] for name, words in rows]
    return section("Settings", table(["", Words("")], cells))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "none"


def runs(study: Study) -> str:
    """The rows, as fitted and left out."""
    fit = study.fit
    names = [n for n in ("C", *fit.law.variable_names) if n in fit.data.columns]
    predicted = fit.fitted()
    words = {"C": scientific, "N": count, "D": count}
    rows = []
    for i in range(min(len(fit.data), MOST_ROWS)):
        measured = float(fit.data.loss[i])
        rows.append(
            [
                fit.data.run_names[fit.data.run_id[i]],
                *(words.get(n, significant)(float(fit.data.columns[n][i])) for n in names),
                f"{measured:.4f}",
                f"{predicted[i]:.4f}",
                f"{100 * (measured / predicted[i] - 1):+.2f}".replace("-", "−"),
            ]
        )
    head = ["run", *names, fit.law.target.name, "by the law", "residual (%)"]
    more = len(fit.data) - len(rows)
    note = f"The first {len(rows)} of {len(fit.data):,} rows." if more > 0 else ""
    parts = [(many(len(fit.data), "row") + ", as fitted", table(head, rows, note))]
    if fit.dropped:
        items = "".join(
            f"<li>row {gone.row}: {prose(gone.reason)}</li>" for gone in fit.dropped[:50]
        )
        parts.append((many(len(fit.dropped), "row") + " left out", f"<ul>{items}</ul>"))
    boxes = (f"<details><summary>{name}</summary>{inner}</details>" for name, inner in parts)
    return section("Runs", *boxes)


def foot(study: Study) -> str:
    """What made the page."""
    return (
        f"<footer>Made by hf_familial {html.escape(study.version)} from fit.json alone. Losses are "
        "in nats per token; k, M, B and T stand for thousands to trillions (10¹²).</footer>"
    )


def _span(values: np.ndarray, words: Any) -> str:
    low, high = words(float(values.min())), words(float(values.max()))
    return low if low == high else f"{low} – {high}"


def _column(study: Study, name: str) -> str:
    column = study.origin.columns.get(name, name)
    return html.escape(column) if column != name else ""


def _of_rows(study: Study) -> str:
    fit = study.fit
    words = [f"{len(fit.data):,} rows"] if len(fit.data) != fit.data.runs else []
    return ", ".join([*words, *filter(None, [study.left_out])])


__all__ = [
    "coefficients",
    "foot",
    "granularity",
    "head",
    "law_notes",
    "optima",
    "runs",
    "settings",
    "warnings",
]
