"""A worker of a sweep: does one run after another, in a process of its own.

`python -m hf_familial.isoflop.sweep.worker` reads tasks from its standard input, a line each, and
writes events to its standard output; it ends when its input does, so that no worker outlives its
sweep. `--task FILE` does one task in the processes that `accelerate launch` started.
"""

from __future__ import annotations

import argparse
import errno
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TextIO

from accelerate import PartialState

from ...errors import CorpusChangedError, DataError
from ...models.familial import FamilialForCausalLM
from ...training.callbacks import FlopCounterCallback, RunRecordCallback
from ...training.pretraining import pretrain
from .arguments import run_arguments
from .corpora import prepared
from .folder import DRAFT, RECORD, SweepFolder
from .launching import launch
from .reporting import SweepCallback
from .tasks import Event, Task, Tell
from .workspace import MODEL, Workspace


# other runs would fail in the same way
SHARED_TROUBLE = (DataError, CorpusChangedError, FileNotFoundError, PermissionError)


def run_task(task: Task, tell: Tell) -> None:
    """Do a run, from its newest checkpoint on, and tell how it goes.

    An exception becomes an event; what the sweep needs to go on lies in its folder.

    Args:
        task ([`Task`]): The run.
        tell (`Callable[[Event], Any]`): Takes every event.
    """
    run_id = task.plan.id
    folder = SweepFolder(task.folder)
    try:
        with folder.hold_run(run_id):
            if folder.record(run_id) is None:
                launch(task, tell) if task.processes > 1 else train(task, tell)
        tell(Event("finished", run_id, step=task.plan.steps))
    except Exception as error:
        shared = isinstance(error, SHARED_TROUBLE) or _is_full(error)
        shared = shared or not _can_write(folder, run_id)
        message = f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        tell(Event("failed", run_id, message=message, trace=trace, stops_sweep=shared))


def train(task: Task, tell: Tell) -> None:
    """Train one run to its end and write its record, in this process and its likes.

    Raises:
        DataError: If the data cannot be used.
        CorpusChangedError: If they are not what the sweep began with.
        OSError: If something cannot be read or written.
    """
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
            # under its own name it says that all is there, the model too
            (space.path / DRAFT).replace(space.path / RECORD)
            space.finish(task.keep_models)


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one before it, is that of a full disk; hosts have their own types."""
    if error is None:
        return False
    code, words = getattr(error, "errno", None), os.strerror(errno.ENOSPC)
    before = error.__cause__ or error.__context__
    return code in (errno.ENOSPC, errno.EDQUOT) or words in str(error) or _is_full(before)


def _can_write(folder: SweepFolder, run_id: str) -> bool:
    """Whether the folder still takes a megabyte: hosts hide their trouble in other errors."""
    try:
        folder.write("0" * 2**20, "runs", run_id, "probe")
        folder.remove("runs", run_id, "probe")
    except OSError:
        return False
    return True


def serve(tasks: TextIO, events: TextIO) -> None:
    """Do the tasks of a stream; the process ends at once where the stream does."""
    waiting: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in tasks:
            waiting.put(line)
        # not even a run in progress is finished: the next sweep takes it up from its checkpoint
        os._exit(0)

    def tell(event: Event) -> None:
        events.write(event.to_json() + "\n")
        events.flush()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        run_task(Task.from_json(waiting.get()), tell)


def serve_one(path: str, parent: int, events: TextIO) -> None:
    """Do the task of a file, as one of several processes; raises what goes wrong."""

    def tell(event: Event) -> None:
        if PartialState().is_main_process:
            events.write(event.to_json() + "\n")
            events.flush()

    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    train(Task.from_json(Path(path).read_text(encoding="utf-8")), tell)


def _follow(parent: int) -> None:
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
    # what libraries print must not mix with events
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if options.task:
        serve_one(options.task, options.parent, events)
    else:
        serve(sys.stdin, events)


if __name__ == "__main__":
    main()
