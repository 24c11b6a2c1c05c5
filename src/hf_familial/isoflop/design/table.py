"""A design on the screen, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .data import expected_tokens
from .outlook import brackets
from .plans import RunPlan
from .rate import MachineRate
from .rules import StepLaw


if TYPE_CHECKING:
    from .grid import IsoFlopDesign


# what a narrow terminal has no room for goes in this order; the rest always stays
LEAST = ("FLOPs", "6ND", "seed", "lr", "batch", "D/N", "exits", "passes", "D", "time", "C")


def print_table(
    design: IsoFlopDesign, rate: float | MachineRate | None = None, console: Console | None = None
) -> None:
    """Print the runs of a design, what they take together, and what to worry about.

    Args:
        design ([`IsoFlopDesign`]): The design.
        rate (`float` or [`MachineRate`], *optional*): FLOP/s of the machine, for times.
        console (`rich.console.Console`, *optional*): Where to; columns that it has no room for are
            left out and named.
    """
    console = console or Console()
    if isinstance(rate, (int, float)):
        rate = MachineRate(((1.0, float(rate)),), 0.0, "given")
    runs, refused = design.layout()
    passes = expected_tokens(design)
    rows = [_cells(run, passes, rate) for run in runs]
    if rows:
        _print_rows(console, rows, design.counting.replace("_", " "))
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
    _warn(design, runs, passes, console)
    for refusal in refused:
        console.print(f"[red]refused[/] {refusal}", highlight=False)


def _cells(run: RunPlan, data: float | None, rate: MachineRate | None) -> dict[str, str]:
    """The cells of a run by the names of their columns."""
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
        cells["time"] = words_of_time(rate.seconds_for(run))
    return cells


def _print_rows(console: Console, rows: list[dict[str, str]], counting: str) -> None:
    """Print a table that fits: with lines if it can, else without, with what there is room for."""
    titles = {"N": f"N: {counting} parameters", "6ND": "6ND: its error against the FLOPs counted"}
    whole = _table(rows, list(rows[0]), titles)
    if _width(console, whole) <= console.width:
        console.print(whole)
        return
    # what is the same in all rows needs no column
    same = [n for n in ("lr", "batch", "seed") if len({row[n] for row in rows}) == 1]
    first = dict.fromkeys(("id", "C", "N"), "")
    shapes = [
        {"size": f"{r['width']}x{r['depth']}", "G": str(len(r["exits"].split()))} for r in rows
    ]
    rows = [first | shape | row for shape, row in zip(shapes, rows, strict=True)]
    hidden = {"width", "depth", "G", *same}
    left_out: list[str] = []
    for name in (None, *(name for name in LEAST if name in rows[0] and name not in same)):
        if name is not None:
            left_out.append(name)
        if name == "exits":
            hidden.discard("G")
        columns = [n for n in rows[0] if n not in hidden and n not in left_out]
        table = _table(rows, columns, titles, lines=False)
        if _width(console, table) <= console.width:
            break
    console.print(table)
    if same:
        console.print("all runs: " + ", ".join(f"{name} {rows[0][name]}" for name in same))
    if left_out:
        console.print(f"[dim]no room for {', '.join(left_out)}: see a wider terminal or --json[/]")


def _table(
    rows: list[dict[str, str]], columns: list[str], titles: dict[str, str], lines: bool = True
) -> Table:
    """A table of some columns."""
    title = "; ".join(words for name, words in titles.items() if name in columns)
    look: dict[str, Any] = (
        {} if lines else {"box": None, "pad_edge": False, "title_justify": "left"}
    )
    table = Table(title=title, **look)
    for name in columns:
        table.add_column(name, justify="left" if name in ("id", "exits") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _width(console: Console, table: Table) -> int:
    """Columns of a terminal that a table needs."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def _warn(
    design: IsoFlopDesign, runs: tuple[RunPlan, ...], data: float | None, console: Console
) -> None:
    about = "" if design.data_tokens else "about "
    repeated = [run for run in runs if data and run.tokens > data]
    if data and repeated:
        most = max(run.tokens for run in repeated) / data
        console.print(
            f"[yellow]{len(repeated)} runs see their data more than once, up to {about}{most:.1f} "
            "times[/]"
        )
    if data and about:
        console.print(
            f"[dim]one pass over the data is about {data:.2g} tokens, by the size of the files; "
            "`data_tokens` would say it exactly[/]"
        )
    if not data:
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
