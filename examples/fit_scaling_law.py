"""Fit the scaling law of familial models, plan a run with it, and write a report.

    python examples/fit_scaling_law.py runs.jsonl          # runs of isoflop or of pretrain
    python examples/fit_scaling_law.py                     # made-up runs, to see it work

Writes `fit.json`, which holds everything, and `report.html`, one page that needs nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from hf_familial.scaling import fit, get_law
from hf_familial.scaling.columns import Choice, read_runs
from hf_familial.scaling.examine import examine
from hf_familial.scaling.optimum import best
from hf_familial.scaling.plan import plan
from hf_familial.scaling.report import write_report
from hf_familial.scaling.study import Origin, write_study
from hf_familial.scaling.wording import count, estimate, significant


BUDGETS = (1e19, 1e20, 1e21)
GRANULARITIES = (1, 2, 4, 8)


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


def main() -> None:
    """Read, fit, examine, plan, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="?", type=Path, help="runs.jsonl, CSV or parquet")
    parser.add_argument("--law", default="familial")
    parser.add_argument("--loss", default="mean", help="mean, final, exit0, eval_mean, ...")
    parser.add_argument("--draws", type=int, default=1000, help="replicates of the bootstrap")
    parser.add_argument("--flops", type=float, default=1e21, help="budget to plan for")
    parser.add_argument("--granularity", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("outputs/scaling"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = args.runs or args.out / "runs.jsonl"
    if args.runs is None:
        make_runs(runs)

    law = get_law(args.law)
    reading = read_runs(runs, law, Choice(loss=args.loss))
    answer = fit(law, reading.data)
    study = examine(answer, Origin.of(reading), draws=args.draws)
    print(f"{law.formula_text}   ({answer.status}, {answer.data.runs} runs)")
    for name in answer.free:
        interval = study.intervals["delta"][name]
        print(f"  {name:8}", *estimate(answer.values[name], interval.low, interval.high))
    for sentence in (*reading.notes, *study.warnings):
        print("-", sentence)

    run = plan(answer, C=args.flops, G=args.granularity)
    print(f"\nBest for {args.flops:.3g} FLOPs and G = {args.granularity}, heads counted:")
    print(f"  N = {count(run.N.value)}, D = {count(run.D.value)} tokens,", end=" ")
    print(f"loss = {significant(run.loss.value)} nats/token")

    for sentence in run.notes:
        print("-", sentence)

    write_study(args.out / "fit.json", study)
    write_report(args.out / "report.html", study)
    print(f"\nwrote {args.out / 'fit.json'} and {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
