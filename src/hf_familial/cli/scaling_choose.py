"""Commands of the scaling-law fitter that choose: compare laws, advise on an architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app
from .scaling_options import (
    AsJson,
    Columns,
    Delta,
    LastOfRun,
    LossChoice,
    Objective,
    RunsAre,
    Size,
    Statuses,
    Units,
    Where,
    choice_of,
    facts_of,
    fit_or_law,
    law_of,
    pairs,
)


if TYPE_CHECKING:
    from ..scaling.candidates import Candidate

# of a candidate: what is no variable of its law
TRAITS = ("stored", "active", "error")


@app.command("compare")
def compare_command(
    runs: Annotated[Path, typer.Argument(help="CSV, JSON lines, a JSON list or parquet.")],
    laws: Annotated[str, typer.Option(help="Names of laws, parted by commas.")] = (
        "familial,familial_e_inside,familial_n_only,hoffmann"
    ),
    objective: Objective = "log_huber",
    delta: Delta = 1e-3,
    size: Size = "total",
    loss: LossChoice = "mean",
    column: Columns = None,
    unit: Units = None,
    where: Where = None,
    status: Statuses = "finished",
    runs_are: RunsAre = "",
    last_of_run: LastOfRun = False,
    as_json: AsJson = False,
) -> None:
    """Fit several laws to the same runs; judge them by the runs they did not see."""
    from ..scaling.comparison import compare
    from ..scaling.report.analysis import comparison_tables
    from ..scaling.tables.load import load_runs
    from . import scaling_views as views

    forms = [law_of(name) for name in laws.split(",")]
    choice = choice_of(size, loss, column, status, unit, where, runs_are, last_of_run)
    reading = load_runs(runs, forms, choice)
    found = compare(reading.data, forms, objective, delta)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    for title, rows in comparison_tables(found).items():
        views.show_rows(title, rows)
    views.show_notes(reading.notes, "Reading")
    views.show_notes(found.notes, "Notes", style="yellow")


@app.command("advise")
def advise_command(
    candidates: Annotated[
        list[str],
        typer.Argument(
            help="A fit.json or a law for each architecture, with what is particular to it, as "
            "moe.json:S=0.9,stored=8 or family.json:branch=branch.json."
        ),
    ],
    unique_tokens: Annotated[float, typer.Option(help="Different training tokens there are.")],
    flops: Annotated[float, typer.Option(help="Compute budget, as 1e22.")],
    memory: Annotated[
        str, typer.Option(help="For the weights on each device: bytes or sizes, as 4GB,16GB.")
    ],
    inference_tokens: Annotated[
        float, typer.Option(help="Tokens to be served, on each device; the budget pays for them.")
    ] = 0.0,
    epochs: Annotated[float, typer.Option(help="How often a token may be seen.")] = 4.0,
    bytes_per_parameter: Annotated[float, typer.Option(help="2 for bfloat16.")] = 2.0,
    losses_compare: Annotated[
        bool,
        typer.Option(
            "--losses-compare",
            help="Rank laws whose runs are not known to have the same data, tokenizer and loss.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which architecture to train, how sure that is, and what would change the answer."""
    from .._wording import parse_size
    from ..scaling.advice import advise
    from . import scaling_views as views

    answer = advise(
        unique_tokens=unique_tokens,
        training_flops=flops,
        candidates=[_candidate(word) for word in candidates],
        memory=[parse_size(word) for word in memory.split(",")],
        inference_tokens=inference_tokens,
        epochs=epochs,
        bytes_per_parameter=bytes_per_parameter,
        losses_compare=losses_compare,
    )
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), allow_nan=False))
    else:
        views.show_advice(answer)


def _candidate(word: str) -> Candidate:
    """A candidate as `moe.json:S=0.9,stored=8`."""
    from ..scaling.candidates import Candidate

    source, colon, words = word.rpartition(":")
    if not colon or "=" not in words:
        source, words = word, ""
    parts = [part for part in words.split(",") if part]
    branch = [part.removeprefix("branch=") for part in parts if part.startswith("branch=")]
    others = [part for part in parts if not part.startswith("branch=")]
    given = pairs(others, float, f"{source}:S=0.9,stored=8") or {}
    return Candidate(
        name=Path(source).stem,
        source=fit_or_law(source),
        facts=facts_of(source),
        given={name: value for name, value in given.items() if name not in TRAITS},
        branch=fit_or_law(branch[0]) if branch else None,
        **{name: given[name] for name in TRAITS if name in given},  # type: ignore[arg-type]
    )
