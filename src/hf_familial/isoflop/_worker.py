"""A worker of a sweep: does one run after another, in a process of its own.

`python -m hf_familial.isoflop._worker` reads tasks from its standard input, a line each, and writes
events to its standard output. It ends when its input does, so no worker outlives its sweep.
`--task FILE` does one task in the processes that `accelerate launch` started.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CorpusChangedError, DataError
from ..models.familial import FamilialForCausalLM
from ..training.callbacks import FlopCounterCallback, RunRecordCallback
from ..training.pretraining import pretrain
from ..training.run_record import last_exit_losses, named_losses
from ._folder import DRAFT, RECORD, RUN_POINTS, SweepFolder
from ._messages import RunTask, Tell, WorkerEvent
from ._workspace import MODEL, Workspace
from .arguments import prepared, run_arguments
from .plan import RunPlan


# other runs would fail in the same way
SHARED_TROUBLE = (DataError, CorpusChangedError, FileNotFoundError, PermissionError)
LAST_LINES = 30  # of a launch's standard error, in the error of a run
LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no"
    " --dynamo_backend no --main_process_port 0"
).split()


def run_task(task: RunTask, tell: Tell) -> None:
    """Do a run, from its newest checkpoint on, and tell every event.

    An exception becomes an event. The sweep's folder holds all that the sweep needs to go on.
    """
    run_id = task.plan.id
    folder = SweepFolder(task.folder)
    try:
        with folder.hold_run(run_id):
            if folder.record(run_id) is None:
                launch(task, tell) if task.processes > 1 else train(task, tell)
        tell(WorkerEvent("finished", run_id, step=task.plan.steps))
    except Exception as error:
        shared = isinstance(error, SHARED_TROUBLE) or _is_full(error)
        message = f"{type(error).__name__}: {error}"
        if not shared and (unwritable := _write_error(folder, run_id)):
            shared, message = True, f"{message} ({unwritable})"
        trace = traceback.format_exc()
        tell(WorkerEvent("failed", run_id, message=message, trace=trace, stops_sweep=shared))


def train(task: RunTask, tell: Tell) -> None:
    """Train one run to its end and write its record, in this process or in each that shares it."""
    plan, folder = task.plan, SweepFolder(task.folder)
    space = Workspace(folder, plan.id)
    with space.open() as checkpoint:
        data_args, args = run_arguments(plan, str(space.path), task.processes)
        data = prepared(data_args, plan, task.data_print)
        reporting = SweepCallback(plan, space, tell, task.save_seconds)
        recording = RunRecordCallback(
            str(space.path / DRAFT), plan.id, data=data.name, seq_length=plan.seq_length
        )
        trainer = pretrain(
            lambda: FamilialForCausalLM(plan.config()),
            args,
            data,
            checkpoint=None if checkpoint is None else str(checkpoint),
            # the evaluations are written before the record
            callbacks=[FlopCounterCallback(), reporting, recording],
        )
        if task.keep_models:
            trainer.save_model(str(space.path / MODEL))
        if trainer.is_world_process_zero():
            # the final name says that everything is there, the model too
            (space.path / DRAFT).replace(space.path / RECORD)
            space.finish(task.keep_models)


class SweepCallback(TrainerCallback):
    """Tells how a run goes, saves by the clock, stops a run that diverged.

    Checkpoints stand where losses are logged, for a log is a mean since the last one: a run that is
    resumed elsewhere would log another mean.
    """

    def __init__(self, plan: RunPlan, space: Workspace, tell: Tell, save_seconds: float) -> None:
        self.plan, self.space, self.tell, self.save_seconds = plan, space, tell, save_seconds
        self._saved = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._saved = time.monotonic()
        self.tell(WorkerEvent("progress", self.plan.id, step=state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the loss; stop a run whose loss is not finite."""
        if not logs or "exit_0_loss" not in logs:
            return
        losses = [logs[f"exit_{k}_loss"] for k in range(self.plan.G)]
        mean = sum(losses) / len(losses)
        finite = math.isfinite(mean)
        control.should_training_stop |= not finite
        # the clocks of several processes differ, and all must save or none
        due = broadcast_object_list([time.monotonic() - self._saved >= self.save_seconds])[0]
        control.should_save = finite and due and state.global_step < state.max_steps
        loss, rate = mean if finite else None, logs.get("flops_per_second")
        self.tell(WorkerEvent("progress", self.plan.id, state.global_step, loss, rate))

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Commit the checkpoint."""
        if state.is_world_process_zero:
            self.space.commit(state.global_step)
        self._saved = time.monotonic()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the evaluations of the run."""
        if state.is_world_process_zero:
            text = "".join(f"{json.dumps(row)}\n" for row in self._points(state))
            (self.space.path / RUN_POINTS).write_text(text, encoding="utf-8")

    def _points(self, state: TrainerState) -> list[dict[str, Any]]:
        plan, rows = self.plan, []
        for log in state.log_history:
            losses = last_exit_losses([log], "eval_exit", plan.G)
            if losses is None:
                continue
            tokens = log["step"] * plan.batch_tokens
            row = {"run_id": plan.id, "step": log["step"], "D_tokens": tokens}
            row["C_flops"] = tokens * plan.flops_per_token
            # JSON has no NaN
            known = [loss if math.isfinite(loss) else None for loss in losses]
            whole = named_losses("eval_loss", losses) if None not in known else {}
            rows.append(row | whole | {"eval_loss_exits": known})
        return rows


def launch(task: RunTask, tell: Tell) -> None:
    """Do a run in several processes, started by `accelerate launch`; pass their events on."""
    with tempfile.TemporaryDirectory() as folder:
        # errors of the data are best raised here
        data_args, _ = run_arguments(task.plan, folder, task.processes)
        prepared(data_args, task.plan, task.data_print)
        path, log = Path(folder) / "task.json", Path(folder) / "log"
        path.write_text(task.to_json(), encoding="utf-8")
        command = [sys.executable, *LAUNCH, "--num_processes", str(task.processes)]
        command += ["-m", "hf_familial.isoflop._worker"]
        command += ["--task", str(path), "--parent", str(os.getpid())]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    tell(WorkerEvent.from_json(line))
            code = process.wait()
        if code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise RuntimeError(f"`accelerate launch` ended with code {code}:\n{last}")


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error, or a cause of it, is that of a full disk; hosts wrap it."""
    if error is None:
        return False
    code, words = getattr(error, "errno", None), os.strerror(errno.ENOSPC)
    before = error.__cause__ or error.__context__
    return code in (errno.ENOSPC, errno.EDQUOT) or words in str(error) or _is_full(before)


def _write_error(folder: SweepFolder, run_id: str) -> OSError | None:
    """Return why the folder does not take a megabyte, if it does not; hosts hide the reason."""
    try:
        folder.write("0" * 2**20, "runs", run_id, "probe")
        folder.remove("runs", run_id, "probe")
    except OSError as error:
        return error
    return None


def serve(tasks: TextIO, events: TextIO) -> None:
    """Do the tasks of a stream; the process ends at once where the stream does."""
    waiting: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in tasks:
            waiting.put(line)
        # the run in progress stays unfinished: the next sweep resumes it from its checkpoint
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        run_task(RunTask.from_json(waiting.get()), lambda event: _write(event, events))


def serve_one(path: str, parent: int, events: TextIO) -> None:
    """Do the task of a file, as one of several processes; errors are raised."""

    def tell(event: WorkerEvent) -> None:
        if PartialState().is_main_process:
            _write(event, events)

    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    train(RunTask.from_json(Path(path).read_text(encoding="utf-8")), tell)


def _write(event: WorkerEvent, events: TextIO) -> None:
    events.write(event.to_json() + "\n")
    events.flush()


def _end_with(parent: int) -> None:
    """End this process when another one is gone."""
    while True:
        time.sleep(0.5)
        try:
            os.kill(parent, 0)
        except OSError:
            os._exit(1)


def main() -> None:
    """Become a worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", help="File of one task.")
    parser.add_argument("--parent", type=int, default=0, help="Process to end with.")
    options = parser.parse_args()
    # prints of libraries must not mix with events
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if options.task:
        serve_one(options.task, options.parent, events)
    else:
        serve(sys.stdin, events)


if __name__ == "__main__":
    main()
