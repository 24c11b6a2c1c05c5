"""Executor of a sweep on a Ray cluster, with one Ray task for each run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import DesignError, SweepError
from ._messages import RunTask, WorkerEvent
from .executors import thread_variables


CLOSING = 30.0  # seconds to wait for cancelled tasks


class RayExecutor:
    """An executor that submits each run to Ray as one task.

    Ray chooses the node and the time of each run. All nodes must have access to the sweep's folder.
    If a run loses its node, the sweep submits it again, and the run resumes from its checkpoint on
    another node. Ray's own retries are off, because the sweep would not count them and because Ray
    retries for ever when memory is short.

    Args:
        address (`str`, *optional*): Address of the cluster: `host:6379`, `ray://host:10001` or
            `auto`. Defaults to `$RAY_ADDRESS`, then to a cluster that runs on this machine, then to
            a new cluster on it.
        cpus (`int`, *optional*, defaults to 1): Processors of each run. They become the threads of
            its processes. The last bits of a loss depend on this number.
        gpus (`float`, *optional*, defaults to 0): Accelerators of each run. A number below 1 lets
            several small runs share one accelerator. Other numbers must be whole.
        slots (`int`, *optional*): Maximum number of runs submitted to Ray at the same time.
            Defaults to the number that fits on the current nodes. Set it for a cluster that grows
            on demand, because such a cluster grows only when runs wait.
        runtime_env (`Mapping[str, Any]`, *optional*): Ray's `runtime_env` for the job, with
            environment variables, packages or code.

    Example:
        >>> Sweep(design, "s3://bucket/sweep", RayExecutor("auto", cpus=8, gpus=1)).run()
    """

    def __init__(
        self,
        address: str | None = None,
        cpus: int = 1,
        gpus: float = 0,
        slots: int | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("cpus", cpus), ("slots", slots)):
            if value is not None and (value < 1 or value != int(value)):
                raise DesignError(
                    f"`{name}` must be a whole number of 1 or more, got {value}.", name
                )
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise DesignError(
                f"`gpus` must be a whole number, or a number between 0 and 1, got {gpus}.", "gpus"
            )
        self.address, self.cpus, self.gpus = address, int(cpus), gpus
        self.runtime_env = dict(runtime_env or {})
        self.slots = slots or 1
        self._counts = slots is None
        self._ray = import_ray()
        self._connected = False
        self._news: Any = None
        self._do: Any = None
        self._tasks: dict[Any, str] = {}

    def start(self) -> None:
        """Connect to the cluster. Raise `SweepError` if no node has room for a run."""
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = self._ray
        if not ray.is_initialized():
            env = self.runtime_env or None
            ray.init(self.address, runtime_env=env, log_to_driver=False, logging_level="warning")
            self._connected = True
        elif self.runtime_env:
            raise SweepError(
                "Ray is already initialised. Pass `runtime_env` to your own `ray.init` instead."
            )
        self._count_slots()
        # keep the queue on the node of the sweep, so that the loss of another node does not end it
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._do = ray.remote(_do)

    def _count_slots(self) -> None:
        """Set `slots` to the number of runs that fit on the current nodes."""
        if not self._counts:
            return
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        asked = {"CPU": self.cpus, "GPU": self.gpus}
        room = sum(
            min(int(node.get(name, 0) / amount) for name, amount in asked.items() if amount)
            for node in nodes
        )
        if not room and not self._tasks:
            has = ", ".join(f"{n.get('CPU', 0):g} + {n.get('GPU', 0):g}" for n in nodes)
            raise SweepError(
                f"no node of the cluster has room for a run of {self.cpus} CPUs + {self.gpus:g} "
                f"GPUs. The nodes have {has or 'none'}. If the cluster grows on demand, pass "
                "`slots`."
            )
        self.slots = max(1, room)

    def submit(self, task: RunTask) -> None:
        """Submit a run to Ray, which queues it until a node has room."""
        if task.processes > 1 and 0 < self.gpus < task.processes:
            raise DesignError(
                f"`gpus` must be at least 1 for each of {task.processes} processes, got "
                f"{self.gpus}.",
                "gpus",
            )
        threads = max(1, self.cpus // task.processes)
        variables = thread_variables(threads)
        request = self._do.options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_retries=0,
            runtime_env={"env_vars": variables | self.runtime_env.get("env_vars", {})},
        )
        reference = request.remote(task.to_json(), threads, self._news)
        self._tasks[reference] = task.plan.id

    def poll(self, seconds: float) -> list[WorkerEvent]:
        """Return the new events. A run whose node or worker died is `lost`."""
        if not self._tasks:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        # ignore late events of runs that have already ended
        running = set(self._tasks.values())
        events = [event for event in self._take_news() if event.run_id in running]
        events += [self._ended(reference) for reference in done]
        self._count_slots()
        return events

    def _take_news(self) -> list[WorkerEvent]:
        with contextlib.suppress(self._ray.exceptions.RayError):
            return [
                WorkerEvent.from_json(line) for line in self._news.get_nowait_batch(len(self._news))
            ]
        return []

    def _ended(self, reference: Any) -> WorkerEvent:
        run_id = self._tasks.pop(reference)
        try:
            return WorkerEvent.from_json(self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:
            # the task failed before the run began, for example because the package is missing
            message = f"{type(error.cause).__name__}: {error.cause}"
            return WorkerEvent("failed", run_id, message=message, trace=str(error))
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            return WorkerEvent("lost", run_id, message=f"{type(error).__name__}: {first}")

    def close(self) -> None:
        """Kill the runs that are still running, and disconnect from the cluster."""
        tasks, self._tasks = list(self._tasks), {}
        # if the cluster has ended, so have its tasks
        with contextlib.suppress(Exception):
            for reference in tasks:
                self._ray.cancel(reference, force=True)
            if tasks:
                self._ray.wait(tasks, num_returns=len(tasks), timeout=CLOSING)
        if self._news is not None:
            with contextlib.suppress(Exception):
                self._news.shutdown(force=True)
            self._news = None
        if self._connected:
            self._ray.shutdown()
            self._connected = False


def import_ray() -> Any:
    """Return the module `ray`. Raise `ImportError` with an install command if it is missing."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'A sweep on a cluster needs Ray. Run `pip install "hf-familial[ray]"` on every node.'
        ) from error
    return ray


def _do(line: str, threads: int, news: Any) -> str:
    """Execute a run as a Ray task. Send its progress to `news`, and return its last event."""
    # imported here, because `python -m` warns if its module is imported already
    from ._worker import run_task

    torch.set_num_threads(threads)
    ended = []

    def tell(event: WorkerEvent) -> None:
        if event.kind != "progress":
            ended.append(event.to_json())
            return
        # a run must not fail because an event cannot be sent
        with contextlib.suppress(Exception):
            news.put_nowait(event.to_json())

    run_task(RunTask.from_json(line), tell)
    return ended[-1]
