"""Estimates for a design before it runs: expected optima, duration, and a table of its runs."""

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


# approximate bytes of text in one byte of a compressed file
COMPRESSED = {".gz": 4.0, ".parquet": 2.5}

# tokens in a timed step: as fast per token as a long step, but short enough for many steps
STEP_TOKENS = 4096
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2048}
SMALL_LENGTH = 256

# columns that are hidden in this order if the terminal is too narrow
LEAST = ("FLOPs", "6ND", "seed", "lr", "batch", "D/N", "exits", "passes", "D", "time", "C")


@dataclass(frozen=True)
class BudgetCheck:
    """A check whether the sizes of one budget and G lie on both sides of the expected optimum."""

    budget: float  # FLOPs
    G: int
    sizes: tuple[int, ...]  # N of the runs, increasing
    best: int  # N of the run with the lowest expected loss
    brackets: bool  # true if there are smaller and larger sizes than `best`

    @property
    def advice(self) -> str:
        """A sentence about the sizes to add, or that none are missing."""
        if self.brackets:
            return "has sizes on both sides of the expected optimum"
        if len(self.sizes) < 3:
            return "needs three sizes or more"
        return f"add sizes {'below' if self.best == self.sizes[0] else 'above'} {self.best:,}"


def check_budgets(runs: Iterable[RunPlan], law: ExpectedLaw) -> tuple[BudgetCheck, ...]:
    """Find the run with the lowest expected loss for each budget and G.

    The law is evaluated at N and D of the planned runs. Their FLOPs include all heads, unlike the
    approximation `C = 6ND`.

    Example:
        >>> for check in check_budgets(design.runs(), design.expected):
        ...     print(check.budget, check.G, check.advice)
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
    """Return the tokens in one pass over the data of a design.

    This is `design.data_tokens`, or an estimate from the sizes of the files. It is `None` if the
    data are on the Hub or cannot be found.
    """
    if design.data_tokens:
        return float(design.data_tokens)
    bounds = ("max_train_bytes", "eval_fraction")
    given = {name: design.training[name] for name in bounds if name in design.training}
    try:
        size = _text_bytes(DataArguments(**given, **data_source(design.data)))
    except (OSError, TypeError, ValueError):
        return None
    # a byte-level vocabulary has 2 bytes per token at 512 tokens, 3.1 at 4,096, 4.4 at 50,000
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
    """The training speed of one machine, in FLOP/s, for models of different cost.

    Small models reach fewer FLOP/s. Between the measured points, the speed is interpolated linearly
    in logarithms. Outside them, it is constant.
    """

    points: tuple[tuple[float, float], ...]  # FLOPs per token and FLOP/s, increasing
    seconds: float  # duration of the measurement
    machine: str  # device and number of threads

    def at(self, flops_per_token: float) -> float:
        """Return the FLOP/s of training a model that costs `flops_per_token`."""
        costs, rates = np.log(np.array(self.points)).T
        return float(np.exp(np.interp(np.log(flops_per_token), costs, rates)))

    def seconds_for(self, run: RunPlan) -> float:
        """Return the seconds that a run takes, without its evaluations."""
        return run.flops / self.at(run.flops_per_token)

    def total(self, runs: Iterable[RunPlan]) -> float:
        """Return the seconds that several runs take one after another."""
        return sum(map(self.seconds_for, runs))


def calibrate_rate(runs: Sequence[RunPlan] = (), seconds: float = 20.0) -> MachineRate:
    """Measure the training speed of this machine, with forward, backward and AdamW steps.

    The function times the smallest, the middle and the largest model of a design on random tokens.
    Without runs, it times a small Llama. It uses the accelerator if there is one. Each model runs
    at least one timed step. The random state does not change.

    Args:
        runs (`Sequence[RunPlan]`, *optional*): Runs of the design.
        seconds (`float`, *optional*, defaults to 20): Approximate seconds of timed steps.

    Returns:
        [`MachineRate`]

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
    """Train for about `seconds`, and return the number of tokens and the exact seconds."""
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

        step()  # not timed, because the first step allocates memory
        steps, start = 0, time.perf_counter()
        while not steps or time.perf_counter() - start < seconds:
            step()
            steps += 1
        return steps * ids.numel(), time.perf_counter() - start


def print_runs(
    design: IsoFlopDesign, rate: float | MachineRate | None = None, console: Console | None = None
) -> None:
    """Print a table of the runs of a design, their total cost, and warnings.

    Args:
        design ([`IsoFlopDesign`]): The design.
        rate (`float` or [`MachineRate`], *optional*): FLOP/s of the machine. With it, the table
            shows the time of each run.
        console (`rich.console.Console`, *optional*): Console to print to. Defaults to standard
            output. A note names the columns that do not fit.

    Example:
        >>> print_runs(design, rate=5e10)
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
        console.print(f"[dim]C = {budget:.3g}: with 6ND the optimum is N = {N:.3g}, D = {D:.3g}[/]")
    for line in _worries(design, runs, data):
        console.print(line)
    for point in infeasible:
        console.print(f"[red]infeasible[/] {point}", highlight=False)


def _cells(run: RunPlan, data: float | None, rate: MachineRate | None) -> dict[str, str]:
    """Return the cells of one row, with the column names as keys."""
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
    """Print a table with as many columns as fit the console."""
    counted = counting.replace("_", " ")
    titles = {"N": f"N: {counted} parameters", "6ND": "6ND: relative error of C = 6ND"}

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
    # put width and depth into one column, and a value that all rows share below the table
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
        console.print(f"[dim]no room for {', '.join(left_out)}: use a wider terminal or --json[/]")


def _worries(design: IsoFlopDesign, runs: tuple[RunPlan, ...], data: float | None) -> Iterable[str]:
    about = "" if design.data_tokens else "about "
    repeated = [run.tokens for run in runs if data and run.tokens > data]
    if data and repeated:
        times = f"{about}{max(repeated) / data:.1f} times"
        yield f"[yellow]{len(repeated)} runs see their data more than once, up to {times}[/]"
    if data and about:
        yield (
            f"[dim]one pass over the data is about {data:.2g} tokens, by the size of the files. "
            "Set `data_tokens` to the exact number.[/]"
        )
    if not data:
        yield "[dim]`data_tokens` is not set, so repeated data cannot be detected[/]"
    least = StepLaw.smallest
    small = sum(run.sizes.non_embedding < least for run in runs)
    if small and isinstance(design.rule, StepLaw):
        yield (
            f"[yellow]{small} runs are smaller than the models that Step Law was fitted on "
            f"({least:.0e} parameters). Check their learning rates.[/]"
        )
    if not all(run.exact for run in runs):
        yield "[yellow]~ FLOPs are estimates, because this backbone cannot run without data[/]"
