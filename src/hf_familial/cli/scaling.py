"""Commands that fit scaling laws: fit, compare, report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from .._files import check_file_place
from ._help import ADVANCED, Command
from ._options import (
    AsJson,
    Columns,
    Delta,
    LastOfRun,
    Level,
    LossChoice,
    Objective,
    Resample,
    Runs,
    RunsAre,
    RunsOrNone,
    Size,
    Statuses,
    Units,
    Where,
    choice_of,
    law_of,
    pairs,
    span,
)
from ._tables import bold, notes, saved, table
from .app import LAWS, app


if TYPE_CHECKING:
    from ..scaling.report import Analysis


FAMILIES = {
    "familial": "Familial models",
    "dense": "Dense models",
    "sparse": "Sparse models and mixtures of experts",
    "rule": "Rules for settings",
}


@app.command(cls=Command, rich_help_panel=LAWS)
def fit(
    runs: RunsOrNone = None,
    law: Annotated[
        str, Option(metavar="NAME", help="Law to fit. `--law list` prints all names.")
    ] = "familial",
    loss: LossChoice = "mean",
    size: Size = "total",
    out: Annotated[
        Path | None, Option(help="Save the fit to this file, for `plan`, `advise` and `report`.")
    ] = None,
    report: Annotated[
        Path | None, Option(help="Also save an HTML page with tables and figures.")
    ] = None,
    against: Annotated[
        str | None,
        Option(metavar="NAMES", help="Compare with other laws, for example hoffmann,kaplan."),
    ] = None,
    bootstrap: Annotated[
        int, Option(min=0, help="Number of bootstrap replicates. 0 means no bootstrap.")
    ] = 0,
    as_json: AsJson = False,
    where: Where = None,
    column: Columns = None,
    unit: Units = None,
    status: Statuses = "finished",
    runs_are: RunsAre = "",
    last_of_run: LastOfRun = False,
    drop_largest: Annotated[
        int,
        Option(min=0, rich_help_panel=ADVANCED, help="Drop the N rows with the largest losses."),
    ] = 0,
    drop_far: Annotated[
        float,
        Option(
            min=0,
            rich_help_panel=ADVANCED,
            help="Drop rows more than X standard deviations from the fit. 0 keeps all.",
        ),
    ] = 0.0,
    fix: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=X",
            rich_help_panel=ADVANCED,
            help="Fix a coefficient, for example beta=0.28.",
        ),
    ] = None,
    tie: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=NAME",
            rich_help_panel=ADVANCED,
            help="Make two coefficients equal, for example beta=alpha.",
        ),
    ] = None,
    bound: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=LOW:HIGH",
            rich_help_panel=ADVANCED,
            help="Keep a coefficient in an interval, for example gamma=0:1.",
        ),
    ] = None,
    objective: Objective = "log_huber",
    delta: Delta = 1e-3,
    level: Level = 0.95,
    profiles: Annotated[
        bool,
        Option(rich_help_panel=ADVANCED, help="Trace the profile likelihood of each coefficient."),
    ] = True,
    resample: Resample = "runs",
    seed: Annotated[int, Option(rich_help_panel=ADVANCED, help="Seed of the bootstrap.")] = 0,
    workers: Annotated[
        int, Option(min=1, rich_help_panel=ADVANCED, help="Number of bootstrap threads.")
    ] = 1,
) -> None:
    """Fit a scaling law to training runs."""
    if law == "list":
        _show_laws()
        return
    if runs is None:
        raise ValueError("RUNS is missing. Example: `hf-familial fit runs.jsonl`.")
    if drop_largest and drop_far:
        raise ValueError("Use `--drop-largest` or `--drop-far`, not both.")
    from .. import __version__
    from ..scaling import FarResiduals, LargestLosses, fit, load_runs
    from ..scaling.report import DataSource, analyse, write_analysis, write_report

    for path in filter(None, (out, report)):
        check_file_place(path)
    form = law_of(law)
    rivals = [law_of(name) for name in against.split(",")] if against else []
    choice = choice_of(size, loss, column, status, unit, where, runs_are, last_of_run)
    loaded = load_runs(runs, (form, *rivals), choice)
    far = FarResiduals(drop_far) if drop_far else None
    answer = fit(
        form,
        loaded.data,
        objective=objective,  # type: ignore[arg-type]
        delta=delta,
        fixed=pairs(fix, float, "--fix", "beta=0.28"),
        tied=pairs(tie, str, "--tie", "beta=alpha"),
        bounds=pairs(bound, span, "--bound", "gamma=0:1"),
        outliers=LargestLosses(drop_largest) if drop_largest else far,
    )
    analysis = analyse(
        answer,
        DataSource.of(loaded),
        draws=bootstrap,
        kind=resample,  # type: ignore[arg-type]
        seed=seed,
        workers=workers,
        profiles=profiles,
        level=level,
        rivals=rivals,
        version=__version__,
    )
    if out is not None:
        write_analysis(out, analysis)
    if report is not None:
        write_report(report, analysis)
    if as_json:
        typer.echo(analysis.to_json())
        return
    _show_analysis(analysis)
    saved(path for path in (out, report) if path is not None)
    if out is not None:
        typer.echo(f"Next: `hf-familial plan {shlex.quote(str(out))} --flops 1e21`")


@app.command(cls=Command, rich_help_panel=LAWS)
def compare(
    runs: Runs,
    laws: Annotated[str, Option(metavar="NAMES", help="Laws to fit, separated by commas.")] = (
        "familial,familial_e_inside,familial_n_only,hoffmann"
    ),
    loss: LossChoice = "mean",
    size: Size = "total",
    as_json: AsJson = False,
    where: Where = None,
    column: Columns = None,
    unit: Units = None,
    status: Statuses = "finished",
    runs_are: RunsAre = "",
    last_of_run: LastOfRun = False,
    objective: Objective = "log_huber",
    delta: Delta = 1e-3,
) -> None:
    """Fit several laws and compare their errors on held-out runs."""
    from ..scaling import compare, load_runs
    from ..scaling.report.analysis import comparison_tables
    from ..scaling.report.tables import record_table

    forms = [law_of(name) for name in laws.split(",")]
    choice = choice_of(size, loss, column, status, unit, where, runs_are, last_of_run)
    loaded = load_runs(runs, forms, choice)
    found = compare(loaded.data, forms, objective, delta)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    for title, rows in comparison_tables(found).items():
        if rows:
            shown = record_table(title, rows)
            table(title, shown.head, shown.rows)
    notes("Data", loaded.notes)
    notes("Notes", found.notes, "yellow")


@app.command(cls=Command, rich_help_panel=LAWS)
def report(
    fit: Annotated[Path, Argument(metavar="FIT", help="A fit.json that `fit --out` saved.")],
    out: Annotated[Path, Option(help="Save the page to this file.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="Also save the figures in this folder, as PNG and SVG."),
    ] = None,
) -> None:
    """Save a fit as one HTML page that works offline."""
    from ..scaling.report import read_analysis, write_figures, write_report

    analysis = read_analysis(fit)
    check_file_place(out)
    write_report(out, analysis)
    saved([out, *(write_figures(figures, analysis) if figures is not None else [])])


def _show_laws() -> None:
    """Print the name, formula and source of every law."""
    from ..scaling import LAWS

    for family, title in FAMILIES.items():
        laws = [law for law in LAWS.values() if law.family == family]
        if laws:
            bold(f"\n{title}")
        for law in laws:
            typer.echo(f"  {law.name}  {law.title}\n      {law.formula_text}")
            typer.echo(f"      variables {', '.join(law.variable_names)}; source: {law.source}")


def _show_analysis(analysis: Analysis) -> None:
    """Print the coefficients and optima of a fit, then notes on its data and warnings."""
    from ..scaling.report.tables import coefficient_words, interval_head, optimum_table

    fit, source = analysis.fit, analysis.source
    left = f", {analysis.left_out}" if analysis.left_out else ""
    bold(fit.law.title)
    typer.echo(
        f"{fit.law.formula_text}\nData: {len(fit.data)} rows of {fit.data.runs} runs{left}.\n"
        f"Search: {str(fit.status).replace('_', ' ')}, {fit.agreement:.0%} of {fit.starts} starts "
        f"agree, objective {fit.objective:.6g}.\n"
    )
    rows = []
    for name, words, spans in coefficient_words(analysis):
        state = "" if name in fit.free else "tied" if name in fit.settings.tied else "fixed"
        rows.append([name, words, *spans, state])
    table("", ["", "value", *interval_head(analysis), ""], rows)
    best = optimum_table(analysis)
    if best is not None:
        kept = [i for i, name in enumerate(best.head) if "interval" not in name]  # 80 columns
        rows = [[row[i] for i in kept] for row in best.rows]
        table(best.title, [best.head[i] for i in kept], rows)
        typer.echo(best.note.replace(", delta-method intervals", ""))
    columns = ", ".join(f"{name} = {column}" for name, column in source.columns.items())
    facts = [f"Columns: {columns}."] if columns else []
    facts += [f"Runs: {source.facts.words}."] if source.facts.words else []
    notes("Data", [*facts, *source.notes])
    notes("Warnings", analysis.warnings, "yellow")
