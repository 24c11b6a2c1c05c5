"""Commands of the scaling-law fitter: fit, plan, report."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .app import app, one_of
from .scaling_options import (
    AsJson,
    Columns,
    Delta,
    LastOfRun,
    Level,
    LossChoice,
    Objective,
    RunsAre,
    Size,
    Statuses,
    Units,
    Where,
    choice_of,
    cost_words,
    facts_of,
    fit_or_law,
    head_cost,
    law_of,
    numbers,
    pairs,
    span,
    version,
)


@app.command("fit")
def fit_command(
    runs: Annotated[
        Path | None, typer.Argument(help="CSV, JSON lines, a JSON list or parquet.")
    ] = None,
    law: Annotated[str, typer.Option(help="Name of a law; `list` prints them all.")] = "familial",
    out: Annotated[Path | None, typer.Option(help="Where to write the fit, as fit.json.")] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Replicates; 0 for none.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    resample: Annotated[
        str,
        typer.Option(
            help="runs, residuals or wild.",
            callback=one_of("--resample", "runs", "residuals", "wild"),
        ),
    ] = "runs",
    workers: Annotated[int, typer.Option(min=1, help="Threads of the bootstrap.")] = 1,
    profiles: Annotated[bool, typer.Option(help="Trace the profile of each coefficient.")] = True,
    level: Level = 0.95,
    objective: Objective = "log_huber",
    delta: Delta = 1e-3,
    fix: Annotated[
        list[str] | None, typer.Option(help="Hold a coefficient, as beta=0.28; repeatable.")
    ] = None,
    tie: Annotated[
        list[str] | None, typer.Option(help="Hold two equal, as beta=alpha; repeatable.")
    ] = None,
    bound: Annotated[
        list[str] | None, typer.Option(help="Bounds in place of the law's, as gamma=0:1.")
    ] = None,
    drop_largest: Annotated[
        int, typer.Option(min=0, help="Leave out so many rows of the largest losses.")
    ] = 0,
    drop_far: Annotated[
        float,
        typer.Option(min=0, help="Leave out rows beyond so many robust standard deviations."),
    ] = 0.0,
    size: Size = "total",
    loss: LossChoice = "mean",
    column: Columns = None,
    unit: Units = None,
    where: Where = None,
    status: Statuses = "finished",
    runs_are: RunsAre = "",
    last_of_run: LastOfRun = False,
    against: Annotated[
        str | None,
        typer.Option(help="Further laws to compare with, as familial_e_inside,hoffmann."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write the page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a scaling law to training runs."""
    from . import scaling_views as views

    if law == "list":
        views.show_laws()
        return
    if runs is None:
        raise ValueError("name the file of the runs, as `hf-familial fit runs.jsonl`.")
    if drop_largest and drop_far:
        raise ValueError("use one of `--drop-largest` and `--drop-far`.")
    from ..scaling import FarResiduals, LargestLosses, fit
    from ..scaling.report import DataSource, analyse, write_analysis, write_report
    from ..scaling.report.analysis import check_place
    from ..scaling.tables.load import load_runs

    for path in filter(None, (out, report)):
        check_place(path)
    form = law_of(law)
    rivals = [law_of(name) for name in against.split(",")] if against else []
    choice = choice_of(size, loss, column, status, unit, where, runs_are, last_of_run)
    reading = load_runs(runs, (form, *rivals), choice)
    far = FarResiduals(drop_far) if drop_far else None
    answer = fit(
        form,
        reading.data,
        objective=objective,  # type: ignore[arg-type]
        delta=delta,
        fixed=pairs(fix, float, "--fix beta=0.28"),
        tied=pairs(tie, str, "--tie beta=alpha"),
        bounds=pairs(bound, span, "--bound gamma=0:1"),
        outliers=LargestLosses(drop_largest) if drop_largest else far,
    )
    analysis = analyse(
        answer,
        DataSource.of(reading),
        draws=bootstrap,
        kind=resample,  # type: ignore[arg-type]
        seed=seed,
        workers=workers,
        profiles=profiles,
        level=level,
        rivals=rivals,
        version=version(),
    )
    if out is not None:
        write_analysis(out, analysis)
    if report is not None:
        write_report(report, analysis)
    if as_json:
        typer.echo(analysis.to_json())
        return
    views.show_analysis(analysis)
    views.show_written(path for path in (out, report) if path is not None)


@app.command("plan")
def plan_command(
    fit: Annotated[
        str, typer.Argument(help="A fit.json, or the name of a law for its published values.")
    ],
    flops: Annotated[float | None, typer.Option(help="Compute budget, as 1e21.")] = None,
    granularity: Annotated[int, typer.Option(min=1, help="Number of exits, G.")] = 1,
    loss: Annotated[
        float | None, typer.Option(help="Loss to reach with the least FLOPs, instead of a budget.")
    ] = None,
    head_flops: Annotated[
        bool, typer.Option(help="Count the FLOPs of the exit heads; else C = 6ND.")
    ] = True,
    vocab: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a head; by default the runs' own, or 50304."),
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Training tokens there are.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="For the deployed weights: a number of bytes, or 2GB, 512MiB, ..."),
    ] = None,
    bytes_per_parameter: Annotated[float, typer.Option(help="2 for bfloat16.")] = 2.0,
    deployed: Annotated[
        float, typer.Option(help="Parameters of the deployed member as a share of N.")
    ] = 1.0,
    inference_tokens: Annotated[float, typer.Option(help="Tokens to be served.")] = 0.0,
    branch: Annotated[
        str | None, typer.Option(help="Fit of a branch law, for the loss of every exit.")
    ] = None,
    members: Annotated[
        str | None, typer.Option(help="Sizes of the members as shares of N, as 0.25,0.5,1.")
    ] = None,
    given: Annotated[
        list[str] | None, typer.Option("--set", help="A further variable of the law, as S=0.5.")
    ] = None,
    level: Level = 0.95,
    as_json: AsJson = False,
) -> None:
    """Plan the best run for a budget, or the least budget for a loss."""
    import math

    from .._wording import parse_size
    from ..errors import DomainWarning
    from ..scaling.planning import Limits, plan
    from . import scaling_views as views

    if (flops is None) == (loss is None):
        both = "give either `--flops` or `--loss`, not both."
        raise ValueError("give `--flops` or `--loss`." if flops is None else both)
    source, facts = fit_or_law(fit), facts_of(fit)
    cost = head_cost(facts, vocab) if head_flops else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DomainWarning)  # the plan's notes say the same
        answer = plan(
            source,
            flops,
            granularity,
            loss=loss,
            head_flops=head_flops,
            flops=cost,
            limits=Limits(
                memory=math.inf if memory is None else parse_size(memory),
                bytes_per_parameter=bytes_per_parameter,
                deployed=deployed,
                tokens=math.inf if tokens is None else tokens,
                inference_tokens=inference_tokens,
            ),
            branch=None if branch is None else fit_or_law(branch),
            members=None if members is None else numbers(members, "--members 0.25,0.5,1"),
            level=level,
            **(pairs(given, float, "--set S=0.5") or {}),
        )
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), allow_nan=False))
    else:
        views.show_plan(answer, cost_words(facts, cost))


@app.command("report")
def report_command(
    fit: Annotated[Path, typer.Argument(help="A fit.json.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the pictures as PNG and SVG.")
    ] = None,
) -> None:
    """Write a fit as one page of HTML that needs nothing else."""
    from ..scaling.report import read_analysis, write_figures, write_report
    from . import scaling_views as views

    analysis = read_analysis(fit)
    write_report(out, analysis)
    written = write_figures(figures, analysis) if figures is not None else []
    views.show_written([out, *written])
