"""`hf-familial sweep plan`, `run`, `status`, `retry`: IsoFLOP designs, on one machine or many."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .._wording import duration, plural
from ..paths import check_output_folder
from ._tables import table
from .app import app


if TYPE_CHECKING:
    from ..isoflop import Executor, Failure, RunState


commands = typer.Typer(
    name="sweep",
    help="IsoFLOP sweeps: every run of a design once, whatever happens in between.",
    no_args_is_help=True,
)
app.add_typer(commands)

Design = Annotated[Path, Argument(metavar="DESIGN.YAML", help="The design.")]
Out = Annotated[str | None, Option(help="Folder or URL; else outputs/sweeps/<name of the file>.")]
Retries = Annotated[int, Option(min=0, help="Times that a failed run is tried again.")]


@commands.command()
def plan(
    design: Design,
    seconds: Annotated[float, Option(min=0, help="To measure this machine; 0: not.")] = 20.0,
    workers: Annotated[int, Option(min=1, help="Runs at once, for the total time.")] = 1,
    as_json: Annotated[bool, Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """Show what would run: sizes, tokens, FLOPs, times, and what to worry about."""
    check_file(design)
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
    workers: Annotated[int | None, Option(min=1, help="Runs at once; else one a device.")] = None,
    threads: Annotated[int | None, Option(min=1, help="Of each run; else shared out.")] = None,
    retries: Retries = 2,
    save_seconds: Annotated[float, Option(min=0, help="Between checkpoints of a run.")] = 60.0,
    processes: Annotated[int, Option(min=1, help="Processes (accelerators) of a run.")] = 1,
    keep_models: Annotated[bool, Option("--keep-models", help="Keep runs/<id>/model.")] = False,
    ray: Annotated[str | None, Option(help="A Ray cluster: auto, local, ray://...")] = None,
    cpus: Annotated[int, Option(min=1, help="With Ray: processors of one run.")] = 1,
    gpus: Annotated[float, Option(min=0, help="With Ray: GPUs of one run.")] = 0.0,
) -> None:
    """Run what is left of a design; stop it as you like, it goes on where it was."""
    check_file(design)
    folder = folder_of(design, out)
    if "://" not in folder:
        check_output_folder("--out", folder)
    from ..isoflop import IsoFlopDesign, LocalExecutor, RayExecutor, Sweep, SweepDisplay

    if ray is None:
        log_dir = None if "://" in folder else f"{folder}/logs"
        executor: Executor = LocalExecutor(workers, threads, log_dir, processes)
    elif threads is None:
        executor = RayExecutor(ray, cpus=cpus, gpus=gpus, slots=workers)
    else:
        raise ValueError("`--threads` is for this machine; with `--ray` give `--cpus`.")
    checked = IsoFlopDesign.from_yaml(design)
    typer.echo("working out the runs and preparing their data", err=True)
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
    rows = f"; rows are in {folder}/runs.jsonl" if outcome.records else ""
    ended = plural(len(outcome.records), "run")
    typer.echo(f"{ended} ended ({outcome.done_now} now, {diverged} diverged){rows}")
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
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far every run is."""
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
    typer.echo(f"{plural(count, 'run')} {verb} forgiven; go on with `{go_on}`.")


def check_file(design: Path) -> None:
    """Check that a design is YAML, before torch is imported for all other checks."""
    from ..isoflop.yaml_file import read_yaml

    read_yaml(design)


def command_of(name: str, design: Path, out: str | None) -> str:
    """Word another command on the same sweep."""
    where = [] if out is None else ["--out", out]
    return shlex.join(["hf-familial", "sweep", name, str(design), *where])


def failure_line(run_id: str, failure: Failure) -> str:
    """Say which run failed, how often, and of what."""
    last = failure.message.strip().splitlines()[-1:] or [""]
    times = "once" if failure.attempts == 1 else f"{failure.attempts} times"
    return f"run {run_id} failed {times}: {last[0]}"


def folder_of(design: Path, out: str | None) -> str:
    """Return the folder of a sweep; the default goes by the design's name."""
    return out or f"outputs/sweeps/{design.stem}"


def row_of(state: RunState) -> dict[str, Any]:
    """Return the state of a run for JSON."""
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
    """Print a line for each run, then how many are in which state, then why runs failed."""
    from ..isoflop.sweep import STATES

    head = ("id", "C", "size", "G", "seed", "state", "steps", "loss")
    table("", head, map(cells_of, states), left=len(head))
    counts = {name: sum(state.state == name for state in states) for name in STATES}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    typer.echo(f"{plural(len(states), 'run')}: {told}")
    for state in states:
        if state.failure is not None:
            # not in the table, of which a long error would leave nothing
            typer.echo(failure_line(state.plan.id, state.failure))


def cells_of(state: RunState) -> tuple[str, ...]:
    """Return the line of a run, with losses of the evaluation, or of training while it runs."""
    plan, record, loss = state.plan, state.record, ""
    if record is not None and record.eval_loss_exits:
        loss = " ".join("nan" if x is None else f"{x:.4f}" for x in record.eval_loss_exits)
    elif state.loss is not None:
        loss = f"{state.loss:.3f} (training)"
    steps = f"{state.step}/{plan.steps}"
    size = f"{plan.width}x{plan.depth}"
    names = (plan.id[:8], f"{plan.budget:.3g}", size, str(plan.G), str(plan.seed))
    return (*names, state.state, steps, loss)
