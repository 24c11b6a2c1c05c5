"""Commands for IsoFLOP sweeps on one machine or many: plan, run, status, retry."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .._wording import duration, plural
from ..paths import check_output_folder
from ._help import Command, Group
from ._tables import table
from .app import SWEEPS, app, register_models


if TYPE_CHECKING:
    from ..isoflop import Executor, Failure, RunState


commands = typer.Typer(
    name="sweep",
    cls=Group,
    help="Train all runs of an IsoFLOP design. A stopped sweep continues where it was.",
    epilog="`hf-familial sweep COMMAND --help` explains one command.",
    no_args_is_help=True,
)
app.add_typer(commands, rich_help_panel=SWEEPS)

Design = Annotated[Path, Argument(metavar="DESIGN.YAML", help="File with the design.")]
Out = Annotated[
    str | None,
    Option(
        metavar="FOLDER",
        help="Folder or URL of the sweep. By default outputs/sweeps/NAME for NAME.yaml.",
    ),
]
Retries = Annotated[int, Option(min=0, help="Try a failed run N more times.")]
RetriesUsed = Annotated[
    int, Option(min=0, help="Value that `sweep run` uses. A run has failed after N more tries.")
]
RAY = "With Ray, on many machines"


@commands.command(cls=Command)
def plan(
    design: Design,
    seconds: Annotated[
        float, Option(min=0, help="Measure the speed of this machine for X seconds. 0 skips it.")
    ] = 20.0,
    workers: Annotated[int, Option(min=1, help="Estimate the total time for N runs at once.")] = 1,
    as_json: Annotated[bool, Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """Show the runs of a design: sizes, tokens, FLOPs, times and warnings."""
    check_file(design)
    register_models()
    from ..isoflop import IsoFlopDesign, calibrate_rate, print_runs
    from ..isoflop.arguments import check_design

    found = IsoFlopDesign.from_yaml(design)
    check_design(found)
    runs, _ = found.layout()
    if as_json:
        typer.echo(json.dumps([run.to_dict() for run in runs], indent=1))
        return
    rate = None
    if seconds and runs:
        typer.echo(f"Measuring this machine for {seconds:g} s (`--seconds 0` skips it).", err=True)
        rate = calibrate_rate(runs, seconds)
    print_runs(found, rate)
    if rate is not None and workers > 1:
        each = duration(rate.total(runs) / workers)
        typer.echo(f"{each} with {workers} runs at once, if they do not slow each other down")
    typer.echo(f"Next: `{command_of('run', design, None)}`")


@commands.command(cls=Command)
def run(
    design: Design,
    out: Out = None,
    workers: Annotated[
        int | None,
        Option(min=1, help="Runs at once. By default one for each accelerator or processor."),
    ] = None,
    threads: Annotated[
        int | None,
        Option(min=1, help="Threads of each run. By default the processors are shared equally."),
    ] = None,
    processes: Annotated[
        int, Option(min=1, help="Processes of each run, each with its own accelerator.")
    ] = 1,
    retries: Retries = 2,
    save_seconds: Annotated[
        float, Option(min=0, help="Save a checkpoint of each run every X seconds.")
    ] = 60.0,
    keep_models: Annotated[
        bool, Option("--keep-models", help="Keep the trained models in runs/ID/model.")
    ] = False,
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            rich_help_panel=RAY,
            help="Run on this Ray cluster: auto, local, HOST:PORT or ray://HOST:PORT.",
        ),
    ] = None,
    cpus: Annotated[int, Option(min=1, rich_help_panel=RAY, help="Processors of each run.")] = 1,
    gpus: Annotated[
        float,
        Option(min=0, rich_help_panel=RAY, help="GPUs of each run. 0.5 puts two runs on a GPU."),
    ] = 0.0,
) -> None:
    """Train all runs of a design that are not finished yet.

    You can stop the command at any time and start it again.
    """
    check_file(design)
    folder = folder_of(design, out)
    if "://" not in folder:
        check_output_folder("--out", folder)
    register_models()
    from ..isoflop import IsoFlopDesign, LocalExecutor, RayExecutor, Sweep, SweepDisplay

    if ray is None:
        log_dir = None if "://" in folder else f"{folder}/logs"
        executor: Executor = LocalExecutor(workers, threads, log_dir, processes)
    elif threads is None:
        executor = RayExecutor(ray, cpus=cpus, gpus=gpus, slots=workers)
    else:
        raise ValueError("`--threads` is for this machine. With `--ray`, pass `--cpus`.")
    checked = IsoFlopDesign.from_yaml(design)
    typer.echo("Preparing the runs and their data.", err=True)
    outcome = Sweep(
        checked,
        folder,
        executor,
        retries=retries,
        save_seconds=save_seconds,
        processes=processes,
        keep_models=keep_models,
        display=SweepDisplay(),
    ).run()
    diverged = sum(record.status == "diverged" for record in outcome.records)
    ended = plural(len(outcome.records), "run")
    typer.echo(f"{ended} finished ({outcome.done_now} now, {diverged} diverged).")
    for run_id, failure in outcome.failed.items():
        typer.echo(failure_line(run_id, failure), err=True)
    if outcome.failed:
        again = command_of("retry", design, out)
        typer.echo(f"Next: remove the cause, then `{again}`.", err=True)
        raise typer.Exit(1)
    if outcome.records:
        typer.echo(f"Next: `{shlex.join(['hf-familial', 'fit', f'{folder}/runs.jsonl'])}`")


@commands.command(cls=Command)
def status(
    design: Design,
    out: Out = None,
    retries: RetriesUsed = 2,
    as_json: Annotated[bool, Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show state, steps and loss of every run."""
    check_file(design)
    register_models()
    from ..isoflop import IsoFlopDesign, SweepFolder, run_states

    states = run_states(
        SweepFolder(folder_of(design, out)), IsoFlopDesign.from_yaml(design).runs(), retries
    )
    if as_json:
        typer.echo(json.dumps([row_of(state) for state in states], indent=1))
    else:
        print_states(states)


@commands.command(cls=Command)
def retry(design: Design, out: Out = None, retries: RetriesUsed = 2) -> None:
    """Reset the failed runs, so that the next `sweep run` tries them again."""
    check_file(design)
    register_models()
    from ..isoflop import IsoFlopDesign, Sweep

    count = Sweep(IsoFlopDesign.from_yaml(design), folder_of(design, out), retries=retries).retry()
    if not count:
        typer.echo("No run has failed.")
        return
    typer.echo(f"Reset {plural(count, 'failed run')}.\nNext: `{command_of('run', design, out)}`")


def check_file(design: Path) -> None:
    """Check that a design is valid YAML. All other checks first import torch."""
    from ..isoflop.yaml_file import read_yaml

    read_yaml(design)


def command_of(name: str, design: Path, out: str | None) -> str:
    """Return another command for the same sweep."""
    where = [] if out is None else ["--out", out]
    return shlex.join(["hf-familial", "sweep", name, str(design), *where])


def failure_line(run_id: str, failure: Failure) -> str:
    """Return a line about a failed run, with its attempts and its last error."""
    last = failure.message.strip().splitlines()[-1:] or [""]
    times = "once" if failure.attempts == 1 else f"{failure.attempts} times"
    return f"run {run_id} failed {times}: {last[0]}"


def folder_of(design: Path, out: str | None) -> str:
    """Return the folder of a sweep, by default named after the design."""
    return out or f"outputs/sweeps/{design.stem}"


def row_of(state: RunState) -> dict[str, Any]:
    """Return the state of a run as JSON fields."""
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
    """Print one line per run, then the number of runs in each state, then the errors."""
    from ..isoflop.sweep import STATES

    head = ("id", "C", "size", "G", "seed", "state", "steps", "loss")
    table("", head, map(cells_of, states), left=len(head))
    counts = {name: sum(state.state == name for state in states) for name in STATES}
    totals = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    typer.echo(f"{plural(len(states), 'run')}: {totals}")
    for state in states:
        if state.failure is not None:
            # a long error would not fit into the table
            typer.echo(failure_line(state.plan.id, state.failure))


def cells_of(state: RunState) -> tuple[str, ...]:
    """Return the cells of a run. Its loss is the training loss until it is evaluated."""
    plan, record, loss = state.plan, state.record, ""
    if record is not None and record.eval_loss_exits:
        loss = " ".join("nan" if x is None else f"{x:.4f}" for x in record.eval_loss_exits)
    elif state.loss is not None:
        loss = f"{state.loss:.3f} (training)"
    steps = f"{state.step}/{plan.steps}"
    size = f"{plan.width}x{plan.depth}"
    names = (plan.id[:8], f"{plan.budget:.3g}", size, str(plan.G), str(plan.seed))
    return (*names, state.state, steps, loss)
