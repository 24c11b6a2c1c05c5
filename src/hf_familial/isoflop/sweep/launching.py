"""A run that several processes share, started by `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .arguments import run_arguments
from .corpora import prepared
from .tasks import Event, Task, Tell


LAST_LINES = 30  # of what the processes wrote, in the error of a run


def launch_command(task: Task, path: str) -> list[str]:
    """The command that does a task in its processes.

    Args:
        task ([`Task`]): The run.
        path (`str`): File that holds it.

    Returns:
        `list[str]`
    """
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(task.processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "hf_familial.isoflop.sweep.worker",
        "--task",
        path,
        "--parent",
        str(os.getpid()),
    ]


def launch(task: Task, tell: Tell) -> None:
    """Do a run in several processes; gives their events on.

    Raises:
        RuntimeError: If they fail, with the end of what they wrote.
        DataError, CorpusChangedError, OSError: If the data cannot be used, or are others.
    """
    with tempfile.TemporaryDirectory() as folder:
        # their errors are best told here
        data_args, _ = run_arguments(task.plan, folder, task.processes)
        prepared(data_args, task.plan, task.data_print)
        path, log = Path(folder) / "task.json", Path(folder) / "log"
        path.write_text(task.to_json(), encoding="utf-8")
        with log.open("w") as errors:
            process = subprocess.Popen(
                launch_command(task, str(path)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    tell(Event.from_json(line))
            code = process.wait()
        if code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise RuntimeError(f"`accelerate launch` ended with code {code}:\n{last}")
