"""An IsoFLOP study, from a design to a law: plan it, run it, fit what came out.

    python examples/isoflop.py examples/isoflop.yaml
    python examples/isoflop.py design.yaml --out outputs/study --workers 2
    python examples/isoflop.py --smoke

DESIGN is a YAML file: budgets, sizes, granularities; see docs/sweeps.md. Stop it as you like: the
same command goes on where it was. It leaves in `--out` what `hf-familial sweep run` leaves, first
of all `runs.jsonl`, and where there are runs enough for a law `fit.json` and `report.html`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_familial.isoflop import (
    IsoFlopDesign,
    LocalExecutor,
    Sweep,
    SweepOutcome,
    calibrate_rate,
    display_for,
)
from hf_familial.isoflop.sweep.arguments import check_design
from hf_familial.paths import check_output_folder
from hf_familial.scaling import ColumnChoice, Law, fit, get_law, load_runs
from hf_familial.scaling.report import DataSource, analyse, write_analysis, write_report
from hf_familial.scripts import arguments, console, run


POSITIONAL = {"design": "YAML file of the design."}

SMOKE = """
budgets: [4.3e+8, 8.6e+8]
sizes: [16x2, 32x2]
granularities: [1, 2]
vocab_size: 300
seq_length: 32
backbone: {head_dim: 16, multiple: 16}
rule: {kind: fixed, lr: 8.0e-3, batch_tokens: 32}
training: {max_train_bytes: 200000, max_eval_tokens: 2048}
"""


@dataclass
class StudyArguments:
    """Where to, with how many workers, and which law to fit."""

    out: str = field(
        default="outputs/isoflop", metadata={"help": "Folder of the sweep; also a URL."}
    )
    workers: int | None = field(
        default=None, metadata={"help": "Runs at once; by default one per processor or GPU."}
    )
    calibrate: float = field(
        default=20.0, metadata={"help": "Seconds of measuring the machine first; 0: none."}
    )
    law: str = field(default="familial", metadata={"help": "A law of docs/laws.md."})
    loss: str = field(default="eval_mean", metadata={"help": "eval_mean, eval_final, ..."})


def smoke(folder: Path) -> dict[str, Any]:
    """A design of eight runs of a second."""
    (folder / "design.yaml").write_text(SMOKE, encoding="utf-8")
    design, out = str(folder / "design.yaml"), str(folder / "sweep")
    return {"design": design, "out": out, "workers": 1, "calibrate": 0.0}


def show_runs(outcome: SweepOutcome) -> None:
    """What every run came to."""
    table = Table(title="Evaluation loss, nats per token", title_justify="left")
    for name in ("C", "N (no emb.)", "D", "G", "seed", "mean", "exits", "status"):
        table.add_column(name, justify="left" if name in ("exits", "status") else "right")
    for record in outcome.records:
        losses = [x for x in record.eval_loss_exits or () if x is not None]
        mean = record.eval_loss_mean
        table.add_row(
            f"{record.C_flops:.3g}",
            f"{record.N_non_embedding:,}",
            f"{record.D_tokens:,}",
            str(record.G),
            str(record.seed),
            "-" if mean is None else f"{mean:.4f}",
            " ".join(f"{loss:.3f}" for loss in losses),
            record.status,
        )
    console().print(table)


def fit_runs(folder: Path, law: Law, args: StudyArguments) -> None:
    """Fit the law and write its page; says why where the runs do not tell enough."""
    out = console()
    try:
        reading = load_runs(folder / "runs.jsonl", law, ColumnChoice(loss=args.loss))
        answer = fit(law, reading.data)
    except ValueError as error:
        out.print(f"no law yet: {error}", markup=False)
        return
    analysis = analyse(answer, DataSource.of(reading), draws=200)
    values = ", ".join(f"{name} = {value:.4g}" for name, value in answer.values.items())
    out.print(f"{answer.law.formula_text}: {values} ({answer.status})", markup=False)
    for sentence in (*reading.notes, *analysis.warnings):
        out.print("-", sentence, markup=False)
    write_analysis(folder / "fit.json", analysis)
    write_report(folder / "report.html", analysis)
    out.print(f"wrote {folder / 'fit.json'} and {folder / 'report.html'}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, run, fit."""
    with arguments(__doc__, [StudyArguments], smoke=smoke, positional=POSITIONAL, argv=argv) as (
        args,
        words,
    ):
        law = get_law(args.law)
        if "://" not in args.out:
            check_output_folder("--out", args.out)
        design = IsoFlopDesign.from_yaml(words.design)
        check_design(design)
        runs = design.runs()
        rate = None
        if args.calibrate:
            print(f"measuring this machine for about {args.calibrate:g} s", file=sys.stderr)
            rate = calibrate_rate(runs, args.calibrate)
        design.table(rate, console())
        outcome = Sweep(design, args.out, LocalExecutor(args.workers), display=display_for()).run()
        show_runs(outcome)
        console().print(f"rows are in {args.out}/runs.jsonl", soft_wrap=True)
        if "://" not in args.out:
            fit_runs(Path(args.out), law, args)
        if outcome.failed:
            raise ValueError(
                f"{len(outcome.failed)} runs failed: hf-familial sweep status says why."
            )


if __name__ == "__main__":
    run(main)
