"""Workers that die or misbehave, and the lines between them and the sweep."""

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_harness import design_of

from hf_familial.errors import DesignError
from hf_familial.isoflop import (
    LocalExecutor,
    RunTask,
    WorkerEvent,
)
from hf_familial.isoflop._worker import serve_one


PLANS = design_of("stdlib", seeds=(0, 1)).runs()  # nothing is read for them

# workers of their own


class Fake(LocalExecutor):
    """Its workers run a few lines of Python instead."""

    def __init__(self, code: str, workers: int = 1) -> None:
        super().__init__(workers, threads=1)
        self.code = code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []
    popen = subprocess.Popen

    def build(code: str, workers: int = 1) -> Fake:
        def start(command: list[str], **choices: Any) -> Any:
            return popen([sys.executable, "-c", code], **choices)

        monkeypatch.setattr("hf_familial.isoflop.executors.subprocess.Popen", start)
        made.append(Fake(code, workers))
        return made[-1]

    yield build
    for executor in made:
        executor.close()


def events_of(executor: LocalExecutor, count: int = 1) -> list[WorkerEvent]:
    events: list[WorkerEvent] = []
    for _ in range(600):
        events += executor.poll(0.1)
        if len(events) >= count:
            break
    return events


TASK = RunTask(PLANS[0], "nowhere")
DIES = "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"
HALF = """
import sys, os
sys.stdin.readline()
print('{"kind": "prog', end="", flush=True)
os._exit(3)
"""
BABBLES = "import sys, time; sys.stdin.readline(); print('hello', flush=True); time.sleep(600)"
FINISHES = f"""
import sys, json
for line in sys.stdin:
    print(json.dumps({{"kind": "progress", "run_id": "another"}}), flush=True)
    print(json.dumps({{"kind": "finished", "run_id": {PLANS[0].id!r}}}), flush=True)
"""


@pytest.mark.parametrize(("code", "how"), [(DIES, "signal 9"), (HALF, "code 3")])
def test_a_worker_that_dies_is_replaced(fake: Callable[..., Fake], code: str, how: str) -> None:
    executor = fake(code)
    executor.start()
    for _ in range(2):
        executor.submit(TASK)
        (event,) = events_of(executor)
        assert (event.kind, event.run_id) == ("lost", PLANS[0].id)
        assert f"ended with {how}" in event.message


def test_a_worker_that_babbles_is_ended(
    fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_familial.isoflop.executors.PATIENCE", 0.2)
    executor = fake(BABBLES)
    executor.start()
    executor.submit(TASK)
    (event,) = events_of(executor)
    assert (event.kind, event.run_id) == ("lost", PLANS[0].id)


def test_what_is_not_of_the_task_is_not_heard(fake: Callable[..., Fake]) -> None:
    executor = fake(FINISHES)
    executor.start()
    executor.submit(TASK)
    with pytest.raises(RuntimeError, match="all 1 workers are busy"):
        executor.submit(TASK)
    assert [event.kind for event in events_of(executor)] == ["finished"]
    executor.submit(TASK)
    assert [event.kind for event in events_of(executor)] == ["finished"]


def test_workers_end_with_their_executor(fake: Callable[..., Fake]) -> None:
    executor = fake("import time; time.sleep(600)", workers=2)
    executor.start()
    processes = [worker.process for worker in executor._workers]
    executor.close()
    assert [process.returncode for process in processes] == [-9, -9]
    executor.close()


@pytest.mark.parametrize("choice", [{"workers": 0}, {"threads": -1}])
def test_wrong_numbers_of_workers(choice: dict[str, int]) -> None:
    (name,) = choice
    with pytest.raises(DesignError, match=f"`{name}` must be 1 or more"):
        LocalExecutor(**choice)


# messages


@given(
    step=st.integers(0, 10**9),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    message=st.text(),
)
def test_events_survive_a_line(step: int, loss: float | None, message: str) -> None:
    event = WorkerEvent("failed", "x", step, loss, None, message, message, True)
    line = event.to_json()
    assert "\n" not in line
    assert WorkerEvent.from_json(line) == event


def test_tasks_survive_a_line() -> None:
    for plan in PLANS:
        task = RunTask(plan, "s3://bucket/sweep", "abc", 0.5, 2, True)
        line = task.to_json()
        assert "\n" not in line
        back = RunTask.from_json(line)
        assert back == task
        assert math.isclose(back.plan.flops, plan.flops, rel_tol=0)
    with pytest.raises(DesignError, match="`save_seconds` must be a finite number"):
        replace(TASK, save_seconds=math.nan)


def test_one_of_several_processes_raises(home: Path, tmp_path: Path) -> None:
    """What goes wrong there must end its process, not become an event."""
    plan = replace(PLANS[0], data=str(tmp_path / "gone"))
    path = tmp_path / "task.json"
    path.write_text(RunTask(plan, str(tmp_path / "sweep")).to_json())
    with pytest.raises(FileNotFoundError, match="must be a file or a folder that exists"):
        serve_one(str(path), os.getpid(), io.StringIO())
