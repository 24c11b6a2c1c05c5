"""An executor on a Ray cluster: one Ray task for each run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import DesignError, SweepError
from ._messages import RunTask, WorkerEvent
from .executors import thread_variables


CLOSING = 30.0  # seconds that cancelled tasks have to end


class RayExecutor:
    """Does each run as one Ray task; Ray decides where and when.

    A run that loses its node or its worker is `lost`. The sweep submits it again, and it resumes
    from its checkpoint elsewhere. Ray's own retries are off, for they have no end where memory is
    short, and they would not be counted. Every node must see the sweep's folder.

    Args:
        address (`str`, *optional*): Cluster: `host:6379`, `ray://host:10001` or `auto`; by default
            `$RAY_ADDRESS`, else a cluster that runs on this machine, else a new one on it.
        cpus (`int`, *optional*, defaults to 1): Processors of each run, shared out as threads among
            its processes; the last bits of a loss depend on them.
        gpus (`float`, *optional*, defaults to 0): Accelerators of each run: a whole number, or a
            share of one below 1 where several small runs fit on it.
        slots (`int`, *optional*): Runs submitted to Ray at once; by default as many as the living
            nodes have room for. A cluster that grows on demand needs it, for it grows when runs
            wait.
        runtime_env (`Mapping[str, Any]`, *optional*): Ray's `runtime_env` of the job: variables,
            packages, code.

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
                raise DesignError(f"`{name}` must be a whole number from 1 up, got {value}.", name)
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise DesignError(
                f"`gpus` must be a whole number, or a share of one below 1, got {gpus}.", "gpus"
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
        """Connect to the cluster; a `SweepError` if no node has room for a run."""
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = self._ray
        if not ray.is_initialized():
            env = self.runtime_env or None
            ray.init(self.address, runtime_env=env, log_to_driver=False, logging_level="warning")
            self._connected = True
        elif self.runtime_env:
            raise SweepError("`runtime_env` belongs into your own `ray.init`, which came first.")
        self._count_slots()
        # beside the sweep, so that no other node's loss takes it away
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._do = ray.remote(_do)

    def _count_slots(self) -> None:
        """Have as many slots as living nodes have room for."""
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
                f"GPUs; they have {has or 'gone'}. Give `slots` if the cluster grows on demand."
            )
        self.slots = max(1, room)

    def submit(self, task: RunTask) -> None:
        """Submit a run to Ray, which queues it until a node has room."""
        if task.processes > 1 and 0 < self.gpus < task.processes:
            raise DesignError(
                f"`gpus` must be one for each of {task.processes} processes, got {self.gpus}.",
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
        """Return the news; a run whose node or worker is gone is `lost`."""
        if not self._tasks:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        # news of a run that ended, or was lost, would come too late after its end
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
            # before the run began: the package is not there, or another version of it
            message = f"{type(error.cause).__name__}: {error.cause}"
            return WorkerEvent("failed", run_id, message=message, trace=str(error))
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            return WorkerEvent("lost", run_id, message=f"{type(error).__name__}: {first}")

    def close(self) -> None:
        """Kill what still runs, and leave the cluster."""
        tasks, self._tasks = list(self._tasks), {}
        # a cluster that is gone has ended them itself
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
    """Import the `ray` package, or say how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'a sweep on a cluster needs Ray: `pip install "hf-familial[ray]"`, on every node.'
        ) from error
    return ray


def _do(line: str, threads: int, news: Any) -> str:
    """Do a run as a Ray task: send its progress, return how it ended."""
    # here, or a worker that starts as a module of its own would find itself imported already
    from ._worker import run_task

    torch.set_num_threads(threads)
    ended = []

    def tell(event: WorkerEvent) -> None:
        if event.kind != "progress":
            ended.append(event.to_json())
            return
        # a run must not fail for its news
        with contextlib.suppress(Exception):
            news.put_nowait(event.to_json())

    run_task(RunTask.from_json(line), tell)
    return ended[-1]
