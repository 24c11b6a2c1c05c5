"""Executors of a sweep: the interface, and an executor with local worker processes."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import DesignError
from ._messages import RunTask, WorkerEvent


PATIENCE = 10  # seconds until a worker that closed its output is killed
WORKER = "hf_familial.isoflop._worker"


class Executor(Protocol):
    """The interface that the executors of a sweep implement.

    Attributes:
        slots (`int`): Maximum number of runs at the same time.
    """

    slots: int

    def start(self) -> None:
        """Start the workers. A sweep calls this once, before it submits a task."""

    def submit(self, task: RunTask) -> None:
        """Start a run. A sweep submits at most `slots` runs at the same time."""

    def poll(self, seconds: float) -> list[WorkerEvent]:
        """Return the events since the last call. Wait for at most `seconds`.

        Each task ends with one event of the kind `finished`, `failed` or `lost`.
        """

    def close(self) -> None:
        """End all workers, even if they are busy."""


class LocalExecutor:
    """An executor with worker processes on this machine.

    Each worker has its own threads or its own accelerators, and executes one run after another. The
    workers end when this process ends, even if it is killed.

    Args:
        workers (`int`, *optional*): Number of workers. Defaults to the number of accelerators, or
            of processors if there is no accelerator, divided by `processes`.
        threads (`int`, *optional*): Threads of each process. By default, all processors are shared
            equally. The last bits of a loss depend on this number.
        log_dir (`str` or `os.PathLike`, *optional*): Folder for the standard error of the workers.
            By default, it is discarded.
        processes (`int`, *optional*, defaults to 1): Processes that share one run. Each worker gets
            one accelerator per process.

    Example:
        >>> Sweep(design, "sweep", LocalExecutor(workers=2, threads=1)).run()
    """

    def __init__(
        self,
        workers: int | None = None,
        threads: int | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        processes: int = 1,
    ) -> None:
        for name, value in (("workers", workers), ("threads", threads), ("processes", processes)):
            if value is not None and value < 1:
                raise DesignError(f"`{name}` must be 1 or more, got {value}.", name)
        affinity = getattr(os, "sched_getaffinity", None)
        processors = (len(affinity(0)) if affinity else os.cpu_count()) or 1
        self.devices, self.processes = torch.cuda.device_count(), processes
        if self.devices and processes > self.devices:
            raise DesignError(
                f"`processes` must be at most {self.devices}, the number of accelerators, got "
                f"{processes}.",
                "processes",
            )
        self.slots = workers or max(1, (self.devices or processors) // processes)
        self.threads = threads or max(1, processors // (self.slots * processes))
        self.log_dir = None if log_dir is None else Path(log_dir)
        self._heard: queue.Queue[tuple[_Worker, WorkerEvent | None]] = queue.Queue()
        self._workers: list[_Worker] = []

    def start(self) -> None:
        """Start the workers. They import their libraries while the sweep prepares the data."""
        while len(self._workers) < self.slots:
            self._workers.append(self._start_worker(len(self._workers)))

    def _start_worker(self, index: int) -> _Worker:
        environment = thread_variables(self.threads)
        if self.devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            own = [(index * self.processes + k) % self.devices for k in range(self.processes)]
            # use the names in CUDA_VISIBLE_DEVICES of this process, if it has any
            names = [visible[k] if len(visible) > k and visible[k] else str(k) for k in own]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
        return _Worker(index, environment, self.log_dir, self._heard)

    def submit(self, task: RunTask) -> None:
        """Send a task to a free worker."""
        free = next((worker for worker in self._workers if worker.task is None), None)
        if free is None:
            raise RuntimeError(f"all {self.slots} workers are busy.")
        free.give(task)

    def poll(self, seconds: float) -> list[WorkerEvent]:
        """Return the new events. If a worker died, replace it and report its run as `lost`."""
        events = []
        with contextlib.suppress(queue.Empty):
            heard = self._heard.get(timeout=seconds)
            while True:
                events += self._hear(*heard)
                heard = self._heard.get_nowait()
        return events

    def _hear(self, worker: _Worker, event: WorkerEvent | None) -> list[WorkerEvent]:
        if worker not in self._workers:
            return []
        if event is None:
            lost, reason = worker.task, worker.end()
            self._workers[self._workers.index(worker)] = self._start_worker(worker.index)
            return [] if lost is None else [WorkerEvent("lost", lost.plan.id, message=reason)]
        if worker.task is None or event.run_id != worker.task.plan.id:
            return []
        if event.kind != "progress":
            worker.task = None
        return [event]

    def close(self) -> None:
        """Kill the workers."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.end()


def thread_variables(threads: int) -> dict[str, str]:
    """Return the environment variables that set the number of threads of a worker."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    # otherwise, idle threads of one worker take processor time from other workers
    waiting = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    return dict.fromkeys(names, str(threads)) | waiting


class _Worker:
    """A worker process, and the thread that reads its output."""

    def __init__(
        self,
        index: int,
        environment: dict[str, str],
        log_dir: Path | None,
        heard: queue.Queue[Any],
    ) -> None:
        self.index = index
        self.task: RunTask | None = None
        with contextlib.ExitStack() as opened:
            log: Any = subprocess.DEVNULL
            if log_dir is not None:
                log_dir.mkdir(parents=True, exist_ok=True)
                log = opened.enter_context((log_dir / f"worker-{index}.log").open("ab"))
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | environment,
            )
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def give(self, task: RunTask) -> None:
        self.task = task
        assert self.process.stdin is not None
        # if the worker has died, `_listen` notices the end of its output
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(task.to_json() + "\n")
            self.process.stdin.flush()

    def _listen(self, heard: queue.Queue[Any]) -> None:
        assert self.process.stdout is not None
        # a killed worker may leave half a line
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                heard.put((self, WorkerEvent.from_json(line)))
        heard.put((self, None))

    def end(self) -> str:
        """Wait for the process and close its pipes. Return how it ended."""
        try:
            code = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:  # the worker still runs, but wrote an invalid event
            self.process.kill()
            code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return f"worker {self.index} ended with {how}. Is the machine out of memory?"
