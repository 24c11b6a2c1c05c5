"""Worker process of a sweep, which executes one run after another.

`python -m hf_familial.isoflop._worker` reads one task per line from standard input, and writes
events to standard output. It ends when its input ends, so it never runs longer than its sweep.
`--task FILE` executes one task in the processes that `accelerate launch` started.
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


# errors that all other runs would raise too
SHARED_TROUBLE = (DataError, CorpusChangedError, FileNotFoundError, PermissionError)
LAST_LINES = 30  # number of lines from the standard error of a launch in an error message
LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no"
    " --dynamo_backend no --main_process_port 0"
).split()


def run_task(task: RunTask, tell: Tell) -> None:
    """Execute a run, from its newest checkpoint if there is one, and send events with `tell`.

    An exception becomes an event. The results are in the sweep's folder.
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
    """Train one run to its end and write its record. All processes of the run call this."""
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
            # `reporting` writes the evaluations before `recording` writes the record
            callbacks=[FlopCounterCallback(), reporting, recording],
        )
        if task.keep_models:
            trainer.save_model(str(space.path / MODEL))
        if trainer.is_world_process_zero():
            # the file gets its final name only when all results are complete, the model too
            (space.path / DRAFT).replace(space.path / RECORD)
            space.finish(task.keep_models)


class SweepCallback(TrainerCallback):
    """A callback that sends events, saves every `save_seconds`, and stops a run that diverged.

    It saves checkpoints only at steps that log. A logged loss is a mean since the last log, so a
    run that resumed between two logs would log another mean.
    """

    def __init__(self, plan: RunPlan, space: Workspace, tell: Tell, save_seconds: float) -> None:
        self.plan, self.space, self.tell, self.save_seconds = plan, space, tell, save_seconds
        self._saved = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock, and send the first event."""
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
        """Send the loss, stop a run whose loss is not finite, and save if it is time."""
        if not logs or "exit_0_loss" not in logs:
            return
        losses = [logs[f"exit_{k}_loss"] for k in range(self.plan.G)]
        mean = sum(losses) / len(losses)
        finite = math.isfinite(mean)
        control.should_training_stop |= not finite
        # the processes must agree whether to save, and their clocks differ
        due = broadcast_object_list([time.monotonic() - self._saved >= self.save_seconds])[0]
        control.should_save = finite and due and state.global_step < state.max_steps
        loss, rate = mean if finite else None, logs.get("flops_per_second")
        self.tell(WorkerEvent("progress", self.plan.id, state.global_step, loss, rate))

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Make the new checkpoint the one to resume from."""
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
    """Execute a run in several processes with `accelerate launch`, and forward their events."""
    with tempfile.TemporaryDirectory() as folder:
        # prepare the data here first, so that its errors are raised in this process
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
    """Return whether an error, or one of its causes, means that the disk is full."""
    if error is None:
        return False
    code, words = getattr(error, "errno", None), os.strerror(errno.ENOSPC)
    before = error.__cause__ or error.__context__
    return code in (errno.ENOSPC, errno.EDQUOT) or words in str(error) or _is_full(before)


def _write_error(folder: SweepFolder, run_id: str) -> OSError | None:
    """Return the error of writing one megabyte to the folder, or `None` if that works.

    Libraries may hide this error when they fail to write a checkpoint.
    """
    try:
        folder.write("0" * 2**20, "runs", run_id, "probe")
        folder.remove("runs", run_id, "probe")
    except OSError as error:
        return error
    return None


def serve(tasks: TextIO, events: TextIO) -> None:
    """Execute the tasks of a stream. The process ends at once when the stream ends."""
    waiting: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in tasks:
            waiting.put(line)
        # the next sweep resumes the unfinished run from its checkpoint
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        run_task(RunTask.from_json(waiting.get()), lambda event: _write(event, events))


def serve_one(path: str, parent: int, events: TextIO) -> None:
    """Execute the task of a file, as one of several processes. Errors are raised."""

    def tell(event: WorkerEvent) -> None:
        if PartialState().is_main_process:
            _write(event, events)

    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    train(RunTask.from_json(Path(path).read_text(encoding="utf-8")), tell)


def _write(event: WorkerEvent, events: TextIO) -> None:
    events.write(event.to_json() + "\n")
    events.flush()


def _end_with(parent: int) -> None:
    """End this process when the process `parent` has ended."""
    while True:
        time.sleep(0.5)
        try:
            os.kill(parent, 0)
        except OSError:
            os._exit(1)


def main() -> None:
    """Run this process as a worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", help="File with one task.")
    parser.add_argument("--parent", type=int, default=0, help="Id of the process to end with.")
    options = parser.parse_args()
    # send the prints of libraries to standard error, so that they do not mix with events
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if options.task:
        serve_one(options.task, options.parent, events)
    else:
        serve(sys.stdin, events)


if __name__ == "__main__":
    main()
