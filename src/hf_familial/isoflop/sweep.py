"""Sweeps, which execute all runs of a design and survive interruptions."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..errors import DesignError, StoppedSweepError
from ..runs import RunRecord
from ._display import SweepDisplay
from ._folder import DATA, FAILURE, RECORD, STATE, SweepFolder
from ._messages import Failure, RunTask, WorkerEvent
from ._workspace import clear_run
from .arguments import check_design, corpus, run_arguments
from .design import IsoFlopDesign
from .executors import Executor, LocalExecutor
from .plan import RunPlan, content_id


HEARTBEAT = 5.0  # seconds between two writes of the state
POLL = 0.5  # seconds that the sweep waits for events
SILENCE = 60  # seconds without a heartbeat after which a sweep counts as dead
STATES = ("finished", "diverged", "running", "failed", "waiting")


@dataclass(frozen=True)
class RunState:
    """A run of a sweep, with its plan and its current state."""

    plan: RunPlan
    state: str  # "finished", "diverged", "running", "failed" or "waiting"
    step: int  # optimiser steps in the last checkpoint, or done so far if the run is running
    record: RunRecord | None = None  # row of runs.jsonl, if the run has ended
    failure: Failure | None = None  # failed attempts
    loss: float | None = None  # mean training loss in nats per token, if the run is running


@dataclass(frozen=True)
class SweepOutcome:
    """The results of one call of `Sweep.run`."""

    records: tuple[RunRecord, ...]  # rows of all runs that have ended, diverged runs too
    failed: dict[str, Failure]  # runs that failed too often, with their ids as keys
    done_now: int  # number of runs that ended in this call
    seconds: float  # duration of this call


@dataclass
class Sweep:
    """A sweep, which executes all runs of a design.

    It skips finished runs and resumes interrupted runs. The file runs.jsonl gets one row for each
    run that ends, with the loss of each exit on the same evaluation set. The file evaluations.jsonl
    gets the evaluations during the runs. A run has the status `diverged` if its loss is not finite,
    or if the loss at the end is at least ln(vocabulary size), as with guessing. If a run has no
    evaluation, its evaluation losses are null, and the display shows "no evaluation".

    Args:
        design ([`IsoFlopDesign`]): The design.
        folder (`str` or `os.PathLike`): Folder for rows and checkpoints, as a path or an `fsspec`
            URL such as `s3://bucket/sweep`.
        executor ([`Executor`], *optional*): Executor of the runs. Defaults to a [`LocalExecutor`]
            with `processes` accelerators per worker.
        retries (`int`, *optional*, defaults to 2): Number of times that a failed run is tried
            again. A new checkpoint resets the count.
        save_seconds (`float`, *optional*, defaults to 60): Minimum seconds between two checkpoints.
        processes (`int`, *optional*, defaults to 1): Processes that share one run.
        keep_models (`bool`, *optional*, defaults to `False`): Whether to keep the trained families,
            in `runs/<id>/model`.
        display ([`SweepDisplay`], *optional*): Display of the progress. Defaults to none.

    Example:
        >>> Sweep(IsoFlopDesign.from_yaml("design.yaml"), "sweep").run()
    """

    design: IsoFlopDesign
    folder: str | os.PathLike[str]
    executor: Executor | None = None
    retries: int = 2
    save_seconds: float = 60.0
    processes: int = 1
    keep_models: bool = False
    display: SweepDisplay | None = None

    def __post_init__(self) -> None:
        """Check the numbers among the arguments."""
        for name, least in (("retries", 0), ("save_seconds", 0), ("processes", 1)):
            value = getattr(self, name)
            if not value >= least:
                raise DesignError(f"`{name}` must be {least} or more, got {value}.", name)

    def run(self) -> SweepOutcome:
        """Execute all runs of the design that have not ended yet.

        Returns:
            [`SweepOutcome`]

        Raises:
            DesignError: If a run is impossible or its arguments are wrong. No run has started then.
            SweepLockedError: If another sweep uses the folder.
            StoppedSweepError: If all runs would fail, for example because the disk is full or the
                data are missing. Finished work is kept, and the next call continues.
            RunRecordError: If a line of runs.jsonl is wrong.
            OSError: If the folder cannot be read or written.
        """
        check_design(self.design)
        plans, folder = self.design.runs(), SweepFolder(self.folder)
        for plan in plans:
            run_arguments(plan, os.devnull, self.processes)
        start = time.monotonic()
        with folder.hold():
            folder.repair()
            current = _SweepRun(self, folder, plans)
            try:
                current.write_heartbeat()
                current.collect()
                folder.keep(self.design.to_yaml())
                if current.waiting:
                    current.go()
            finally:
                current.end()
            states = run_states(folder, plans, self.retries)
        records = tuple(state.record for state in states if state.record is not None)
        failed = {s.plan.id: s.failure for s in states if s.state == "failed" and s.failure}
        return SweepOutcome(records, failed, current.done, time.monotonic() - start)

    def retry(self) -> int:
        """Delete the failures, so that `run` tries these runs again. Return their number."""
        folder, count = SweepFolder(self.folder), 0
        with folder.hold():
            for state in run_states(folder, self.design.runs(), self.retries):
                if state.failure is not None:
                    folder.remove("runs", state.plan.id, FAILURE)
                    count += 1
        return count


class _SweepRun:
    """The state of one call of `Sweep.run`, with the waiting runs and those in progress."""

    def __init__(self, sweep: Sweep, folder: SweepFolder, plans: Sequence[RunPlan]) -> None:
        self.sweep, self.folder = sweep, folder
        self.executor = sweep.executor or LocalExecutor(processes=sweep.processes)
        self.plans = {plan.id: plan for plan in plans}
        self.running: dict[str, WorkerEvent] = {}
        self.waiting: deque[RunPlan] = deque()
        self.done, self.data_print, self._written = 0, "", -math.inf

    def collect(self) -> None:
        """Finish the work of an interrupted sweep, and queue all runs that have not ended.

        The work is to write rows and to delete the folders of runs that have ended.
        """
        rows = self.folder.rows()
        for plan in self.plans.values():
            if plan.id in rows:
                clear_run(self.folder, plan.id)
            elif (record := self.folder.record(plan.id)) is not None:
                self._add_row(plan, record)
            elif not _given_up(_read_failure(self.folder, plan.id), self.sweep.retries):
                self.waiting.append(plan)

    def go(self) -> None:
        """Execute all waiting runs."""
        executor = self.executor
        executor.start()
        self._check_data()
        if self.sweep.display:
            rows = self.folder.rows()
            ended = [plan for plan in self.plans.values() if plan.id in rows]
            self.sweep.display.begin(list(self.plans.values()), ended)
        while self.waiting or self.running:
            while self.waiting and len(self.running) < executor.slots:
                self._submit(self.waiting.popleft())
            for event in executor.poll(POLL):
                self._hear(event)
            if time.monotonic() - self._written >= HEARTBEAT:
                self.write_heartbeat()

    def end(self) -> None:
        """Close the executor and the display."""
        self.executor.close()
        if self.sweep.display:
            self.sweep.display.close()
        self.running.clear()
        self.folder.remove(STATE)

    def _check_data(self) -> None:
        """Prepare the data once for all workers, and check that they have not changed."""
        plan = self.waiting[0]
        args = run_arguments(plan, os.devnull, self.sweep.processes)[0]
        data, _, found = corpus(args)
        # the designs in one folder may use different data
        known = self.folder.read_json(DATA)
        asked = {name: value for name, value in asdict(args).items() if value is not None}
        key = content_id(asked)
        if known.get(key, {}).get("fingerprint", found) != found:
            raise StoppedSweepError(
                f"The data `{data.name}` have changed since this sweep began. Restore the old "
                f"data, or use another folder than `{self.folder.url}`."
            )
        names = ("name", "train_tokens", "eval_tokens", "eval_bytes_per_token")
        about = {name: getattr(data, name) for name in names}
        about |= {"fingerprint": found, "arguments": asked}
        self.folder.write(json.dumps(known | {key: about}, indent=1), DATA)
        self.data_print = found

    def _submit(self, plan: RunPlan) -> None:
        sweep, folder = self.sweep, self.folder
        self.running[plan.id] = WorkerEvent("progress", plan.id, folder.steps_saved(plan.id))
        options = (sweep.save_seconds, sweep.processes, sweep.keep_models)
        self.executor.submit(RunTask(plan, folder.url, self.data_print, *options))

    def _hear(self, event: WorkerEvent) -> None:
        plan = self.plans[event.run_id]
        if event.kind == "progress":
            self.running[plan.id] = event
            if self.sweep.display:
                self.sweep.display.progress(plan, event)
            return
        self.running.pop(plan.id, None)
        if event.kind != "finished":
            self._fail(plan, event)
        elif (record := self.folder.record(plan.id)) is None:
            self._fail(plan, replace(event, kind="failed", message="the record is missing."))
        elif (record := self._add_row(plan, record)) is not None and self.sweep.display:
            self.sweep.display.ended(plan, record)

    def _add_row(self, plan: RunPlan, record: RunRecord) -> RunRecord | None:
        """Write the row of a run that ended. Return `None` if the run differs from its plan."""
        if record.status == "finished":
            planned, found = (plan.tokens, plan.flops), (record.D_tokens, record.C_flops)
            if planned[0] != found[0] or not math.isclose(planned[1], found[1], rel_tol=1e-9):
                message = (
                    f"trained on {found[0]} tokens with {found[1]:.6g} FLOPs, but the plan was "
                    f"{planned[0]} tokens with {planned[1]:.6g} FLOPs."
                )
                self.folder.remove("runs", plan.id, RECORD)
                self._fail(plan, WorkerEvent("failed", plan.id, message=message))
                return None
            # without an evaluation, use the training loss
            evaluated, trained = record.eval_loss_final, record.loss_final
            loss = trained if evaluated is None else evaluated
            if loss is not None and loss >= math.log(record.vocab_size):
                record = replace(record, status="diverged")
        self.folder.add(record)
        clear_run(self.folder, plan.id)
        self.done += 1
        return record

    def _fail(self, plan: RunPlan, event: WorkerEvent) -> None:
        """Save a failure, and queue the run again unless it has failed too often."""
        if event.stops_sweep:
            raise StoppedSweepError(
                f"Run {plan.id} failed: {event.message}\nAll other runs would fail with the same "
                "error. Finished work is kept. Fix the cause and run the sweep again."
            )
        before, step = _read_failure(self.folder, plan.id), self.folder.steps_saved(plan.id)
        attempts = before.attempts + 1 if before is not None and before.step == step else 1
        failure = Failure(attempts, step, event.message, event.trace)
        self.folder.write(json.dumps(asdict(failure)), "runs", plan.id, FAILURE)
        again = not _given_up(failure, self.sweep.retries)
        if again:
            self.waiting.append(plan)
        if self.sweep.display:
            self.sweep.display.failed(plan, failure, again)

    def write_heartbeat(self) -> None:
        """Write the process id and the runs in progress, so that other processes can read them."""
        self._written = time.monotonic()
        self.folder.still_held()
        running = {
            run_id: {"step": event.step, "loss": event.loss, "rate": event.flops_per_second}
            for run_id, event in self.running.items()
        }
        state = {"pid": os.getpid(), "host": platform.node(), "time": time.time()}
        self.folder.write(json.dumps(state | {"running": running}), STATE)


def run_states(
    folder: SweepFolder, plans: Sequence[RunPlan], retries: int = 2
) -> tuple[RunState, ...]:
    """Return the state of each run of a design, without changing the folder.

    As in [`Sweep`], a run that failed more than `retries` times has the state `"failed"`.

    Example:
        >>> states = run_states(SweepFolder("sweep"), design.runs())
    """
    rows = folder.rows()
    state = folder.read_json(STATE)
    alive = time.time() - state.get("time", 0) < SILENCE
    running = state.get("running", {}) if alive else {}
    found = []
    for plan in plans:
        if (record := rows.get(plan.id)) is not None:
            found.append(RunState(plan, record.status, plan.steps, record))
            continue
        failure, step = _read_failure(folder, plan.id), folder.steps_saved(plan.id)
        now = running.get(plan.id)
        if now is not None:
            step = max(step, int(now.get("step", 0)))
            found.append(RunState(plan, "running", step, failure=failure, loss=now.get("loss")))
        else:
            name = "failed" if _given_up(failure, retries) else "waiting"
            found.append(RunState(plan, name, step, failure=failure))
    return tuple(found)


def _read_failure(folder: SweepFolder, run_id: str) -> Failure | None:
    row = folder.read_json("runs", run_id, FAILURE)
    try:
        return Failure(**row) if row else None
    except TypeError:
        return None


def _given_up(failure: Failure | None, retries: int) -> bool:
    return failure is not None and failure.attempts > retries
