"""A design on the screen, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .outlook import brackets
from .plans import RunPlan
from .rate import MachineRate
from .rules import StepLaw


if TYPE_CHECKING:
    from .grid import IsoFlopDesign


COLUMNS = (
    "id",
    "C",
    "N",
    "width",
    "depth",
    "exits",
    "D",
    "D/N",
    "steps",
    "batch",
    "lr",
    "seed",
    "FLOPs",
    "6ND",
)


def print_table(
    design: IsoFlopDesign, rate: float | MachineRate | None = None, console: Console | None = None
) -> None:
    """Print the runs of a design, what they take together, and what to worry about.

    Args:
        design ([`IsoFlopDesign`]): The design.
        rate (`float` or [`MachineRate`], *optional*): FLOP/s of the machine, for times.
        console (`rich.console.Console`, *optional*): Where to.
    """
    console = console or Console()
    if isinstance(rate, (int, float)):
        rate = MachineRate(((1.0, float(rate)),), 0.0, "given")
    runs, refused = design.layout()
    table = _table(design, runs, rate)
    # a narrow terminal wraps lines; cells that end in dots would be lost
    whole = Measurement.get(console, console.options.update(width=10_000), table).maximum
    before, console.width = console.width, max(whole, console.width)
    console.print(table, no_wrap=True)
    console.width = before
    flops = sum(run.flops for run in runs)
    total = f"{len(runs)} runs, {flops:.3e} FLOPs, {sum(run.tokens for run in runs):.3e} tokens"
    if rate:
        total += f", {words_of_time(rate.total(runs))} on {rate.machine}"
    console.print(total)
    for curve in brackets(runs, design.expected):
        colour = "green" if curve.brackets else "yellow"
        console.print(f"[{colour}]C = {curve.budget:.3g}, G = {curve.G}: {curve.advice}[/]")
    for budget in design.budgets:
        N, D = design.expected.optimum(budget)
        console.print(f"[dim]C = {budget:.3g}: by 6ND the optimum is N = {N:.3g}, D = {D:.3g}[/]")
    _warn(design, runs, console)
    for refusal in refused:
        console.print(f"[red]refused[/] {refusal}", highlight=False)


def _table(design: IsoFlopDesign, runs: tuple[RunPlan, ...], rate: MachineRate | None) -> Table:
    extra = (["passes"] if design.data_tokens else []) + (["time"] if rate else [])
    counting = design.counting.replace("_", " ")
    table = Table(title=f"N: {counting} parameters; 6ND: its error against the FLOPs counted")
    for name in (*COLUMNS, *extra):
        table.add_column(name, justify="left" if name in ("id", "exits") else "right", no_wrap=True)
    for run in runs:
        cells = [
            run.id[:8],
            f"{run.budget:.3g}",
            f"{run.N:,}",
            str(run.width),
            str(run.depth),
            " ".join(map(str, run.exits)),
            f"{run.tokens:.3g}",
            f"{run.tokens_per_parameter:.3g}",
            f"{run.steps:,}",
            f"{run.batch_tokens:,}",
            f"{run.lr:.2e}",
            str(run.seed),
            f"{run.flops:.4g}" + ("" if run.exact else "~"),
            f"{run.six_nd_error:+.0%}",
        ]
        if design.data_tokens:
            passes = run.tokens / design.data_tokens
            cells.append(f"[yellow]{passes:.2f}[/]" if passes > 1 else f"{passes:.2f}")
        table.add_row(*cells, *([words_of_time(rate.seconds_for(run))] if rate else []))
    return table


def _warn(design: IsoFlopDesign, runs: tuple[RunPlan, ...], console: Console) -> None:
    repeated = [run for run in runs if design.data_tokens and run.tokens > design.data_tokens]
    if repeated:
        most = max(run.tokens for run in repeated) / (design.data_tokens or 1)
        console.print(
            f"[yellow]{len(repeated)} runs see their data more than once, up to {most:.1f} times[/]"
        )
    if not design.data_tokens:
        console.print("[dim]`data_tokens` is not given: repeated data cannot be seen[/]")
    least = StepLaw.smallest
    small = [run for run in runs if run.sizes.non_embedding < least]
    if small and isinstance(design.rule, StepLaw):
        console.print(
            f"[yellow]{len(small)} runs are smaller than what Step Law was fitted on "
            f"({least:.0e} parameters): look at their learning rates[/]"
        )
    if not all(run.exact for run in runs):
        console.print("[yellow]~ FLOPs are estimated: this host cannot run without data[/]")


def words_of_time(seconds: float) -> str:
    """Seconds in words: `45 s`, `12.5 min`, `3.2 h`, `1.5 d`."""
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
