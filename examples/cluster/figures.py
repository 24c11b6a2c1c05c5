"""Calculate time, money, checkpoints and traffic of a sweep on a cluster.

    python examples/cluster/figures.py design.yaml

Output: the two tables of examples/cluster/README.md, for the given design. All numbers follow from
the design and from `Assumptions`. Nothing is trained or measured.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_familial.isoflop import IsoFlopDesign, RunPlan
from hf_familial.runs import Backbone, RunRecord


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about the cluster.

    Attributes:
        rate: FLOP/s of one GPU in training. The data sheet of an H100 says 989e12 for dense
            bfloat16. A fifth is a guess for models of 60 to 900 million parameters. Values from
            100e12 to 300e12 are plausible.
        gpus: GPUs that train at the same time, with one run each.
        node_gpus: GPUs in one node.
        price: Dollars for one hour of one GPU.
        storage_rate: Bytes per second between one GPU and the storage.
        storage_price: Dollars for 1e9 bytes and one month.
        put_price: Dollars for 1,000 write requests.
        save_seconds: Seconds between two checkpoints of a run.
        loss_hours: Average hours until the node of a GPU is lost.
        start_seconds: Seconds from the start of a run to its first step.
    """

    rate: float = 200e12
    gpus: int = 64
    node_gpus: int = 8
    price: float = 2.50
    storage_rate: float = 1e9
    storage_price: float = 0.023
    put_price: float = 0.005
    save_seconds: float = 900.0
    loss_hours: float = 24.0
    start_seconds: float = 120.0


WEIGHT, OPTIMIZER = 4, 8  # bytes per parameter: float32 weights, two float32 means of AdamW
FILES = 24  # highest number of files in a checkpoint, without the pointer to it
LOCAL_COPIES = 3  # checkpoints of a run on its node: two, and the one being written


def checkpoint_bytes(run: RunPlan) -> int:
    """Return the bytes of weights and optimiser. The rest is less than a megabyte."""
    return (WEIGHT + OPTIMIZER) * run.sizes.total


def checkpoints(run: RunPlan, given: Assumptions) -> int:
    """Return the number of checkpoints that a run sends."""
    return int(run.flops / given.rate / given.save_seconds)


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Return the seconds until all runs end. Each starts in its turn on a free worker."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def row_bytes(run: RunPlan) -> int:
    """Return the bytes of a row in runs.jsonl, if the losses have all their digits."""
    losses = (2.345678901234567,) * run.G
    record = RunRecord(
        run_id=run.id,
        N_total=run.sizes.total,
        N_non_embedding=run.sizes.non_embedding,
        N_active=run.sizes.active,
        D_tokens=run.tokens,
        C_flops=run.flops,
        G=run.G,
        exits=run.exits,
        loss_mean=losses[0],
        loss_exits=losses,
        loss_final=losses[0],
        eval_loss_mean=losses[0],
        eval_loss_exits=losses,
        eval_loss_final=losses[0],
        seed=run.seed,
        lr=run.lr,
        batch_tokens=run.batch_tokens,
        seq_len=run.seq_length,
        vocab_size=run.backbone["vocab_size"],
        data=run.data,
        backbone=Backbone(run.model_type, run.width, run.depth),
        wall_s=12345.678901234567,
        tokens_per_s=12345.678901234567,
        code_version="0.1.0",
        status="finished",
    )
    return len(record.to_json()) + 1


def by_budget(runs: Sequence[RunPlan], given: Assumptions) -> list[str]:
    """Return the rows of a table of time and money per budget."""
    lines = ["| budget, FLOPs | runs | tokens D | hours a run | GPU-hours | dollars |"]
    lines += ["| ---: " * 6 + "|"]
    for budget in sorted({run.budget for run in runs}):
        own = [run for run in runs if run.budget == budget]
        hours = sum(run.flops for run in own) / given.rate / 3600
        few, many = min(run.tokens for run in own) / 1e9, max(run.tokens for run in own) / 1e9
        each = f"{few:.2f}e9 to {many:.1f}e9 | {hours / len(own):.1f} | {hours:,.0f}"
        lines.append(f"| {budget:.3g} | {len(own)} | {each} | {hours * given.price:,.0f} |")
    return lines


def by_topic(runs: Sequence[RunPlan], given: Assumptions) -> list[str]:
    """Return the rows of a table about the whole sweep."""
    seconds = [run.flops / given.rate for run in runs]
    hours = sum(seconds) / 3600
    sizes = [checkpoint_bytes(run) for run in runs]
    sent = [checkpoints(run, given) for run in runs]
    traffic = sum(size * count for size, count in zip(sizes, sent, strict=True))
    sending = traffic / given.storage_rate / 3600
    losses = hours / given.loss_hours
    # on average, half of the time between two checkpoints is lost
    again = losses * (given.save_seconds / 2 + given.start_seconds) / 3600
    starts = len(runs) * given.start_seconds / 3600
    mean = sum(size * s for size, s in zip(sizes, seconds, strict=True)) / sum(seconds)
    best = math.sqrt(2 * mean / given.storage_rate * given.loss_hours * 3600)
    total = hours + sending + again + starts
    rows = [row_bytes(run) for run in runs]
    rewritten = sum((len(rows) - place) * row for place, row in enumerate(rows))
    models = sum(WEIGHT * run.sizes.total for run in runs)
    slow = replace(given, rate=given.rate / 2)
    wall = makespan(seconds, given.gpus) / 3600
    longest = makespan(sorted(seconds, reverse=True), given.gpus) / 3600
    topics = {
        "runs": f"{len(runs):,}",
        "training": f"{sum(run.flops for run in runs):.3g} FLOPs, "
        f"{sum(run.tokens for run in runs) / 1e12:.2f}e12 tokens",
        f"at {given.rate:.3g} FLOP/s": f"{hours:,.0f} GPU-hours",
        f"at {slow.rate:.3g} FLOP/s": f"{2 * hours:,.0f} GPU-hours",
        f"on {given.gpus} GPUs, in the order of the design": f"{wall:.0f} hours",
        f"on {given.gpus} GPUs, most expensive first": f"{longest:.0f} hours",
        "largest D": f"{max(run.tokens for run in runs) / 1e9:.1f}e9 tokens",
        "parameters of a family": f"{min(run.sizes.total for run in runs) / 1e6:.0f}e6 to "
        f"{max(run.sizes.total for run in runs) / 1e6:.0f}e6",
        "a checkpoint": f"{min(sizes) / 1e9:.1f} to {max(sizes) / 1e9:.1f} GB, {mean / 1e9:.1f} GB "
        "on average over the time",
        "time to send one": f"{mean / given.storage_rate:.1f} s, the GPU waits",
        "best seconds between checkpoints": f"{best:.0f}",
        "checkpoints sent": f"{sum(sent):,} of {traffic / 1e12:,.0f} TB in all, "
        f"{traffic / sum(seconds) * given.gpus / 1e9:.2f} GB/s from {given.gpus} GPUs",
        f"stored at once, two for each of {given.gpus} runs": f"{2 * given.gpus * mean / 1e12:.1f} "
        f"TB on average, {2 * given.gpus * max(sizes) / 1e12:.1f} TB at most",
        f"on the local disk of a node with {given.node_gpus} GPUs": "at most "
        f"{LOCAL_COPIES * given.node_gpus * max(sizes) / 1e9:.0f} GB in $TMPDIR",
        "GPU-hours that wait for sending": f"{sending:,.0f} ({sending / hours:.2%})",
        "nodes lost": f"{losses:.0f}, {again:,.0f} repeated GPU-hours ({again / hours:.2%})",
        "GPU-hours to start runs": f"{starts:,.0f} ({starts / hours:.2%})",
        "all GPU-hours": f"{total:,.0f}, {total * given.price:,.0f} dollars",
        "price of storing checkpoints": f"{2 * given.gpus * mean / 1e9 * given.storage_price:,.0f} "
        f"dollars a month, {sum(sent) * (FILES + 1) / 1000 * given.put_price:,.2f} for requests",
        "a row of runs.jsonl": f"{min(rows)} to {max(rows)} bytes, {sum(rows) / 1e6:.2f} MB in all",
        "rewriting runs.jsonl for each row": f"{rewritten / 1e9:.2f} GB in all",
        "models, if you keep them": f"{models / 1e12:.2f} TB, "
        f"{models / 1e9 * given.storage_price:,.0f} dollars a month",
    }
    return ["| what | how much |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in topics.items())]


def main() -> None:
    """Print the tables of a design."""
    source = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("design.yaml")
    runs, given = IsoFlopDesign.from_yaml(source).runs(), Assumptions()
    print("\n".join([*by_budget(runs, given), "", *by_topic(runs, given)]))


if __name__ == "__main__":
    main()
