"""An IsoFLOP sweep on this machine: useful FLOPs per second, and the overhead of the sweep.

    python benchmarks/sweep.py            # all of examples/isoflop.yaml: about 10 minutes
    python benchmarks/sweep.py --quick    # under 50 seconds: one cell of the design
    python benchmarks/sweep.py --save     # also saves the result in benchmarks/results/

The design has 30 runs: G in {1, 4}, 3 budgets, 5 sizes. Two workers with one thread each share two
processors. `useful` is the FLOPs of all rows divided by the seconds of the whole sweep, with start
of the workers, data, evaluations, checkpoints and gaps. The limit is the rate of training steps
alone, times the workers. It is measured for the smallest, middle and largest model and weighted by
the FLOPs of every run. Its steps have 4,096 tokens (the design's have 512) and no trainer. `matmul`
is the rate of a float32 matrix product of 1024 x 1024 in this process.

Overhead: the same runs with `pretrain` alone in this process, with evaluations but without records,
checkpoints or events, then with the sweep's own `train`, in turn. Processor seconds, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import clock, finish

from hf_familial import FamilialForCausalLM
from hf_familial.isoflop import (
    IsoFlopDesign,
    LocalExecutor,
    RunPlan,
    RunTask,
    Sweep,
    SweepDisplay,
    calibrate_rate,
)
from hf_familial.isoflop._worker import train
from hf_familial.isoflop.arguments import prepared, run_arguments
from hf_familial.training import pretrain


DESIGN = Path(__file__).parent.parent / "examples" / "isoflop.yaml"
SIDE = 1024  # side of the matrices
WORKERS = 2
SAVE_SECONDS = 60.0  # default of `hf-familial sweep run`


def matmul_rate(seconds: float) -> float:
    """Return the FLOP/s of float32 matrix products in one thread."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    rates = []
    for _ in range(5):
        start, count = time.process_time(), 0
        while time.process_time() - start < seconds / 5:
            a @ b
            count += 1
        rates.append(2 * SIDE**3 * count / (time.process_time() - start))
    return statistics.median(rates)


def whole_sweep(design: IsoFlopDesign) -> tuple[float, float, int]:
    """Run a sweep. Return its seconds, the FLOPs of its rows and their number."""
    with tempfile.TemporaryDirectory() as folder:
        executor = LocalExecutor(WORKERS, threads=1)
        outcome = Sweep(design, folder, executor, display=SweepDisplay()).run()
    if outcome.failed:
        raise RuntimeError(f"Runs failed: {outcome.failed}")
    return outcome.seconds, sum(r.C_flops for r in outcome.records), len(outcome.records)


def bare(plan: RunPlan) -> None:
    """Train the run without a sweep."""
    with tempfile.TemporaryDirectory() as folder:
        data_args, args = run_arguments(plan, folder)
        pretrain(lambda: FamilialForCausalLM(plan.config()), args, prepared(data_args, plan))


def swept(plan: RunPlan) -> None:
    """Train the run as a worker of a sweep does."""
    with tempfile.TemporaryDirectory() as folder:
        train(RunTask(plan, folder, save_seconds=SAVE_SECONDS), lambda event: None)


def overhead(plan: RunPlan, repeats: int) -> tuple[float, float]:
    """Return median processor seconds of a run without and with a sweep, in turn."""
    now, seconds = clock(), {bare: list[float](), swept: list[float]()}
    for turn in range(repeats + 1):
        for way in (bare, swept) if turn % 2 else (swept, bare):
            start = now()
            way(plan)
            if turn:
                seconds[way].append(now() - start)
    return statistics.median(seconds[bare]), statistics.median(seconds[swept])


def small(design: IsoFlopDesign) -> IsoFlopDesign:
    """Return the design with one budget and two sizes."""
    return replace(design, budgets=(3e10,), sizes=("16x4", "32x4"))


def main() -> int:
    """Measure, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Run one cell of the design.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    design = IsoFlopDesign.from_yaml(DESIGN)
    design = small(design) if args.quick else design
    plans = design.runs()

    matmul = matmul_rate(2 if args.quick else 10)
    steps = calibrate_rate(plans, 3 if args.quick else 20)
    limit = sum(plan.flops for plan in plans) / steps.total(plans)
    seconds, flops, count = whole_sweep(design)
    # this run from the middle of the design takes some seconds
    middle = plans[0] if args.quick else plans[len(plans) // 2]
    alone, with_sweep = overhead(middle, 1 if args.quick else 4)
    metrics = {
        "runs": float(count),
        "minutes": seconds / 60,
        "total_flops": flops,
        "matmul_gflops": matmul / 1e9,
        "step_gflops": limit / 1e9,
        "useful_gflops_per_worker": flops / seconds / WORKERS / 1e9,
        "useful_over_matmul": flops / seconds / WORKERS / matmul,
        "limit_over_matmul": limit / matmul,
        "useful_over_limit": flops / seconds / WORKERS / limit,
        "bare_seconds": alone,
        "swept_seconds": with_sweep,
        "overhead": with_sweep / alone - 1,
    }
    for key, value in metrics.items():
        print(f"{key:26s} {value:12.4g}")
    targets = {"minutes": ("<=", 20.0), "overhead": ("<=", 0.02)}
    return finish("sweep", metrics, targets, args.save)


if __name__ == "__main__":
    sys.exit(main())
