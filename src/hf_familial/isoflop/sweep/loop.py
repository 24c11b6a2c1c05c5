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

from ...errors import DesignError, StoppedSweepError
from ...runs import RunRecord
from ..design.grid import IsoFlopDesign
from ..design.plans import RunPlan, content_id
from .arguments import check_design, run_arguments
from .corpora import corpus
from .display import Display
from .executors import Executor, LocalExecutor
from .folder import DATA, FAILURE, RECORD, STATE, SweepFolder
from .status import Failure, given_up, read_failure, survey
from .tasks import Event, Task
from .workspace import clear_run


HEARTBEAT = 5.0  # seconds between two writings of the state
POLL = 0.5  # seconds that the sweep waits for news


@dataclass(frozen=True)
class SweepOutcome:
    """What became of the runs of a design.

    Attributes:
        records (`tuple[RunRecord, ...]`): Of the runs that ended, diverged ones too.
        failed (`dict[str, Failure]`): By id, those that were tried too often.
        done_now (`int`): Runs that ended in this sweep, not before it.
        seconds (`float`): Of this sweep.
    """

    records: tuple[RunRecord, ...]
    failed: dict[str, Failure]
    done_now: int
    seconds: float


@dataclass
class Sweep:
    """Runs a design: what is finished is skipped, what was interrupted goes on.

    Rows appear in runs.jsonl, one for each run that ended, with the losses of every exit on one
    evaluation set; a run's intermediate evaluations in evaluations.jsonl. A run whose loss is not
    finite, or that ends no better than guessing (ln of the vocabulary), has the status `diverged`.
    A run without an evaluation has null for its losses there, and the display says so.

    Args:
        design ([`IsoFlopDesign`]): What to run.
        folder (`str` or `os.PathLike`): Where rows and checkpoints go: a path, or a URL that
            `fsspec` knows.
        executor ([`Executor`], *optional*): Who does the runs; by default a [`LocalExecutor`] whose
            workers have accelerators for `processes` each.
        retries (`int`, *optional*, defaults to 2): Times that a run which failed is tried again; a
            checkpoint reached in between wipes the slate clean.
        save_seconds (`float`, *optional*, defaults to 60): Seconds between checkpoints, at least.
        processes (`int`, *optional*, defaults to 1): Processes that share one run.
        keep_models (`bool`, *optional*, defaults to `False`): Whether trained families stay, in
            `runs/<id>/model`.
        display ([`Display`], *optional*): What shows how it goes; none by default.

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
    display: Display | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        for name, least in (("retries", 0), ("save_seconds", 0), ("processes", 1)):
            value = getattr(self, name)
            if not value >= least:
                raise DesignError(f"`{name}` must be {least} or more, got {value}.", name)

    def run(self) -> SweepOutcome:
        """Do what is left of the design.

        Returns:
            [`SweepOutcome`]

        Raises:
            DesignError: If a run cannot be, or its arguments are wrong; before anything starts.
            SweepLockedError: If another sweep works on the folder.
            StoppedSweepError: If all runs would fail: the disk is full, the data are gone. What is
                done stays done; the next call goes on.
            RunRecordError: If a line of runs.jsonl is wrong.
            OSError: If the folder cannot be read or written.
        """
        check_design(self.design)
        plans, folder = self.design.runs(), SweepFolder(self.folder)
        check_arguments(plans, self.processes)
        start = time.monotonic()
        with folder.hold():
            folder.mend()
            turn = _Turn(self, folder, plans)
            try:
                turn.beat()
                turn.collect()
                folder.keep(self.design.to_yaml())
                if turn.waiting:
                    turn.go()
            finally:
                turn.end()
            states = survey(folder, plans, self.retries)
        records = tuple(state.record for state in states if state.record is not None)
        failed = {s.plan.id: s.failure for s in states if s.state == "failed" and s.failure}
        return SweepOutcome(records, failed, turn.done, time.monotonic() - start)

    def retry(self) -> int:
        """Forgive the runs that failed, so that `run` tries them again.

        Returns:
            `int`: How many.

        Raises:
            SweepLockedError: If a sweep works on the folder.
        """
        folder, count = SweepFolder(self.folder), 0
        with folder.hold():
            for state in survey(folder, self.design.runs(), self.retries):
                if state.failure is not None:
                    folder.remove("runs", state.plan.id, FAILURE)
                    count += 1
        return count


def check_arguments(plans: Sequence[RunPlan], processes: int = 1) -> None:
    """Refuse what no run could start with, before anything starts.

    Raises:
        DesignError: If an argument of a run is wrong.
        FileNotFoundError: If the data are not where the design says.
    """
    for plan in plans:
        run_arguments(plan, os.devnull, processes)


class _Turn:
    """One time that a sweep runs: what waits, what runs, what is heard."""

    def __init__(self, sweep: Sweep, folder: SweepFolder, plans: Sequence[RunPlan]) -> None:
        self.sweep, self.folder = sweep, folder
        self.executor = sweep.executor or LocalExecutor(processes=sweep.processes)
        self.plans = {plan.id: plan for plan in plans}
        self.running: dict[str, Event] = {}
        self.waiting: deque[RunPlan] = deque()
        self.done, self.data_print, self._written = 0, "", -math.inf

    def collect(self) -> None:
        """Take up where the last sweep was: rows that it had no time to write, folders to clear."""
        rows = self.folder.rows()
        for plan in self.plans.values():
            if plan.id not in rows and (record := self.folder.record(plan.id)) is not None:
                self._book(plan, record)
            elif plan.id not in rows:
                if not given_up(read_failure(self.folder, plan.id), self.sweep.retries):
                    self.waiting.append(plan)
            else:
                clear_run(self.folder, plan.id)

    def go(self) -> None:
        """Do all that waits."""
        executor = self.executor
        executor.start()
        self._know_data()
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
                self.beat()

    def end(self) -> None:
        """Let the workers and the display go."""
        self.executor.close()
        if self.sweep.display:
            self.sweep.display.close()
        self.running.clear()
        self.folder.remove(STATE)

    def _know_data(self) -> None:
        """Prepare the data once, for all workers, and see that they are the old ones."""
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
        sweep = self.sweep
        self.running[plan.id] = Event("progress", plan.id, self.folder.steps_saved(plan.id))
        self.executor.submit(
            Task(
                plan,
                self.folder.url,
                self.data_print,
                sweep.save_seconds,
                sweep.processes,
                sweep.keep_models,
            )
        )

    def _hear(self, event: Event) -> None:
        plan = self.plans[event.run_id]
        if event.kind == "progress":
            self.running[plan.id] = event
            if self.sweep.display:
                self.sweep.display.progress(plan, event)
            return
        self.running.pop(plan.id, None)
        if event.kind != "finished":
            self._failed(plan, event)
        elif (record := self.folder.record(plan.id)) is None:
            self._failed(plan, replace(event, kind="failed", message="its record is gone."))
        elif (record := self._book(plan, record)) is not None and self.sweep.display:
            self.sweep.display.ended(plan, record)

    def _book(self, plan: RunPlan, record: RunRecord) -> RunRecord | None:
        """Write the row of a run that ended; `None` if it did not do what was planned."""
        if record.status == "finished":
            planned, found = (plan.tokens, plan.flops), (record.D_tokens, record.C_flops)
            if planned[0] != found[0] or not math.isclose(planned[1], found[1], rel_tol=1e-9):
                message = f"trained {found[0]} tokens, {found[1]:.6g} FLOPs; planned {planned}."
                self.folder.remove("runs", plan.id, RECORD)
                self._failed(plan, Event("failed", plan.id, message=message))
                return None
            # a run that was never evaluated is judged by what it has; `diverged` would be untrue
            evaluated, trained = record.eval_loss_final, record.loss_final
            loss = trained if evaluated is None else evaluated
            if loss is not None and loss >= math.log(record.vocab_size):
                record = replace(record, status="diverged")
        self.folder.add(record)
        clear_run(self.folder, plan.id)
        self.done += 1
        return record

    def _failed(self, plan: RunPlan, event: Event) -> None:
        """Try again, or no more."""
        if event.stops_sweep:
            raise StoppedSweepError(
                f"run {plan.id}: {event.message}\nAll runs would fail like this. What is done "
                "stays done; mend it and run the sweep again."
            )
        before, step = read_failure(self.folder, plan.id), self.folder.steps_saved(plan.id)
        attempts = before.attempts + 1 if before is not None and before.step == step else 1
        failure = Failure(attempts, step, event.message, event.trace)
        self.folder.write(json.dumps(asdict(failure)), "runs", plan.id, FAILURE)
        again = not given_up(failure, self.sweep.retries)
        if again:
            self.waiting.append(plan)
        if self.sweep.display:
            self.sweep.display.failed(plan, failure, again)

    def beat(self) -> None:
        """Write who runs the sweep and what runs now, for others to see."""
        self._written = time.monotonic()
        self.folder.still_held()
        running = {
            run_id: {"step": event.step, "loss": event.loss, "rate": event.flops_per_second}
            for run_id, event in self.running.items()
        }
        state = {"pid": os.getpid(), "host": platform.node(), "time": time.time()}
        self.folder.write(json.dumps(state | {"running": running}), STATE)
