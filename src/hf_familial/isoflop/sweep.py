"""A sweep: every run of a design once, whatever happens in between."""

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


HEARTBEAT = 5.0  # seconds between two writings of the state
POLL = 0.5  # seconds that the sweep waits for news
SILENCE = 60  # seconds without a heartbeat after which a sweep is taken to be dead
STATES = ("finished", "diverged", "running", "failed", "waiting")


@dataclass(frozen=True)
class RunState:
    """A run of a sweep: its plan, its `state`, and what is known of it."""

    plan: RunPlan
    state: str  # one of STATES
    step: int  # optimiser steps that are saved, or done if it runs
    record: RunRecord | None = None  # its row, once it ended
    failure: Failure | None = None  # its failed attempts
    loss: float | None = None  # mean training loss, nats per token, if it runs


@dataclass(frozen=True)
class SweepOutcome:
    """The results of a sweep: rows, failed runs by id, and how many runs ended in this call."""

    records: tuple[RunRecord, ...]  # of the runs that ended, diverged ones too
    failed: dict[str, Failure]  # runs that failed too often
    done_now: int
    seconds: float


@dataclass
class Sweep:
    """Runs a design: finished runs are skipped, interrupted ones resumed.

    Rows appear in runs.jsonl, one for each run that ended, with the losses of every exit on one
    evaluation set; a run's intermediate evaluations in evaluations.jsonl. A run whose loss is not
    finite, or that ends no better than guessing (ln of the vocabulary), has the status `diverged`.
    A run without an evaluation has null for its losses there, and the display says so.

    Args:
        design ([`IsoFlopDesign`]): The design.
        folder (`str` or `os.PathLike`): Folder of rows and checkpoints: a path, or a URL that
            `fsspec` knows.
        executor ([`Executor`], *optional*): Does the runs; by default a [`LocalExecutor`] whose
            workers have accelerators for `processes` each.
        retries (`int`, *optional*, defaults to 2): Times that a run which failed is tried again; a
            checkpoint reached in between resets the count.
        save_seconds (`float`, *optional*, defaults to 60): Seconds between checkpoints, at least.
        processes (`int`, *optional*, defaults to 1): Processes that share one run.
        keep_models (`bool`, *optional*, defaults to `False`): Whether trained families stay, in
            `runs/<id>/model`.
        display ([`SweepDisplay`], *optional*): Shows the progress; none by default.

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
        """Check the numbers."""
        for name, least in (("retries", 0), ("save_seconds", 0), ("processes", 1)):
            value = getattr(self, name)
            if not value >= least:
                raise DesignError(f"`{name}` must be {least} or more, got {value}.", name)

    def run(self) -> SweepOutcome:
        """Do all runs of the design that have not ended.

        Raises:
            DesignError: If a run is infeasible, or its arguments are wrong; before anything starts.
            SweepLockedError: If another sweep holds the folder.
            StoppedSweepError: If all runs would fail: the disk is full, the data are gone. What is
                done stays done; the next call goes on.
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
        """Forget the failures, so that `run` tries these runs again; return how many there were."""
        folder, count = SweepFolder(self.folder), 0
        with folder.hold():
            for state in run_states(folder, self.design.runs(), self.retries):
                if state.failure is not None:
                    folder.remove("runs", state.plan.id, FAILURE)
                    count += 1
        return count


class _SweepRun:
    """The state of one call of `Sweep.run`: runs that wait, runs in progress, and their news."""

    def __init__(self, sweep: Sweep, folder: SweepFolder, plans: Sequence[RunPlan]) -> None:
        self.sweep, self.folder = sweep, folder
        self.executor = sweep.executor or LocalExecutor(processes=sweep.processes)
        self.plans = {plan.id: plan for plan in plans}
        self.running: dict[str, WorkerEvent] = {}
        self.waiting: deque[RunPlan] = deque()
        self.done, self.data_print, self._written = 0, "", -math.inf

    def collect(self) -> None:
        """Do what the last sweep had no time for: write rows, clear folders; queue the rest."""
        rows = self.folder.rows()
        for plan in self.plans.values():
            if plan.id in rows:
                clear_run(self.folder, plan.id)
            elif (record := self.folder.record(plan.id)) is not None:
                self._add_row(plan, record)
            elif not _given_up(_read_failure(self.folder, plan.id), self.sweep.retries):
                self.waiting.append(plan)

    def go(self) -> None:
        """Do all that waits."""
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
        """Prepare the data once, for all workers, and check that they have not changed."""
        plan = self.waiting[0]
        args = run_arguments(plan, os.devnull, self.sweep.processes)[0]
        data, _, found = corpus(args)
        # designs of one folder may ask for different data
        known = self.folder.read_json(DATA)
        asked = {name: value for name, value in asdict(args).items() if value is not None}
        key = content_id(asked)
        if known.get(key, {}).get("fingerprint", found) != found:
            raise StoppedSweepError(
                f"the data `{data.name}` have changed since this sweep began: bring the old ones "
                f"back, or choose another folder than `{self.folder.url}`."
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
            self._fail(plan, replace(event, kind="failed", message="its record is gone."))
        elif (record := self._add_row(plan, record)) is not None and self.sweep.display:
            self.sweep.display.ended(plan, record)

    def _add_row(self, plan: RunPlan, record: RunRecord) -> RunRecord | None:
        """Write the row of a run that ended; `None` if it did something else than planned."""
        if record.status == "finished":
            planned, found = (plan.tokens, plan.flops), (record.D_tokens, record.C_flops)
            if planned[0] != found[0] or not math.isclose(planned[1], found[1], rel_tol=1e-9):
                message = f"trained {found[0]} tokens, {found[1]:.6g} FLOPs; planned {planned}."
                self.folder.remove("runs", plan.id, RECORD)
                self._fail(plan, WorkerEvent("failed", plan.id, message=message))
                return None
            # without an evaluation the training loss decides
            evaluated, trained = record.eval_loss_final, record.loss_final
            loss = trained if evaluated is None else evaluated
            if loss is not None and loss >= math.log(record.vocab_size):
                record = replace(record, status="diverged")
        self.folder.add(record)
        clear_run(self.folder, plan.id)
        self.done += 1
        return record

    def _fail(self, plan: RunPlan, event: WorkerEvent) -> None:
        """Write a failure down; queue the run again, or give it up."""
        if event.stops_sweep:
            raise StoppedSweepError(
                f"run {plan.id}: {event.message}\nAll runs would fail like this. What is done "
                "stays done; mend it and run the sweep again."
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
        """Write the sweep's process and the runs in progress, for other processes to read."""
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
    """Return the state of every run of a design; the folder stays as it is.

    A run that failed more than `retries` times counts as failed, as in [`Sweep`].
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
