"""Commands of the scaling-law fitter: fit, compare, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from .._files import check_file_place
from ._options import (
    AsJson,
    Columns,
    Delta,
    LastOfRun,
    Level,
    LossChoice,
    Objective,
    Resample,
    RunsAre,
    Size,
    Statuses,
    Units,
    Where,
    choice_of,
    law_of,
    pairs,
    span,
)
from ._tables import bold, notes, table, written
from .app import app


if TYPE_CHECKING:
    from ..scaling.report import Analysis


RUNS = "CSV, JSON lines, a JSON list or parquet."
FAMILIES = {
    "familial": "Familial models",
    "dense": "Dense models",
    "sparse": "Sparse models and mixtures of experts",
    "rule": "Rules for settings",
}


@app.command()
def fit(
    runs: Annotated[Path | None, Argument(help=RUNS)] = None,
    law: Annotated[str, Option(help="A law; `list` prints them all.")] = "familial",
    loss: LossChoice = "mean",
    size: Size = "total",
    out: Annotated[Path | None, Option(help="Write the fit, as fit.json.")] = None,
    report: Annotated[Path | None, Option(help="Also write the page.")] = None,
    against: Annotated[str | None, Option(help="Laws to compare with, as hoffmann,kaplan.")] = None,
    as_json: AsJson = False,
    column: Columns = None,
    unit: Units = None,
    where: Where = None,
    status: Statuses = "finished",
    runs_are: RunsAre = "",
    last_of_run: LastOfRun = False,
    drop_largest: Annotated[int, Option(min=0, help="Drop so many rows of most loss.")] = 0,
    drop_far: Annotated[float, Option(min=0, help="Drop rows beyond so many deviations.")] = 0.0,
    fix: Annotated[list[str] | None, Option(help="Fix as beta=0.28.")] = None,
    tie: Annotated[list[str] | None, Option(help="Tie as beta=alpha.")] = None,
    bound: Annotated[list[str] | None, Option(help="Bound as gamma=0:1.")] = None,
    objective: Objective = "log_huber",
    delta: Delta = 1e-3,
    level: Level = 0.95,
    profiles: Annotated[bool, Option(help="Trace the profile of each coefficient.")] = True,
    bootstrap: Annotated[int, Option(min=0, help="Replicates; 0 for none.")] = 0,
    resample: Resample = "runs",
    seed: Annotated[int, Option(help="Seed of the bootstrap.")] = 0,
    workers: Annotated[int, Option(min=1, help="Threads of the bootstrap.")] = 1,
) -> None:
    """Fit a scaling law to training runs."""
    if law == "list":
        _show_laws()
        return
    if runs is None:
        raise ValueError("name the file of the runs, as `hf-familial fit runs.jsonl`.")
    if drop_largest and drop_far:
        raise ValueError("use one of `--drop-largest` and `--drop-far`.")
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
        fixed=pairs(fix, float, "--fix beta=0.28"),
        tied=pairs(tie, str, "--tie beta=alpha"),
        bounds=pairs(bound, span, "--bound gamma=0:1"),
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
    written(path for path in (out, report) if path is not None)


@app.command()
def compare(
    runs: Annotated[Path, Argument(help=RUNS)],
    laws: Annotated[str, Option(help="Names of laws, parted by commas.")] = (
        "familial,familial_e_inside,familial_n_only,hoffmann"
    ),
    loss: LossChoice = "mean",
    size: Size = "total",
    as_json: AsJson = False,
    column: Columns = None,
    unit: Units = None,
    where: Where = None,
    status: Statuses = "finished",
    runs_are: RunsAre = "",
    last_of_run: LastOfRun = False,
    objective: Objective = "log_huber",
    delta: Delta = 1e-3,
) -> None:
    """Fit several laws to the same runs; judge them by the runs they did not see."""
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
    notes("Reading", loaded.notes)
    notes("Notes", found.notes, "yellow")


@app.command()
def report(
    fit: Annotated[Path, Argument(help="A fit.json.")],
    out: Annotated[Path, Option(help="The page.")] = Path("report.html"),
    figures: Annotated[Path | None, Option(help="Folder for PNG and SVG pictures.")] = None,
) -> None:
    """Write a fit as one page of HTML that needs nothing else."""
    from ..scaling.report import read_analysis, write_figures, write_report

    analysis = read_analysis(fit)
    check_file_place(out)
    write_report(out, analysis)
    written([out, *(write_figures(figures, analysis) if figures is not None else [])])


def _show_laws() -> None:
    """Print every law: name, formula, source."""
    from ..scaling import LAWS

    for family, title in FAMILIES.items():
        laws = [law for law in LAWS.values() if law.family == family]
        if laws:
            bold(f"\n{title}")
        for law in laws:
            typer.echo(f"  {law.name}  {law.title}\n      {law.formula_text}")
            typer.echo(f"      reads {', '.join(law.variable_names)}; {law.source}")


def _show_analysis(analysis: Analysis) -> None:
    """Print a fit: coefficients, optima, what was left out, warnings."""
    from ..scaling.report.tables import coefficient_words, interval_head, optimum_table

    fit, source = analysis.fit, analysis.source
    left = f", {analysis.left_out}" if analysis.left_out else ""
    bold(fit.law.title)
    typer.echo(
        f"{fit.law.formula_text}\n{len(fit.data)} rows of {fit.data.runs} runs{left}; "
        f"{str(fit.status).replace('_', ' ')}, {fit.agreement:.0%} of {fit.starts} starts agree; "
        f"objective {fit.objective:.6g}\n"
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
    told = [f"Columns: {columns}."] if columns else []
    told += [f"Runs: {source.facts.words}."] if source.facts.words else []
    notes("Reading", [*told, *source.notes])
    notes("Warnings", analysis.warnings, "yellow")
