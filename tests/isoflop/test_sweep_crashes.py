"""Signal 9 for sweeps and their workers, whenever: rows are those of a sweep left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from huggingface_hub import constants
from sweep_harness import Here, assert_same_sweep, design_of, rows_of, write_corpus

from hf_familial.isoflop import Fixed, IsoFlopDesign, Sweep


pytestmark = pytest.mark.slow

# whom the 30 signals hit, and when
VICTIMS = {"sweep": 7, "all": 3, "worker": 16, "workers": 4}
MOMENTS = {"training": 19, "saving": 6, "starting": 5}
LIMIT = 900  # seconds that anything may take on a busy machine
SCRIPT = """
import sys
from hf_familial.isoflop import IsoFlopDesign, LocalExecutor, Sweep

design, folder, workers, processes = sys.argv[1:]
executor = LocalExecutor(int(workers), threads=1, log_dir=folder + "-logs")
options = {"retries": 1000, "save_seconds": 0.2, "processes": int(processes)}
outcome = Sweep(IsoFlopDesign.from_yaml(design), folder, executor, **options).run()
sys.exit(bool(outcome.failed))
"""


@dataclass
class Nursery:
    """Starts sweeps as processes of their own, and knows all that came of them."""

    home: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def start(
        self, design: IsoFlopDesign, folder: Path, workers: int = 2, processes: int = 1
    ) -> "Life":
        path = self.home / "design.yaml"
        path.write_text(design.to_yaml())
        environment = {
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-c", SCRIPT, path, folder, str(workers), str(processes)]
        with (self.home / "log").open("ab") as log:
            process = subprocess.Popen(command, env=os.environ | environment, stderr=log)
        self.seen[process.pid] = psutil.Process(process.pid)
        return Life(process, folder, self)

    def living(self) -> list[psutil.Process]:
        return [p for p in self.seen.values() if p.is_running() and p.status() != "zombie"]


@dataclass
class Life:
    """One process of a sweep, from its start to its end."""

    process: subprocess.Popen[bytes]
    folder: Path
    nursery: Nursery

    def family(self) -> list[psutil.Process]:
        """Its workers and theirs, the nearest first."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.nursery.seen |= {child.pid: child for child in found}
        return found

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.family() if child.ppid() == self.process.pid]

    def over(self) -> bool:
        return self.process.poll() is not None

    def wait(self, met: Callable[[], object] = lambda: False) -> bool:
        """Until something is met, or it is over; gives whether it lives."""
        start = looked = time.monotonic()
        while not met() and not self.over():
            if time.monotonic() - looked > 1:  # it looks at every process of the machine
                self.family()
                looked = time.monotonic()
                assert looked - start < LIMIT, "a sweep takes forever"
            time.sleep(0.01)
        return not self.over()

    def kill(self) -> None:
        self.family()
        self.process.kill()
        self.process.wait()


def pointers(folder: Path) -> dict[str, str]:
    """The checkpoint of every run that has one."""
    found = {}
    for path in folder.glob("runs/*/checkpoint.json"):
        try:
            found[path.parent.name] = path.read_text()
        except FileNotFoundError:
            continue
    return found


def torn_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    known = {(name, json.loads(text)["step"]) for name, text in pointers(folder).items()}
    paths = folder.glob("runs/*/checkpoint-*")
    return any((path.parent.name, int(path.name.split("-")[1])) not in known for path in paths)


def end_of(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    home = tmp_path / "home"
    home.mkdir()
    nursery = Nursery(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(home))
        yield nursery
    end_of(nursery.living())


def assert_no_orphans(nursery: Nursery) -> None:
    """Workers end with their sweep; one that imports does so once it has."""
    deadline = time.monotonic() + 120
    while left := nursery.living():
        assert time.monotonic() < deadline, f"orphans: {[p.cmdline() for p in left]}"
        time.sleep(0.1)


def strike(life: Life, when: str, whom: str, chance: random.Random) -> bool:
    """Kill somebody at a moment; gives whether there was anybody."""
    if when == "training":
        before = pointers(life.folder)
        alive = life.wait(lambda: pointers(life.folder) != before)
        time.sleep(chance.uniform(0, 0.6))
    elif when == "saving":
        alive = life.wait(lambda: torn_checkpoint(life.folder))
        time.sleep(chance.uniform(0, 0.02))
    else:
        alive = life.wait(life.workers)
        time.sleep(chance.uniform(0, 4))
    if not alive or life.over():
        return False
    workers = life.workers()
    if whom in ("sweep", "all"):
        life.kill()
    one = chance.sample(workers, min(1, len(workers)))
    end_of({"sweep": [], "worker": one}.get(whom, workers))
    return True


def test_signal_9_at_random_moments(nursery: Nursery, tmp_path: Path) -> None:
    """Of the sweep, of a worker, of all; in training, in saving, in starting."""
    design = design_of(
        write_corpus(tmp_path / "corpus"),
        budgets=(2.15e8, 4.3e8),
        seeds=(0, 1),
        rule=Fixed(lr=5e-3, batch_tokens=32),
        training={"logging_steps": 5, "eval_steps": 40},
    )
    start = time.monotonic()
    Sweep(design, tmp_path / "undisturbed", Here(), save_seconds=1e9).run()
    alone = time.monotonic() - start
    assert len(rows_of(tmp_path / "undisturbed")) == len(design.runs()) == 8

    chance, dealt, folders, lives = random.Random(9), Counter[str](), 0, 0
    moments, victims = ([*Counter(counts).elements()] for counts in (MOMENTS, VICTIMS))
    chance.shuffle(moments)
    chance.shuffle(victims)
    plan = list(zip(moments, victims, strict=True))
    while plan or folders == 0:
        folder, folders = tmp_path / f"disturbed-{folders}", folders + 1
        done = False
        while not done:
            life, lives = nursery.start(design, folder), lives + 1
            while plan and not life.over():
                if strike(life, *plan[-1], chance):
                    dealt["/".join(plan.pop())] += 1
            done = not life.wait() and life.process.returncode == 0
            assert done or life.process.returncode == -signal.SIGKILL
        assert_same_sweep(folder, tmp_path / "undisturbed")
        assert_no_orphans(nursery)
    assert dealt.total() == sum(VICTIMS.values()) == 30
    took = time.monotonic() - start
    print(f"{dealt}, {folders} sweeps, {lives} starts, {alone:.0f} s alone, {took:.0f} s in all")


def test_a_run_that_two_processes_share(nursery: Nursery, tmp_path: Path) -> None:
    """Tokens and FLOPs are those of the plan; signal 9 in training changes nothing."""
    design = design_of(
        write_corpus(tmp_path / "corpus"),
        granularities=(1,),
        budgets=(4.3e8,),
        training={"logging_steps": 5, "eval_steps": 100},
    )
    (plan,) = design.runs()
    whole = nursery.start(design, tmp_path / "whole", workers=1, processes=2)
    assert not whole.wait()
    assert whole.process.returncode == 0
    (row,) = rows_of(tmp_path / "whole")
    assert (row["status"], row["run_id"]) == ("finished", plan.id)
    assert (row["D_tokens"], row["batch_tokens"]) == (plan.tokens, plan.batch_tokens)
    assert row["C_flops"] == pytest.approx(plan.flops, rel=1e-12)
    points = rows_of(tmp_path / "whole", "evaluations.jsonl")
    assert points[-1]["D_tokens"] == plan.tokens
    assert points[-1]["eval_loss_exits"] == row["eval_loss_exits"]

    folder = tmp_path / "torn"
    life = nursery.start(design, folder, workers=1, processes=2)
    assert life.wait(lambda: pointers(folder))
    # the worker, what it launched, and the two processes
    assert len(life.family()) >= 4
    end_of(life.workers())
    saved = pointers(folder)
    assert life.wait(lambda: pointers(folder) != saved)
    life.kill()
    assert_no_orphans(nursery)
    life = nursery.start(design, folder, workers=1, processes=2)
    assert not life.wait()
    assert life.process.returncode == 0
    assert_same_sweep(folder, tmp_path / "whole")
    assert_no_orphans(nursery)
