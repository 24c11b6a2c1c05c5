"""Fit a scaling law to training runs, plan a run with it, and write a report.

    python examples/fit_scaling_law.py runs.jsonl --flops 1e20 --granularity 4
    python examples/fit_scaling_law.py --smoke --out outputs/scaling

RUNS is a table with one row per run: the `runs.jsonl` of training and sweeps, CSV or parquet. With
`--smoke` the runs are drawn from the law itself, with noise. Another law, and another loss:

    python examples/fit_scaling_law.py runs.jsonl --law familial_e_inside --loss eval_final

Output: the coefficients with their intervals, and the best run for the budget, as from `--smoke`:

             value             delta           profile               bca
    gamma   0.0339  [0.0319, 0.0360]  [0.0319, 0.0360]  [0.0321, 0.0358]

            N   D (tokens)  loss (nats/token)
    2.937e+09    4.845e+10              2.345

The folder `--out` then contains `fit.json` with all results and `report.html`, a page that works
offline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hf_familial.scaling import ColumnChoice, Plan, fit, get_law, load_runs, plan
from hf_familial.scaling.optima import best
from hf_familial.scaling.report import Analysis, DataSource, analyse, write_analysis, write_report
from hf_familial.scaling.report.tables import coefficient_words
from hf_familial.scripts import arguments, console, run


BUDGETS = (1e19, 1e20, 1e21)
GRANULARITIES = (1, 2, 4, 8)
POSITIONAL = {"runs": "Table with one row per run: JSON lines, CSV or parquet."}


@dataclass
class FitArguments:
    """The law, the loss, and the budget to plan for."""

    law: str = field(
        default="familial", metadata={"help": "Name of a law in docs/laws.md.", "metavar": "NAME"}
    )
    loss: str = field(
        default="mean",
        metadata={"help": "mean, final, exit0, eval_mean ... or a column.", "metavar": "NAME"},
    )
    flops: float = field(default=1e21, metadata={"help": "FLOPs of the planned run."})
    granularity: int = field(
        default=4, metadata={"help": "Number of exits of the planned run.", "metavar": "G"}
    )
    draws: int = field(
        default=1000, metadata={"help": "Bootstrap replicates. 0 means no bootstrap."}
    )
    out: Path = field(default=Path("outputs/scaling"), metadata={"help": "Folder to save to."})

    def __post_init__(self) -> None:
        """Check the values before the runs are read."""
        if self.granularity < 1:
            raise ValueError(f"`--granularity` must be 1 or more, got {self.granularity}.")
        if self.draws < 0 or not self.flops > 0:
            raise ValueError(
                "`--draws` must be 0 or more and `--flops` more than 0, got "
                f"{self.draws} and {self.flops}."
            )


def make_runs(path: Path, noise: float = 0.002, seed: int = 0) -> None:
    """Write runs on IsoFLOP curves, with losses from the law and random noise."""
    law = get_law("familial")
    truth = law.published["assumed"].values
    scatter = np.random.default_rng(seed)
    lines = []
    for flops in BUDGETS:
        middle = float(best(law, truth, flops, G=1.0)[0])
        for size in middle * np.geomspace(0.25, 4, 7):
            for exits in GRANULARITIES:
                tokens = flops / (6 * size)
                loss = float(law.predict(truth, N=size, D=tokens, G=exits))
                run = {
                    "run_id": f"made-up-{len(lines)}",
                    "N_total": round(size),
                    "D_tokens": round(tokens),
                    "C_flops": flops,
                    "G": exits,
                    "loss_mean": loss * float(np.exp(scatter.normal(0, noise))),
                    "status": "finished",
                }
                lines.append(json.dumps(run))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def smoke(folder: Path) -> dict[str, Any]:
    """Write invented runs. Return arguments for them and for a short bootstrap."""
    make_runs(folder / "runs.jsonl")
    return {"runs": str(folder / "runs.jsonl"), "draws": 100, "out": folder / "scaling"}


def show_fit(analysis: Analysis) -> None:
    """Show the coefficients with their intervals."""
    answer, out = analysis.fit, console()
    out.print(f"{answer.law.formula_text}   ({answer.status}, {answer.data.runs} runs)")
    table = Table(title="Coefficients, with 95 % intervals", title_justify="left")
    for name in ("", "value", *analysis.intervals):
        table.add_column(name, justify="right" if name else "left")
    for name, value, spans in coefficient_words(analysis):
        if name in answer.free:
            table.add_row(name, value, *spans)
    out.print(table)


def show_plan(found: Plan, args: FitArguments) -> None:
    """Show the best run for the budget."""
    out, table = console(), Table()
    out.print(f"\nBest run for {args.flops:.3g} FLOPs and G = {args.granularity}, heads included")
    for name in ("N", "D (tokens)", "loss (nats/token)"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{number.value:.4g}" for number in (found.N, found.D, found.loss)))
    out.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, fit, plan, and write the report."""
    with arguments(__doc__, [FitArguments], smoke=smoke, positional=POSITIONAL, argv=argv) as (
        args,
        table,
    ):
        out = console()
        law = get_law(args.law)
        reading = load_runs(Path(table.runs), law, ColumnChoice(loss=args.loss))
        with out.status("fitting and drawing replicates"):
            answer = fit(law, reading.data)
            analysis = analyse(answer, DataSource.of(reading), draws=args.draws)
        found = plan(answer, C=args.flops, G=args.granularity)
        show_fit(analysis)
        show_plan(found, args)
        for sentence in (*reading.notes, *analysis.warnings, *found.notes):
            out.print("-", sentence, markup=False)
        args.out.mkdir(parents=True, exist_ok=True)
        write_analysis(args.out / "fit.json", analysis)
        write_report(args.out / "report.html", analysis)
        out.print(f"Saved {args.out / 'fit.json'} and {args.out / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
