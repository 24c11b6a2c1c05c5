"""Fit the scaling law of familial models, plan a run with it, and write a report.

    python examples/fit_scaling_law.py runs.jsonl --flops 1e20 --granularity 4
    python examples/fit_scaling_law.py runs.jsonl --law familial_e_inside --loss eval_final
    python examples/fit_scaling_law.py --smoke --out outputs/scaling

RUNS is a table with a row per run: the `runs.jsonl` that training and sweeps write, CSV or parquet.
It leaves in `--out` `fit.json`, which holds everything, and `report.html`, one page that needs
nothing else. `--smoke` fits runs that it makes up by the law itself, with noise.
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
POSITIONAL = {"runs": "Table with a row per run: JSON lines, CSV or parquet."}


@dataclass
class FitArguments:
    """Which law, of which loss, and what to plan for."""

    law: str = field(
        default="familial", metadata={"help": "A name of docs/laws.md: familial, hoffmann, ..."}
    )
    loss: str = field(
        default="mean", metadata={"help": "mean, final, exit0, eval_mean, ... or a column."}
    )
    draws: int = field(default=1000, metadata={"help": "Replicates of the bootstrap; 0: none."})
    flops: float = field(default=1e21, metadata={"help": "Budget to plan for, FLOPs."})
    granularity: int = field(default=4, metadata={"help": "Exits of the run to plan, G."})
    out: Path = field(default=Path("outputs/scaling"), metadata={"help": "Folder to write to."})

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before runs are read."""
        if self.granularity < 1:
            raise ValueError(f"`--granularity` must be 1 or more, got {self.granularity}.")
        if self.draws < 0 or not self.flops > 0:
            raise ValueError(
                "`--draws` must be 0 or more and `--flops` positive, got "
                f"{self.draws} and {self.flops}."
            )


def make_runs(path: Path, noise: float = 0.002, seed: int = 0) -> None:
    """Write runs as the law itself would have them, on IsoFLOP curves, with seed noise."""
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
    """Made-up runs, and a bootstrap that is soon done."""
    make_runs(folder / "runs.jsonl")
    return {"runs": str(folder / "runs.jsonl"), "draws": 100, "out": folder / "scaling"}


def show_fit(analysis: Analysis) -> None:
    """The coefficients, each with the intervals that could be had."""
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
    """The best run for the budget."""
    out, table = console(), Table()
    out.print(f"\nBest for {args.flops:.3g} FLOPs and G = {args.granularity}, heads counted")
    for name in ("N", "D (tokens)", "loss (nats/token)"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{number.value:.4g}" for number in (found.N, found.D, found.loss)))
    out.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, fit, examine, plan, report."""
    with arguments(__doc__, [FitArguments], smoke=smoke, positional=POSITIONAL, argv=argv) as (
        args,
        table,
    ):
        out = console()
        law = get_law(args.law)
        reading = load_runs(Path(table.runs), law, ColumnChoice(loss=args.loss))
        with out.status("fitting, and drawing replicates"):
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
        out.print(f"wrote {args.out / 'fit.json'} and {args.out / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
