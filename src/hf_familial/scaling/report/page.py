"""The HTML report of an analysis: one page without scripts, other files or network access."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, Template
from markupsafe import Markup, escape

from ..._files import write_whole
from ..._wording import MISSING, count, estimate, plural, scientific, significant
from ..laws.law import Variable
from ..results import FitStatus
from ._curves import flops_of, has_sizes
from ._figures import draw_formula
from ._pictures import Picture, pictures
from ._style import inline_svg, single_definitions, symbol_html, to_png, to_svg
from .analysis import Analysis
from .tables import (
    Table,
    coefficient_words,
    granularity_table,
    interval_head,
    optimum_table,
    record_table,
)


MOST_ROWS, MOST_DROPPED = 200, 50  # largest numbers of fitted rows and left-out rows to list
STATUS = {
    FitStatus.CONVERGED: "converged",
    FitStatus.AT_BOUND: "converged on a bound",
    FitStatus.NOT_CONVERGED: "did not converge",
}
SYMBOL = Markup('<span class="symbol">{}</span>')


@np.errstate(all="ignore")  # a law can be undefined at some points, and they are checked later
def report_html(analysis: Analysis) -> str:
    """Return the HTML report of an analysis. The same analysis always has the same text."""
    fit, law = analysis.fit, analysis.fit.law
    page = _template().render(
        analysis=analysis,
        law=law,
        fit=fit,
        source=analysis.source,
        formula=_formula(law.formula, law.formula_text),
        symbols=[_variable(variable) for variable in (law.target, *law.variables)],
        estimates=_estimates(analysis),
        facts=_facts(analysis),
        tables=[_coefficients(analysis), optimum_table(analysis), granularity_table(analysis)],
        figures=_figures(analysis),
        further=[record_table(title, rows) for title, rows in analysis.tables.items() if rows],
        runs=_runs(analysis),
        dropped=fit.dropped[:MOST_DROPPED],
    )
    return single_definitions(page)


def write_report(path: str | os.PathLike[str], analysis: Analysis) -> None:
    """Write the HTML report of an analysis as a single atomic write.

    Raises:
        OSError: If the file cannot be written. An existing file stays unchanged.

    Example:
        >>> write_report("report.html", read_analysis("studies/stdlib_cpu/fit.json"))
    """
    write_whole(path, report_html(analysis))


@np.errstate(all="ignore")
def write_figures(folder: str | os.PathLike[str], analysis: Analysis) -> list[Path]:
    """Write every picture of the report as a PNG and an SVG file.

    Args:
        folder (`str` or `os.PathLike`): The folder to write to. It is created if missing.
        analysis ([`Analysis`]): The analysis to draw.

    Returns:
        `list[Path]`: The files written.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures(analysis):
        for kind, content in (("png", to_png(picture.figure)), ("svg", to_svg(picture.figure))):
            path = folder / f"{picture.name}.{kind}"
            write_whole(path, content)
            written.append(path)
    return written


@cache
def _template() -> Template:
    def load(name: str) -> str:
        return files(__package__).joinpath(name).read_text("utf-8")

    environment = Environment(
        loader=FunctionLoader(load), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": _code, "plural": plural, "significant": significant}
    return environment.get_template("report.html.j2")


def _code(words: str) -> Markup:
    """Return HTML in which `names` in backquotes are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(words))))


def _formula(tex: str, text: str) -> Markup | None:
    try:
        figure = draw_formula(tex)
    except ValueError:  # matplotlib cannot draw this LaTeX
        return None
    width, height = 96 * figure.get_size_inches()
    return inline_svg(figure, text, f'width="{width:.0f}" height="{height:.0f}"')


def _figures(analysis: Analysis) -> list[tuple[str, list[tuple[int, Picture, Markup]]]]:
    """Return the pictures by section, each with its number and its SVG."""
    shown = [
        (i, picture, inline_svg(picture.figure, f"{picture.title}. {picture.caption}"))
        for i, picture in enumerate(pictures(analysis), 1)
    ]
    return [(key, list(group)) for key, group in groupby(shown, lambda row: row[1].section)]


def _facts(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Return the facts at the top of the page, each as name, value and remark."""
    fit, columns = analysis.fit, analysis.fit.data.columns
    error = float(np.sqrt(np.mean((fit.data.loss / fit.fitted() - 1) ** 2)))
    rows = f"{len(fit.data):,} rows" if len(fit.data) != fit.data.runs else ""
    left = ", ".join(filter(None, [rows, analysis.left_out]))
    facts = [
        ("runs fitted", f"{fit.data.runs:,}", left),
        ("search", STATUS[fit.status], f"{fit.agreement:.0%} of {fit.starts} starts agree"),
        ("root mean square error", f"{100 * error:.2g}%", "of the loss, on the fitted rows"),
    ]
    if has_sizes(analysis):
        facts.append(("compute", _span(flops_of(analysis), scientific), "FLOPs per run"))
        for name, title in (("N", "parameters"), ("D", "training tokens")):
            column = analysis.source.columns.get(name, name)
            facts.append((title, _span(columns[name], count), column if column != name else ""))
    if "G" in fit.law.variable_names:
        values = ", ".join(f"{g:g}" for g in np.unique(columns["G"])[:8])
        facts.append(("granularity G", values, "exits"))
    return facts


def _span(values: np.ndarray, words: Any) -> str:
    low, high = words(float(values.min()), 2), words(float(values.max()), 2)
    return low if low == high else f"{low} – {high}"


def _estimates(analysis: Analysis) -> list[tuple[Markup, str]]:
    """Return the most important exponents, as symbols and numbers with intervals."""
    known, found = next(iter(analysis.intervals.values()), {}), []
    for name in ("gamma", "alpha", "beta"):
        if name in known:
            words = estimate(analysis.fit.values[name], known[name].low, known[name].high)
            found.append((_symbol(analysis, name), " ".join(words)))
    return found


def _variable(variable: Variable) -> tuple[Markup, str]:
    """Return the symbol of a variable, and its meaning with its unit."""
    known = variable.unit == "1" or variable.unit in variable.meaning
    unit = "" if known else f" ({variable.unit})"
    return SYMBOL.format(symbol_html(variable.symbol)), variable.meaning + unit


def _symbol(analysis: Analysis, name: str) -> Markup:
    return SYMBOL.format(symbol_html(analysis.fit.law.parameter(name).symbol))


def _coefficients(analysis: Analysis) -> Table:
    fit = analysis.fit
    label, published = next(iter(fit.law.published.items()), ("", None))
    rows = []
    for name, words, spans in coefficient_words(analysis):
        if name not in fit.free and spans and set(spans) == {MISSING}:
            tied = fit.settings.tied.get(name)
            spans[0] = f"tied to {tied}" if tied else "fixed"
        printed = [f"{published.values[name]:.6g}".replace("-", "−")] if published else []
        meaning = fit.law.parameter(name).meaning
        rows.append([_symbol(analysis, name), words, *spans, *printed, meaning])
    head = ["coefficient", "value", *interval_head(analysis)]
    head += [f"published: {label}"] if published else []
    note = f"Published values: {published.source}. {published.note}" if published else ""
    return Table("Coefficients", [*head, "meaning"], rows, note, prose=(len(head),))


def _runs(analysis: Analysis) -> Table:
    """Return the table of the fitted rows, at most `MOST_ROWS` of them."""
    data, predicted = analysis.fit.data, analysis.fit.fitted()
    names = [n for n in ("C", *analysis.fit.law.variable_names) if n in data.columns]
    words: dict[str, Any] = {"C": scientific, "N": count, "D": count}
    rows = []
    for i in range(min(len(data), MOST_ROWS)):
        measured = float(data.loss[i])
        residual = f"{100 * (measured / predicted[i] - 1):+.2f}".replace("-", "−")
        cells = [words.get(n, significant)(float(data.columns[n][i])) for n in names]
        name = data.run_names[data.run_id[i]]
        rows.append([name, *cells, f"{measured:.4f}", f"{predicted[i]:.4f}", residual])
    head = ["run", *names, analysis.fit.law.target.name, "predicted", "residual (%)"]
    note = f"The first {len(rows)} of {len(data):,} rows." if len(data) > len(rows) else ""
    return Table(f"{plural(len(data), 'fitted row')}", head, rows, note)
