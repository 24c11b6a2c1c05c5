"""A design before it runs: its expected optima and duration, and a table of its runs."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .._wording import duration
from ..flops import training_flops_per_token
from ..models.familial import FamilialConfig, FamilialForCausalLM
from ..training.data import DataArguments
from ..training.data.corpus import find_files, stdlib_files
from .arguments import data_source
from .design import IsoFlopDesign
from .plan import RunPlan
from .rules import ExpectedLaw, StepLaw


# bytes of text for a byte of a compressed file, about
COMPRESSED = {".gz": 4.0, ".parquet": 2.5}

# tokens of a timed step: enough to be like a long step, few enough for many steps
STEP_TOKENS = 4096
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2048}
SMALL_LENGTH = 256

# columns that a narrow terminal leaves out, in this order; the others always stay
LEAST = ("FLOPs", "6ND", "seed", "lr", "batch", "D/N", "exits", "passes", "D", "time", "C")


@dataclass(frozen=True)
class BudgetCheck:
    """A check of one budget: does its curve of constant FLOPs bracket the expected optimum?"""

    budget: float  # FLOPs
    G: int
    sizes: tuple[int, ...]  # N of its runs, rising
    best: int  # N of the run whose loss is expected to be lowest, at its true cost
    brackets: bool  # whether that is neither the smallest nor the largest of three or more

    @property
    def advice(self) -> str:
        """Sizes to add, if the expected optimum is not inside."""
        if self.brackets:
            return "brackets its expected optimum"
        if len(self.sizes) < 3:
            return "needs three sizes or more"
        return f"add sizes {'below' if self.best == self.sizes[0] else 'above'} {self.best:,}"


def check_budgets(runs: Iterable[RunPlan], law: ExpectedLaw) -> tuple[BudgetCheck, ...]:
    """Find where every curve of constant FLOPs is expected to be lowest, by budget and G.

    The law is evaluated at N and D of the runs, whose FLOPs count every head, not at `C = 6ND`.
    """
    curves: dict[tuple[float, int], dict[int, int]] = {}
    for run in runs:
        curves.setdefault((run.budget, run.G), {})[run.N] = run.tokens
    found = []
    for (budget, G), curve in sorted(curves.items()):
        sizes = tuple(sorted(curve))
        best = min(sizes, key=lambda N: law.reducible(N, curve[N]))
        inside = best not in (sizes[0], sizes[-1])
        found.append(BudgetCheck(budget, G, sizes, best, inside))
    return tuple(found)


def expected_tokens(design: IsoFlopDesign) -> float | None:
    """Return the tokens of one pass over a design's data: given, or estimated from sizes of files.

    `None` for data that cannot be found here, or that are on the Hub.
    """
    if design.data_tokens:
        return float(design.data_tokens)
    bounds = ("max_train_bytes", "eval_fraction")
    given = {name: design.training[name] for name in bounds if name in design.training}
    try:
        size = _text_bytes(DataArguments(**given, **data_source(design.data)))
    except (OSError, TypeError, ValueError):
        return None
    # of a byte-level vocabulary: 2 bytes a token at 512, 3.1 at 4,096, 4.4 at 50,000
    per_token = max(1.0, 0.35 * math.log2(design.vocab_size) - 1.1)
    return None if size is None else size / per_token


def _text_bytes(args: DataArguments) -> float | None:
    """Estimate the bytes of text to train on from the sizes of files."""
    found: float | None = None
    if args.train_files:
        found = sum(
            path.stat().st_size * COMPRESSED.get(path.suffix.lower(), 1.0)
            for path in find_files(args.train_files)
        )
    elif args.dataset_name is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = sum(path.stat().st_size for path in stdlib_files(root))
    if found is not None and args.eval_files is None:
        found *= 1 - args.eval_fraction
    bounds = [bound for bound in (found, args.max_train_bytes) if bound is not None]
    return min(bounds, default=None)


@dataclass(frozen=True)
class MachineRate:
    """The speed of training on one machine, by the cost of a token.

    Small models are slower. Between the measured points the rate is a straight line in logarithms,
    beyond them it is constant.
    """

    points: tuple[tuple[float, float], ...]  # FLOPs per token and FLOP/s, rising
    seconds: float  # that were measured
    machine: str  # device and number of threads

    def at(self, flops_per_token: float) -> float:
        """Return the FLOP/s of training a model of this cost."""
        costs, rates = np.log(np.array(self.points)).T
        return float(np.exp(np.interp(np.log(flops_per_token), costs, rates)))

    def seconds_for(self, run: RunPlan) -> float:
        """Return the seconds of a run, without its evaluations."""
        return run.flops / self.at(run.flops_per_token)

    def total(self, runs: Iterable[RunPlan]) -> float:
        """Return the seconds of runs one after another."""
        return sum(map(self.seconds_for, runs))


def calibrate_rate(runs: Sequence[RunPlan] = (), seconds: float = 20.0) -> MachineRate:
    """Measure this machine by training steps: forward, backward, AdamW.

    The smallest, the middle and the largest model of a design share the time. Without runs, a small
    Llama has it all. Every model makes at least one timed step on random tokens, on the accelerator
    if there is one. The random state stays as it was.

    Args:
        runs (`Sequence[RunPlan]`, *optional*): Runs of the design.
        seconds (`float`, *optional*, defaults to 20): Seconds of timed steps, about.

    Raises:
        ValueError: If `seconds` is not positive.

    Example:
        >>> print_runs(design, calibrate_rate(design.runs()))
    """
    if not seconds > 0:
        raise ValueError(f"`seconds` must be positive, got {seconds}.")
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    models = _models_to_time(runs)
    points, measured = {}, 0.0
    for config, length in models:
        cost = training_flops_per_token(config, length).per_token
        tokens, took = _time_training(config, length, device, seconds / len(models))
        points[cost] = cost * tokens / took
        measured += took
    machine = f"{device.type}, {torch.get_num_threads()} threads"
    return MachineRate(tuple(sorted(points.items())), measured, machine)


def _models_to_time(runs: Sequence[RunPlan]) -> list[tuple[FamilialConfig, int]]:
    if not runs:
        small = {"model_type": "llama", "intermediate_size": 384} | SMALL
        return [(FamilialConfig(text_config=small, exits=[4]), SMALL_LENGTH)]
    by_cost = {run.flops_per_token: run for run in runs}
    rising = [by_cost[cost] for cost in sorted(by_cost)]
    chosen = {0, len(rising) // 2, len(rising) - 1}
    return [(rising[i].config(), rising[i].seq_length) for i in sorted(chosen)]


def _time_training(
    config: FamilialConfig, length: int, device: torch.device, seconds: float
) -> tuple[int, float]:
    """Train for a while; return the tokens trained on and the seconds that they took."""
    batch = max(1, STEP_TOKENS // length)
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        model = FamilialForCausalLM(config).to(device).train()
        ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize()

        step()  # the first one allocates
        steps, start = 0, time.perf_counter()
        while not steps or time.perf_counter() - start < seconds:
            step()
            steps += 1
        return steps * ids.numel(), time.perf_counter() - start


def print_runs(
    design: IsoFlopDesign, rate: float | MachineRate | None = None, console: Console | None = None
) -> None:
    """Print the runs of a design, what they take together, and what to worry about.

    Args:
        design ([`IsoFlopDesign`]): The design.
        rate (`float` or [`MachineRate`], *optional*): FLOP/s of the machine, for times.
        console (`rich.console.Console`, *optional*): Standard output by default. Columns that it
            has no room for are left out and named.
    """
    console = console or Console()
    if isinstance(rate, (int, float)):
        rate = MachineRate(((1.0, float(rate)),), 0.0, "given")
    runs, infeasible = design.layout()
    data = expected_tokens(design)
    if runs:
        _print_table(console, [_cells(run, data, rate) for run in runs], design.counting)
    flops, tokens = sum(run.flops for run in runs), sum(run.tokens for run in runs)
    total = f"{len(runs)} runs, {flops:.3e} FLOPs, {tokens:.3e} tokens"
    if rate:
        total += f", {duration(rate.total(runs))} on {rate.machine}"
    console.print(total)
    for curve in check_budgets(runs, design.expected):
        colour = "green" if curve.brackets else "yellow"
        console.print(f"[{colour}]C = {curve.budget:.3g}, G = {curve.G}: {curve.advice}[/]")
    for budget in design.budgets:
        N, D = design.expected.optimum(budget)
        console.print(f"[dim]C = {budget:.3g}: by 6ND the optimum is N = {N:.3g}, D = {D:.3g}[/]")
    for line in _worries(design, runs, data):
        console.print(line)
    for point in infeasible:
        console.print(f"[red]infeasible[/] {point}", highlight=False)


def _cells(run: RunPlan, data: float | None, rate: MachineRate | None) -> dict[str, str]:
    """Return the cells of a run by the names of their columns."""
    cells = {
        "id": run.id[:8],
        "C": f"{run.budget:.3g}",
        "N": f"{run.N:,}",
        "width": str(run.width),
        "depth": str(run.depth),
        "exits": " ".join(map(str, run.exits)),
        "D": f"{run.tokens:.3g}",
        "D/N": f"{run.tokens_per_parameter:.3g}",
        "steps": f"{run.steps:,}",
        "batch": f"{run.batch_tokens:,}",
        "lr": f"{run.lr:.2e}",
        "seed": str(run.seed),
        "FLOPs": f"{run.flops:.4g}" + ("" if run.exact else "~"),
        "6ND": f"{run.six_nd_error:+.0%}",
    }
    if data:
        passes = run.tokens / data
        cells["passes"] = f"[yellow]{passes:.2f}[/]" if passes > 1 else f"{passes:.2f}"
    if rate:
        cells["time"] = duration(rate.seconds_for(run))
    return cells


def _print_table(console: Console, rows: list[dict[str, str]], counting: str) -> None:
    """Print a table that fits the console, with as many columns as there is room for."""
    counted = counting.replace("_", " ")
    titles = {"N": f"N: {counted} parameters", "6ND": "6ND: its error against the FLOPs counted"}

    def table_of(columns: list[str], **look: Any) -> Table:
        table = Table(title="; ".join(titles[n] for n in titles if n in columns), **look)
        for name in columns:
            left = name in ("id", "exits")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[name] for name in columns))
        return table

    def fits(table: Table) -> bool:
        wide = console.options.update(width=10_000)
        return Measurement.get(console, wide, table).maximum <= console.width

    table = table_of([*rows[0]])
    if fits(table):
        console.print(table)
        return
    # a shape becomes one column, and a value that all rows share becomes a line below
    same = [n for n in ("lr", "batch", "seed") if len({row[n] for row in rows}) == 1]
    first = dict.fromkeys(("id", "C", "N"), "")
    shapes = [
        {"size": f"{r['width']}x{r['depth']}", "G": str(len(r["exits"].split()))} for r in rows
    ]
    rows = [first | shape | row for shape, row in zip(shapes, rows, strict=True)]
    hidden, left_out = {"width", "depth", "G", *same}, list[str]()
    for name in (None, *(name for name in LEAST if name in rows[0] and name not in same)):
        if name is not None:
            left_out.append(name)
        if name == "exits":
            hidden.discard("G")
        columns = [n for n in rows[0] if n not in hidden and n not in left_out]
        table = table_of(columns, box=None, pad_edge=False, title_justify="left")
        if fits(table):
            break
    console.print(table)
    if same:
        console.print("all runs: " + ", ".join(f"{name} {rows[0][name]}" for name in same))
    if left_out:
        console.print(f"[dim]no room for {', '.join(left_out)}: see a wider terminal or --json[/]")


def _worries(design: IsoFlopDesign, runs: tuple[RunPlan, ...], data: float | None) -> Iterable[str]:
    about = "" if design.data_tokens else "about "
    repeated = [run.tokens for run in runs if data and run.tokens > data]
    if data and repeated:
        times = f"{about}{max(repeated) / data:.1f} times"
        yield f"[yellow]{len(repeated)} runs see their data more than once, up to {times}[/]"
    if data and about:
        yield (
            f"[dim]one pass over the data is about {data:.2g} tokens, by the size of the files; "
            "`data_tokens` would say it exactly[/]"
        )
    if not data:
        yield "[dim]`data_tokens` is not given: repeated data cannot be seen[/]"
    least = StepLaw.smallest
    small = sum(run.sizes.non_embedding < least for run in runs)
    if small and isinstance(design.rule, StepLaw):
        yield (
            f"[yellow]{small} runs are smaller than what Step Law was fitted on "
            f"({least:.0e} parameters): look at their learning rates[/]"
        )
    if not all(run.exact for run in runs):
        yield "[yellow]~ FLOPs are estimated: this host cannot run without data[/]"
