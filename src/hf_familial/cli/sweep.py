"""`hf-familial sweep plan`, `run`, `status`, `retry`: IsoFLOP designs, on one machine or many."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..paths import check_output_folder
from .app import app


if TYPE_CHECKING:
    from ..isoflop import Executor, Failure, RunState


commands = typer.Typer(
    name="sweep",
    help="IsoFLOP sweeps: every run of a design once, whatever happens in between.",
    no_args_is_help=True,
)
app.add_typer(commands)

Design = Annotated[Path, typer.Argument(metavar="DESIGN.YAML", help="The design.")]
Out = Annotated[
    str | None,
    typer.Option(
        help="Folder or URL of the sweep; by default in outputs/sweeps, by the file's name."
    ),
]
Retries = Annotated[int, typer.Option(min=0, help="Times that a failed run is tried again.")]


@commands.command()
def plan(
    design: Design,
    seconds: Annotated[
        float, typer.Option(min=0, help="Of measuring this machine; 0 leaves out the times.")
    ] = 20.0,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once, for the total time.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """What would run: sizes, tokens, FLOPs, times, and what to worry about. Nothing is trained."""
    check_file(design)
    from .._wording import duration
    from ..isoflop import IsoFlopDesign, calibrate_rate, print_runs
    from ..isoflop._arguments import check_design

    found = IsoFlopDesign.from_yaml(design)
    check_design(found)
    runs, _ = found.layout()
    if as_json:
        typer.echo(json.dumps([run.to_dict() for run in runs], indent=1))
        return
    rate = None
    if seconds and runs:
        typer.echo(f"measuring this machine for about {seconds:g} s (--seconds 0: not)", err=True)
        rate = calibrate_rate(runs, seconds)
    print_runs(found, rate)
    if rate is not None and workers > 1:
        each = duration(rate.total(runs) / workers)
        typer.echo(f"{each} with {workers} runs at once, if each is as fast as one alone")


@commands.command()
def run(
    design: Design,
    out: Out = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at once; one per accelerator or processor.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each; the processors shared out.")
    ] = None,
    retries: Retries = 2,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Between checkpoints of a run, at least.")
    ] = 60.0,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes, and so accelerators, of one run.")
    ] = 1,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep each family, in runs/<id>/model.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster: auto, local, ray://...")
    ] = None,
    cpus: Annotated[int, typer.Option(min=1, help="With Ray: processors of one run.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="With Ray: GPUs of one run.")] = 0.0,
) -> None:
    """Do what is left of a design; stop it as you like, it goes on where it was."""
    check_file(design)
    if "://" not in folder_of(design, out):
        check_output_folder("--out", folder_of(design, out))
    from ..isoflop import IsoFlopDesign, Sweep, SweepDisplay

    executor = executor_of(ray, workers, threads, cpus, gpus, processes, folder_of(design, out))
    checked = IsoFlopDesign.from_yaml(design)
    typer.echo("working out the runs and preparing their data", err=True)
    outcome = Sweep(
        checked,
        folder_of(design, out),
        executor,
        retries=retries,
        save_seconds=save_seconds,
        processes=processes,
        keep_models=keep_models,
        display=SweepDisplay(),
    ).run()
    diverged = sum(record.status == "diverged" for record in outcome.records)
    rows = f"; rows are in {folder_of(design, out)}/runs.jsonl" if outcome.records else ""
    typer.echo(
        f"{counted(len(outcome.records))} ended ({outcome.done_now} now, {diverged} diverged){rows}"
    )
    for run_id, failure in outcome.failed.items():
        typer.echo(failure_line(run_id, failure), err=True)
    if outcome.failed:
        typer.echo(f"`{command_of('retry', design, out)}` forgives them.", err=True)
        raise typer.Exit(1)


@commands.command()
def status(
    design: Design,
    out: Out = None,
    retries: Retries = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How far every run is; looks only."""
    check_file(design)
    from ..isoflop import IsoFlopDesign, SweepFolder, run_states

    states = run_states(
        SweepFolder(folder_of(design, out)), IsoFlopDesign.from_yaml(design).runs(), retries
    )
    if as_json:
        typer.echo(json.dumps([row_of(state) for state in states], indent=1))
    else:
        print_states(states)


@commands.command()
def retry(design: Design, out: Out = None, retries: Retries = 2) -> None:
    """Forgive runs that failed; the next `run` tries them again."""
    check_file(design)
    from ..isoflop import IsoFlopDesign, Sweep

    count = Sweep(IsoFlopDesign.from_yaml(design), folder_of(design, out), retries=retries).retry()
    if not count:
        typer.echo("no run had failed.")
        return
    verb = "is" if count == 1 else "are"
    go_on = command_of("run", design, out)
    typer.echo(f"{counted(count)} {verb} forgiven; go on with `{go_on}`.")


def check_file(design: Path) -> None:
    """Check that a design is YAML, before torch is imported for all other checks.

    Raises:
        ValueError: If it is not.
        OSError: If it cannot be read.
    """
    from ..isoflop._yaml import read_yaml

    read_yaml(design)


def counted(runs: int) -> str:
    """A number of runs in words."""
    return f"{runs} run" if runs == 1 else f"{runs} runs"


def command_of(name: str, design: Path, out: str | None) -> str:
    """What to type for another command on the same sweep."""
    where = [] if out is None else ["--out", out]
    return shlex.join(["hf-familial", "sweep", name, str(design), *where])


def failure_line(run_id: str, failure: Failure) -> str:
    """Which run failed, how often, and of what."""
    last = failure.message.strip().splitlines()[-1:] or [""]
    times = "once" if failure.attempts == 1 else f"{failure.attempts} times"
    return f"run {run_id} failed {times}: {last[0]}"


def folder_of(design: Path, out: str | None) -> str:
    """Where a sweep is, if nothing is said."""
    return out or f"outputs/sweeps/{design.stem}"


def executor_of(
    ray: str | None,
    workers: int | None,
    threads: int | None,
    cpus: int,
    gpus: float,
    processes: int,
    out: str,
) -> Executor:
    """Who does the runs.

    Raises:
        ValueError: If options of this machine stand beside a cluster.
        ImportError: If Ray is asked for and not there.
    """
    from ..isoflop import LocalExecutor, RayExecutor

    if ray is None:
        log_dir = None if "://" in out else f"{out}/logs"
        return LocalExecutor(workers, threads, log_dir, processes)
    if threads is not None:
        raise ValueError("`--threads` is for this machine; with `--ray` give `--cpus`.")
    return RayExecutor(ray, cpus=cpus, gpus=gpus, slots=workers)


def row_of(state: RunState) -> dict[str, Any]:
    """A run's state as JSON has it."""
    record, failure = state.record, state.failure
    return {
        "run_id": state.plan.id,
        "state": state.state,
        "step": state.step,
        "steps": state.plan.steps,
        "eval_loss_exits": None if record is None else record.eval_loss_exits,
        "error": None if failure is None else failure.message,
        "attempts": 0 if failure is None else failure.attempts,
    }


def print_states(states: tuple[RunState, ...]) -> None:
    """A line for each run, then how many are in which state, then why runs failed."""
    from rich.console import Console
    from rich.table import Table

    from ..isoflop.sweep import STATES

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("id", "C", "size", "G", "seed", "state", "steps", "loss"):
        # losses of many exits go on in the next line
        table.add_column(name, no_wrap=name != "loss")
    for state in states:
        table.add_row(*cells_of(state))
    console.print(table)
    counts = {name: sum(state.state == name for state in states) for name in STATES}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    console.print(f"{counted(len(states))}: {told}")
    for state in states:
        if state.failure is not None:
            # not in the table, of which a long error would leave nothing
            typer.echo(failure_line(state.plan.id, state.failure))


def cells_of(state: RunState) -> tuple[str, ...]:
    """A run's line: its losses are those of the evaluation, or of training while it runs."""
    plan, record, loss = state.plan, state.record, ""
    if record is not None and record.eval_loss_exits:
        loss = " ".join("nan" if x is None else f"{x:.4f}" for x in record.eval_loss_exits)
    elif state.loss is not None:
        loss = f"{state.loss:.3f} (training)"
    steps = f"{state.step}/{plan.steps}"
    size = f"{plan.width}x{plan.depth}"
    names = (plan.id[:8], f"{plan.budget:.3g}", size, str(plan.G), str(plan.seed))
    return (*names, state.state, steps, loss)
