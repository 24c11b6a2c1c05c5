"""Executors of a sweep: the interface, and worker processes of this machine."""

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


PATIENCE = 10  # seconds that a worker which closed its output has to end
WORKER = "hf_familial.isoflop._worker"


class Executor(Protocol):
    """The interface of those who do the runs of a sweep.

    Attributes:
        slots (`int`): Number of runs at once.
    """

    slots: int

    def start(self) -> None:
        """Make workers ready; called once, before any task."""

    def submit(self, task: RunTask) -> None:
        """Take a run; no more than `slots` at once."""

    def poll(self, seconds: float) -> list[WorkerEvent]:
        """Return the news since the last call, after at most so many seconds.

        Every task ends with one `finished`, `failed` or `lost`.
        """

    def close(self) -> None:
        """End all workers, whatever they do."""


class LocalExecutor:
    """Worker processes on this machine, each with its own threads or its own accelerator.

    A worker imports once and does run after run. It ends when this process does, even if killed.

    Args:
        workers (`int`, *optional*): Number of workers; by default one for each accelerator, else
            one for each processor.
        threads (`int`, *optional*): Threads of each; by default the processors shared out. The
            last bits of a loss depend on it.
        log_dir (`str` or `os.PathLike`, *optional*): Folder for their standard error; by default it
            is dropped.
        processes (`int`, *optional*, defaults to 1): Accelerators of each worker, for the processes
            that share its runs.
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
                f"`processes` must not exceed the accelerators, {self.devices}, got {processes}.",
                "processes",
            )
        self.slots = workers or max(1, (self.devices or processors) // processes)
        self.threads = threads or max(1, processors // (self.slots * processes))
        self.log_dir = None if log_dir is None else Path(log_dir)
        self._heard: queue.Queue[tuple[_Worker, WorkerEvent | None]] = queue.Queue()
        self._workers: list[_Worker] = []

    def start(self) -> None:
        """Start the workers; they import while the sweep prepares."""
        while len(self._workers) < self.slots:
            self._workers.append(self._start_worker(len(self._workers)))

    def _start_worker(self, index: int) -> _Worker:
        environment = thread_variables(self.threads)
        if self.devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            own = [(index * self.processes + k) % self.devices for k in range(self.processes)]
            # names among the accelerators that this process sees
            names = [visible[k] if len(visible) > k and visible[k] else str(k) for k in own]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
        return _Worker(index, environment, self.log_dir, self._heard)

    def submit(self, task: RunTask) -> None:
        """Give a task to a worker that has none."""
        free = next((worker for worker in self._workers if worker.task is None), None)
        if free is None:
            raise RuntimeError(f"all {self.slots} workers have a task.")
        free.give(task)

    def poll(self, seconds: float) -> list[WorkerEvent]:
        """Return the news; a worker that died is replaced, its run is `lost`."""
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
    """Return the variables of the environment that pin the threads of a worker."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    # threads of several workers spin on one processor otherwise
    waiting = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    return dict.fromkeys(names, str(threads)) | waiting


class _Worker:
    """A worker process, and the thread that listens to it."""

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
        # the death of a worker is heard as the end of its output
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(task.to_json() + "\n")
            self.process.stdin.flush()

    def _listen(self, heard: queue.Queue[Any]) -> None:
        assert self.process.stdout is not None
        # a worker that is killed leaves half a line
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                heard.put((self, WorkerEvent.from_json(line)))
        heard.put((self, None))

    def end(self) -> str:
        """Wait for the process, close its pipes; return how it ended."""
        try:
            code = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:  # it wrote something else than events, and lives on
            self.process.kill()
            code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return f"worker {self.index} ended with {how}; out of memory?"
