"""Sweeps on a Ray cluster: two simulated nodes on this machine, one of which dies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from hf_familial.errors import DesignError, SweepError
from hf_familial.isoflop import IsoFlopDesign, LocalExecutor, RunTask, Sweep, SweepFolder
from hf_familial.isoflop._folder import ROWS
from hf_familial.isoflop.ray import RayExecutor, import_ray


DESIGN = IsoFlopDesign.from_dict(
    {
        "budgets": [2e10],
        "sizes": ["32x2", "48x3"],
        "vocab_size": 512,
        "seq_length": 64,
        "granularities": [1, 2],
        "backbone": {"head_dim": 16, "multiple": 16},
        "rule": {"kind": "fixed", "lr": 3e-3, "batch_tokens": 128},
        "training": {"max_train_bytes": 1_000_000, "max_eval_tokens": 8192, "eval_steps": 0.5},
    }
)


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"hf-familial\[ray\]"):
        import_ray()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cpus": 0}, "`cpus`"),
        ({"cpus": 1.5}, "`cpus`"),
        ({"gpus": -1}, "`gpus`"),
        ({"gpus": 1.5}, "`gpus`"),
        ({"slots": 0}, "`slots`"),
    ],
)
def test_wrong_requests_are_refused(options, named):
    pytest.importorskip("ray")
    with pytest.raises(DesignError, match=named):
        RayExecutor(**options)


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}}


@pytest.mark.parametrize(
    ("nodes", "options", "slots"),
    [
        ([node(4), node(4)], {}, 8),
        # a run stays on one node: 4 + 4 processors are no 6
        ([node(4), node(4)], {"cpus": 3}, 2),
        ([node(4, 1), node(16, 2), node(64)], {"cpus": 3, "gpus": 1}, 3),
        ([node(4, 1), node(4, 1, alive=False)], {"gpus": 0.25}, 4),
        ([node(2)], {"slots": 64, "gpus": 8}, 64),
    ],
)
def test_slots_are_what_living_nodes_have_room_for(nodes, options, slots):
    pytest.importorskip("ray")
    executor = RayExecutor(**options)
    executor._ray = SimpleNamespace(nodes=lambda: nodes)
    executor._count_slots()
    assert executor.slots == slots


def test_a_request_that_no_node_can_meet_is_refused():
    pytest.importorskip("ray")
    executor = RayExecutor(cpus=8, gpus=1)
    executor._ray = SimpleNamespace(nodes=lambda: [node(4, 1), node(64)])
    with pytest.raises(SweepError, match=r"8 CPUs \+ 1 GPUs. The nodes have 4 \+ 1, 64 \+ 0"):
        executor._count_slots()


def test_processes_of_a_run_need_an_accelerator_each():
    pytest.importorskip("ray")
    task = RunTask(DESIGN.runs()[0], "folder", processes=2)
    with pytest.raises(DesignError, match="`gpus` must be at least 1 for each of 2 processes"):
        RayExecutor(gpus=1).submit(task)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What the workers of every node inherit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def cluster(home):
    """A head of one processor and one accelerator, which is there in name only."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    config = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "num_gpus": 1,
            "include_dashboard": False,
            "_system_config": config,
        },
    )
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """Rows of the design, done by worker processes of this machine."""
    folder = tmp_path_factory.mktemp("local")
    assert Sweep(DESIGN, folder, LocalExecutor(workers=2, threads=1)).run().done_now == 4
    return rows_of(folder)


def rows_of(folder: Path) -> dict[str, dict]:
    """Rows by run, wall times aside; fails if a run stands there twice."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    assert len({row["run_id"] for row in rows}) == len(rows)
    timed = ("wall_s", "tokens_per_s")
    return {r["run_id"]: {k: v for k, v in r.items() if k not in timed} for r in rows}


@dataclass
class Watched:
    """An executor that keeps what is heard of its runs, and is disturbed once they are saved.

    Runs count as saved when each of `most` runs has a checkpoint.
    """

    inner: RayExecutor
    folder: Path
    disturb: Callable[[], None]
    most: int
    heard: list = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        return self.inner.slots

    def start(self):
        self.inner.start()
        self.submit, self.close = self.inner.submit, self.inner.close

    def poll(self, seconds):
        runs = self.inner._tasks.values()
        steps = {run_id: SweepFolder(self.folder).steps_saved(run_id) for run_id in runs}
        if not self.saved and len(steps) == self.most and all(steps.values()):
            self.saved = steps
            self.disturb()
        events = self.inner.poll(seconds)
        self.heard += events
        return events


@pytest.mark.slow
def test_a_node_dies_in_mid_run(cluster, undisturbed, tmp_path):
    doomed = cluster.add_node(num_cpus=1)

    def kill():
        assert executor.slots == 2
        cluster.remove_node(doomed, allow_graceful=False)

    executor = Watched(RayExecutor(cluster.address), tmp_path, kill, most=2)
    outcome = Sweep(DESIGN, tmp_path, executor, save_seconds=0).run()

    assert (outcome.done_now, outcome.failed, executor.slots) == (4, {}, 1)
    assert rows_of(tmp_path) == undisturbed
    kinds = [event.kind for event in executor.heard]
    assert (kinds.count("lost"), kinds.count("finished"), kinds.count("failed")) == (1, 4, 0)
    lost = executor.heard[kinds.index("lost")]
    later = [e for e in executor.heard[kinds.index("lost") + 1 :] if e.run_id == lost.run_id]
    # it went on from its checkpoint, not from the start
    assert 0 < executor.saved[lost.run_id] <= later[0].step
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


ONE = replace(DESIGN, budgets=(4e10,), sizes=("48x3",), granularities=(1,))
KILLED = """
import sys
from hf_familial.isoflop import IsoFlopDesign, Sweep
from hf_familial.isoflop.ray import RayExecutor
design, folder, address = sys.argv[1:]
Sweep(IsoFlopDesign.parse(design), folder, RayExecutor(address), save_seconds=0).run()
"""


@pytest.mark.slow
def test_no_run_outlives_its_sweep(cluster, tmp_path):
    """First the sweep's process is killed, then a user breaks it off, then it is let be."""
    (plan,) = ONE.runs()
    folder = SweepFolder(tmp_path)
    lock = FileLock(tmp_path / "runs" / plan.id / ".lock")

    def saved_when_free() -> int:
        with lock.acquire(timeout=60):
            return folder.steps_saved(plan.id)

    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, ONE.to_yaml(), str(tmp_path), cluster.address]
    )
    deadline = time.monotonic() + 180
    while not folder.steps_saved(plan.id):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    first = saved_when_free()
    assert 0 < first < plan.steps

    def interrupt():
        raise KeyboardInterrupt

    # half an accelerator, which no other run asks for
    executor = Watched(RayExecutor(cluster.address, gpus=0.5), tmp_path, interrupt, most=1)
    with pytest.raises(KeyboardInterrupt):
        Sweep(ONE, tmp_path, executor, save_seconds=0).run()
    second = saved_when_free()
    assert first <= second < plan.steps
    time.sleep(2)
    assert folder.steps_saved(plan.id) == second

    outcome = Sweep(ONE, tmp_path, RayExecutor(cluster.address, slots=3)).run()
    assert (outcome.done_now, outcome.failed) == (1, {})
    alone = tmp_path / "alone"
    Sweep(ONE, alone, LocalExecutor(workers=1, threads=1)).run()
    assert rows_of(tmp_path) == rows_of(alone)
