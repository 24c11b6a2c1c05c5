"""Parts of a sweep under stress: full disks, torn files, displays, workers that misbehave."""

import errno
import io
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sweep_harness import Here, assert_same_sweep, design_of, rows_of

from hf_familial.errors import DesignError, StoppedSweepError
from hf_familial.isoflop import (
    Failure,
    IsoFlopDesign,
    LocalExecutor,
    RunTask,
    Sweep,
    SweepDisplay,
    SweepFolder,
    WorkerEvent,
)
from hf_familial.isoflop._display import Progress
from hf_familial.isoflop._worker import _is_full, serve_one
from hf_familial.runs import Backbone, RunRecord


PLANS = design_of("stdlib", seeds=(0, 1)).runs()  # nothing is read for them


@pytest.fixture(scope="module")
def undisturbed(design: IsoFlopDesign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    Sweep(design, folder, Here()).run()
    return folder


def record_of(plan: Any, **fields: Any) -> RunRecord:
    losses = tuple(2.0 + k for k in range(plan.G))
    usual: dict[str, Any] = {
        "run_id": plan.id,
        "N_total": 1,
        "N_non_embedding": 1,
        "N_active": 1,
        "D_tokens": plan.tokens,
        "C_flops": plan.flops,
        "G": plan.G,
        "exits": plan.exits,
        "seed": plan.seed,
        "lr": plan.lr,
        "batch_tokens": plan.batch_tokens,
        "seq_len": plan.seq_length,
        "vocab_size": 300,
        "data": "noise",
        "backbone": Backbone("llama", plan.width, plan.depth),
        "wall_s": 90.0,
        "tokens_per_s": 1.0,
        "code_version": "0",
        "status": "finished",
    }
    for name in ("loss", "eval_loss"):
        usual |= {f"{name}_mean": 2.0, f"{name}_exits": losses, f"{name}_final": losses[-1]}
    return RunRecord(**(usual | fields))


# full disks


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files may not grow beyond this many bytes: writing fails as on a full disk, for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 30_000])
def test_no_room_for_a_checkpoint(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path, size: int
) -> None:
    limits: list[Any] = []

    def hear(event: WorkerEvent) -> None:
        if event.kind == "progress" and event.step == 8:
            limits.append(largest_file(size))
            limits[0].__enter__()

    executor = Here(hear=hear)
    try:
        with pytest.raises(StoppedSweepError, match="All runs would fail like this"):
            Sweep(design, tmp_path, executor, save_seconds=0).run()
    finally:
        limits[0].__exit__(None, None, None)
    assert executor.closed == 1
    run_id = design.runs()[0].id
    # the checkpoint before is whole
    assert SweepFolder(tmp_path).steps_saved(run_id) == 6
    again = Here()
    Sweep(design, tmp_path, again, save_seconds=0).run()
    assert again.submitted == [plan.id for plan in design.runs()]
    assert_same_sweep(tmp_path, undisturbed)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["runs.jsonl", "evaluations.jsonl"])
def test_no_room_for_a_row(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    executor = Here()
    # reading the device would never end, so its rows are taken to be none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepFolder, "repair", lambda self: None)
        patch.setattr(SweepFolder, "rows", lambda self: {})
        patch.setattr(SweepFolder, "read", _read_unless_full)
        with pytest.raises(OSError, match="No space left") as caught:
            Sweep(design, tmp_path, executor).run()
    assert caught.value.errno == errno.ENOSPC
    assert (len(executor.submitted), executor.closed) == (1, 1)
    (tmp_path / name).unlink()
    again = Here()
    assert Sweep(design, tmp_path, again).run().done_now == 2
    assert again.submitted == [design.runs()[1].id]
    assert_same_sweep(tmp_path, undisturbed)


def _read_unless_full(self: SweepFolder, *names: str) -> str | None:
    path = Path(self.path(*names))
    return None if path.is_symlink() or not path.exists() else path.read_text()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("needs the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kib", [0, 20, 60, 120, 250])
def test_a_disk_that_is_full(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path, kib: int
) -> None:
    """Whatever is the first that does not fit."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        filler = disk / "filler"

        def before(task: RunTask) -> None:
            if not filler.exists():
                found = os.statvfs(disk)
                filler.write_bytes(b"0" * (found.f_bavail * found.f_frsize - kib * 1024))

        executor = Here(before=before)
        with pytest.raises(StoppedSweepError, match="No space left on device"):
            Sweep(design, disk / "sweep", executor, save_seconds=0).run()
        assert len(executor.submitted) == 1
        filler.unlink()
        Sweep(design, disk / "sweep", Here(), save_seconds=0).run()
        assert_same_sweep(disk / "sweep", undisturbed)


def test_a_disk_that_cannot_be_written(design: IsoFlopDesign, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            Sweep(design, disk / "sweep", Here()).run()


def test_a_folder_that_cannot_be(design: IsoFlopDesign, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    executor = Here()
    for folder in (tmp_path / "file", tmp_path / "file" / "sweep"):
        with pytest.raises(OSError, match="file"):
            Sweep(design, folder, executor).run()
    assert executor.submitted == []
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disks_in_the_words_of_hosts() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    outer = RuntimeError("could not save")
    outer.__cause__ = full
    hidden = RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
    assert all(_is_full(error) for error in (full, outer, hidden))
    assert not any(_is_full(error) for error in (None, OSError(errno.EIO, "x"), ValueError("x")))


# files that a crash left


@given(
    rows=st.lists(st.dictionaries(st.text(), st.integers() | st.text()), max_size=4),
    cut=st.integers(0, 400),
)
def test_mending_keeps_whole_lines_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], cut: int
) -> None:
    folder = SweepFolder(tmp_path_factory.mktemp("torn"))
    path = Path(folder.path("runs.jsonl"))
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    content = b"".join(lines)
    cut = min(cut, len(content))
    path.write_bytes(content[:cut])
    folder.repair()
    whole, size = b"", 0
    for line in lines:
        size += len(line)
        # its end alone may be missing
        whole += line if size <= cut + 1 else b""
    assert path.read_bytes() == whole
    folder.repair()
    assert path.read_bytes() == whole


def test_mending_clears_half_written_files(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.write("{}", "data.json")
    for name in (f".state.json.{'0a' * 16}", ".lock", ".state.json.mine", "note.txt"):
        (tmp_path / name).write_text("x")
    folder.repair()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".lock", ".state.json.mine", "data.json", "note.txt"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.write("old", "a", "b.json")
    with largest_file(2), pytest.raises(OSError, match="too large"):
        folder.write("new and longer", "a", "b.json")
    assert folder.read("a", "b.json") == "old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    assert folder.read("a", "none") is None
    folder.write("[1]", "list.json")
    folder.write("{torn", "torn.json")
    assert [folder.read_json(name) for name in ("list.json", "torn.json", "none")] == [{}, {}, {}]


# displays


@given(
    steps=st.lists(
        st.tuples(st.integers(0, len(PLANS) - 1), st.floats(0, 1), st.booleans()), max_size=30
    )
)
def test_a_tally_stays_in_its_bounds(steps: list[tuple[int, float, bool]]) -> None:
    tally = Progress(sum(plan.flops for plan in PLANS))
    for index, share, before in steps:
        plan = PLANS[index]
        tally.put(plan, round(share * plan.steps), before)
        assert 0 <= tally.share <= 1 + 1e-12
        assert tally.rate >= 0
        assert (tally.left() == "?") == (tally.rate == 0)


def test_a_tally_knows_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, other = PLANS[0], PLANS[1]
    tally = Progress(plan.flops + other.flops, start=0.0)
    monkeypatch.setattr("hf_familial.isoflop._display.time.monotonic", lambda: 100.0)
    assert (tally.share, tally.left()) == (0.0, "?")
    tally.put(other, other.steps, before=True)
    tally.put(plan, plan.steps // 2, before=True)
    assert tally.rate == 0
    tally.put(plan, plan.steps * 3 // 4)
    # a quarter of a run in 100 seconds: as much is left
    assert tally.rate == pytest.approx(plan.flops / 4 / 100)
    assert tally.share == pytest.approx(1 - plan.flops / 4 / tally.total)
    assert tally.left() == "1.7 min"
    # taken up again after a failure, from where it was: that work was of this start
    tally.put(plan, plan.steps * 3 // 4, before=True)
    assert tally.rate == pytest.approx(plan.flops / 4 / 100)


def told(terminal: bool = False, **choices: Any) -> tuple[SweepDisplay, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80, color_system=None)
    return SweepDisplay(console, **choices), text


def play(display: SweepDisplay) -> None:
    first, second, third, fourth = PLANS
    display.begin(PLANS, [fourth])
    display.progress(first, WorkerEvent("progress", first.id, 0))
    display.progress(first, WorkerEvent("progress", first.id, 10, 3.25, 2e9))
    display.ended(first, record_of(first))
    display.progress(second, WorkerEvent("progress", second.id, 4, None, None))
    display.failed(second, Failure(1, 0, "boom [not markup]"), True)
    display.failed(second, Failure(2, 0, "boom"), False)
    display.ended(third, record_of(third, status="diverged", eval_loss_exits=(None,) * third.G))
    display.close()


def test_plain_lines_where_there_is_no_terminal() -> None:
    display, text = told(seconds=0)
    play(display)
    said = text.getvalue()
    lines = said.splitlines()
    assert "\x1b" not in said
    assert "\r" not in said
    assert lines[0].startswith("1 of 4 runs done, ")
    assert "step 10/20, loss 3.250, 2.0 GFLOP/s" in said
    ids = [plan.id[:8] for plan in PLANS]
    assert f"2/4 {ids[0]} C=4.3e+07 16x2 G=1 s0 finished: eval loss 2.0000, 1.5 min" in said
    assert any("failed and is tried again: boom [not markup]" in line for line in lines)
    assert any("failed and is given up: boom" in line for line in lines)
    assert any(line.startswith(f"3/4 {ids[2]}") and "diverged" in line for line in lines)
    assert display.summary().startswith("3/4 runs, 1 given up, ")


def test_lines_of_progress_are_few() -> None:
    display, text = told(seconds=3600)
    display.begin(PLANS, [])
    for step in range(20):
        display.progress(PLANS[0], WorkerEvent("progress", PLANS[0].id, step, 3.0, 1e9))
    assert len(text.getvalue().splitlines()) == 1


def test_bars_where_there_is_one() -> None:
    display, text = told(terminal=True)
    display.begin(PLANS, [PLANS[3]])
    assert display._bars is not None
    display.progress(PLANS[0], WorkerEvent("progress", PLANS[0].id, 10, 3.25, 2e9))
    display._bars.refresh()
    bars = text.getvalue().splitlines()[-2:]
    assert "all runs" in bars[0]
    assert "1/4 runs, " in bars[0]
    assert bars[0].rstrip().endswith(" left")
    assert f"{PLANS[0].id[:8]} C=4.3e+07 16x2 G=1 s0" in bars[1]
    assert bars[1].rstrip().endswith("step 10/20, loss 3.250, 2.0 GFLOP/s")
    display.close()
    again, text = told(terminal=True)
    play(again)
    said = text.getvalue()
    assert "\x1b[" in said
    assert "2/4 " in said
    assert "failed and is given up: boom" in said
    plain, _ = told(terminal=False)
    plain.begin(PLANS, [])
    assert plain._bars is None


def test_a_display_closes_before_it_begins() -> None:
    for terminal in (False, True):
        told(terminal)[0].close()


def test_a_sweep_tells_how_it_goes(design: IsoFlopDesign, tmp_path: Path) -> None:
    display, text = told(seconds=0)
    failed: list[str] = []

    def hear(event: WorkerEvent) -> None:
        if event.kind == "progress" and event.step == 4 and event.run_id not in failed:
            failed.append(event.run_id)
            raise RuntimeError("once")

    Sweep(design, tmp_path, Here(hear=hear), retries=1, display=display).run()
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("0 of 2 runs done")
    assert sum("failed and is tried again: RuntimeError: once" in line for line in lines) == 2
    assert [line.split()[0] for line in lines if "finished: eval loss" in line] == ["1/2", "2/2"]
    losses = {row["run_id"][:8]: row["eval_loss_final"] for row in rows_of(tmp_path)}
    assert all(any(f"{loss:.4f}" in line for line in lines) for loss in losses.values())


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
    with pytest.raises(RuntimeError, match="all 1 workers have a task"):
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


# what is handed over


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
