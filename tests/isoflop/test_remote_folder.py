"""A sweep whose folder is behind a URL: what it sends and fetches, its lock, and its crashes."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from huggingface_hub import constants
from shelf import URL, Shelf, age, files, rows_of
from sweep_harness import Here, Killed, design_of, killed_at, write_corpus

from hf_familial.errors import RunRecordError, SweepLockedError
from hf_familial.isoflop import (
    Fixed,
    IsoFlopDesign,
    LocalExecutor,
    Sweep,
    SweepFolder,
    WorkerEvent,
    _folder,
)
from hf_familial.isoflop._folder import POINTER, ROWS
from hf_familial.isoflop._workspace import Workspace


LEFT = {"data.json", "designs", "evaluations.jsonl", "runs.jsonl"}  # of a sweep that is done


@pytest.fixture(scope="module")
def undisturbed(undisturbed: Path) -> dict[str, Any]:
    """Rows of a sweep in a folder of this machine's disk."""
    return rows_of(str(undisturbed))


@pytest.fixture(autouse=True)
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setattr(_folder, "SETTLED", 0.0)
    Shelf.clear()
    yield
    Shelf.clear()


# rows and checkpoints


def test_rows_are_those_of_a_local_sweep(design: IsoFlopDesign, undisturbed: dict) -> None:
    outcome = Sweep(design, URL, Here(), save_seconds=0).run()
    assert (outcome.done_now, outcome.failed) == (2, {})
    assert rows_of(URL) == undisturbed
    assert {name.split("/")[2] for name in files()} == LEFT
    assert Sweep(design, URL, Here()).run().done_now == 0


def test_a_killed_run_goes_on_from_its_checkpoint(design: IsoFlopDesign, undisturbed: dict) -> None:
    Shelf.revive()
    with pytest.raises(Killed):
        Sweep(design, URL, Here(hear=killed_at(5)), save_seconds=0).run()
    first = design.runs()[0]
    saved = SweepFolder(URL).steps_saved(first.id)
    # heard: 0, 2, 4, 6, 8; a checkpoint is sent before the next word
    assert saved == 6
    steps: list[int] = []
    again = Here(hear=lambda event: steps.append(event.step))
    outcome = Sweep(design, URL, again, save_seconds=0).run()
    assert (outcome.done_now, steps[0]) == (2, saved)
    assert rows_of(URL) == undisturbed


def dies(design: IsoFlopDesign, number: int, undisturbed: dict[str, Any]) -> bool:
    """A sweep dies at a write, and another one does the rest; gives whether there was one."""
    Shelf.clear()
    Shelf.revive(number)
    try:
        Sweep(design, URL, Here(), save_seconds=0, keep_models=True).run()
    except Killed:
        died = True
    else:
        died = False
    last = Shelf.writes[number - 1] if died else ""
    Shelf.revive()
    if died and SweepFolder(URL).read_json(_folder.LOCK):
        with pytest.raises(SweepLockedError, match="another sweep"):
            Sweep(design, URL, Here()).run()
        age()
    outcome = Sweep(design, URL, Here(), save_seconds=0, keep_models=True).run()
    assert outcome.failed == {}, last
    assert rows_of(URL) == undisturbed, last
    models = {name.split("/")[3] for name in files() if name.endswith("/model/model.safetensors")}
    assert models == {plan.id for plan in design.runs()}, last
    others = [name for name in files() if name.startswith("/sweep/runs/") and "/model/" not in name]
    assert others == [], last
    return died


@pytest.mark.parametrize("number", [1, 2, 5, 23, 37, 61])
def test_a_death_at_a_write_loses_nothing(
    design: IsoFlopDesign, undisturbed: dict, number: int
) -> None:
    assert dies(design, number, undisturbed)


@pytest.mark.slow
def test_no_death_loses_anything(design: IsoFlopDesign, undisturbed: dict) -> None:
    number = 1
    while dies(design, number, undisturbed):
        number += 3
    print(f"of {number - 1} writes, one in three was the last")
    assert number > 60


def test_a_row_is_written_once(design: IsoFlopDesign, undisturbed: dict) -> None:
    Sweep(design, URL, Here()).run()
    folder = SweepFolder(URL)
    for record in folder.rows().values():
        folder.add(record)
    assert rows_of(URL) == undisturbed


def test_a_wrong_row_is_named() -> None:
    folder = SweepFolder(URL)
    folder.write('\n{"run_id": "a"\n', ROWS)
    with pytest.raises(RunRecordError, match=r"sweep/runs\.jsonl, line 2: "):
        folder.rows()


# two workers of one run: one was given up, and lives on


def checkpoint(space: Workspace, step: int, by: str) -> None:
    """What a worker leaves on its own disk."""
    top = space.path / f"checkpoint-{step}"
    for name in ("model.safetensors", "optimizer.pt", "deep/state.json"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"{step} {by} {name}")


def fetched(folder: SweepFolder) -> tuple[str, set[str]] | None:
    """Name of the checkpoint that a new worker gets, and by whom its files are."""
    with Workspace(folder, "run").open() as path:
        if path is None:
            return None
        texts = [p.read_text() for p in path.rglob("*") if p.is_file()]
        assert len(texts) == 3
        return path.name, {" ".join(text.split()[:2]) for text in texts}


def test_workers_of_one_run_do_not_mix_their_checkpoints() -> None:
    folder = SweepFolder(URL)
    first, second = Workspace(folder, "run"), Workspace(SweepFolder(URL), "run")
    assert fetched(folder) is None
    with first.open(), second.open():
        for space, step, by in [
            (first, 2, "first"),
            (first, 4, "first"),
            (second, 4, "second"),
            (first, 6, "first"),
            (second, 6, "second"),
            (first, 8, "first"),
        ]:
            checkpoint(space, step, by)
            space.commit(step)
            assert folder.steps_saved("run") == step
            assert fetched(folder) == (f"checkpoint-{step}", {f"{step} {by}"})
    # nothing but the pointer and what it points to
    assert len(files()) == 4


def test_a_checkpoint_that_is_replaced_while_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SweepFolder(URL)
    other = Workspace(SweepFolder(URL), "run")
    get, calls = Shelf.get, []

    def replaced(self: Shelf, *args: Any, **options: Any) -> None:
        calls.append(args[0])
        if len(calls) == 1:
            other.commit(4)
        get(self, *args, **options)

    with other.open():
        for step in (2, 4):
            checkpoint(other, step, "other")
        other.commit(2)
        monkeypatch.setattr(Shelf, "get", replaced)
        assert fetched(folder) == ("checkpoint-4", {"4 other"})
    assert len(calls) == 2


def test_a_checkpoint_that_is_gone_is_done_without() -> None:
    folder = SweepFolder(URL)
    folder.write(json.dumps({"step": 4, "name": "checkpoint-4-gone"}), "runs", "run", POINTER)
    assert fetched(folder) is None


# the lock


def test_two_sweeps_do_not_share_a_folder(design: IsoFlopDesign) -> None:
    with SweepFolder(URL).hold():
        with pytest.raises(SweepLockedError, match=rf"process {os.getpid()} on .* 150 seconds"):
            Sweep(design, URL, Here()).run()
    assert files() == []
    with SweepFolder(URL).hold():
        pass


def test_a_stale_lock_is_taken_over_and_its_holder_stops(design: IsoFlopDesign) -> None:
    """The first holder slept, its lock became stale, a second sweep began, the first one woke."""
    Sweep(design, URL, Here()).run()
    record = next(iter(SweepFolder(URL).rows().values()))
    first, second = SweepFolder(URL), SweepFolder(URL)
    with first.hold():
        first.add(record)
        age()
        with second.hold():
            with pytest.raises(SweepLockedError, match="took over `shelf://sweep`"):
                first.add(replace(record, run_id="new"))
            second.add(record)
            theirs = second.read_json(_folder.LOCK)
    assert theirs["token"] != first.read_json(_folder.LOCK).get("token")
    assert "new" not in second.rows()


def test_who_lost_the_lock_leaves_the_new_one_alone() -> None:
    first, second = SweepFolder(URL), SweepFolder(URL)
    with first.hold():
        age()
        holding = second.hold()
        holding.__enter__()
    # the first one left last, and the second one still holds
    second.still_held()
    assert files() == ["/sweep/lock.json"]
    holding.__exit__(None, None, None)
    assert files() == []


def test_of_sweeps_that_start_at_once_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_folder, "SETTLED", 0.5)
    inside, refused = [], []
    together, over = threading.Barrier(6), threading.Event()

    def start(name: int) -> None:
        folder = SweepFolder(URL)
        together.wait()
        try:
            with folder.hold():
                inside.append(name)
                over.wait(5)
        except SweepLockedError:
            refused.append(name)
            if len(refused) == 5:
                over.set()

    threads = [threading.Thread(target=start, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inside), len(refused)) == (1, 5)


def test_a_lock_is_renewed_even_after_the_store_failed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_folder, "RENEWED", 0.02)
    folder, failures = SweepFolder(URL), [OSError("the store is away")]
    pipe = Shelf.pipe_file

    def away(self: Shelf, path: str, value: bytes, **options: Any) -> None:
        if failures and threading.current_thread() is not threading.main_thread():
            raise failures.pop()
        pipe(self, path, value, **options)

    monkeypatch.setattr(Shelf, "pipe_file", away)
    with folder.hold():
        age()
        old = folder.read_json(_folder.LOCK)["time"]
        deadline = time.monotonic() + 30
        while folder.read_json(_folder.LOCK)["time"] == old:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not failures
        with pytest.raises(SweepLockedError), SweepFolder(URL).hold():
            pass


# real processes, and real stores


class Watched(LocalExecutor):
    """Kills a worker once its run has a checkpoint, and keeps what is heard."""

    def __init__(self, folder: SweepFolder) -> None:
        super().__init__(workers=2, threads=1)
        self.folder = folder
        self.killed: tuple[str, int] | None = None
        self.heard: list[WorkerEvent] = []

    def poll(self, seconds: float) -> list[WorkerEvent]:
        for worker in self._workers:
            if self.killed is None and worker.task is not None:
                run_id = worker.task.plan.id
                if saved := self.folder.steps_saved(run_id):
                    worker.process.kill()
                    self.killed = run_id, saved
        events = super().poll(seconds)
        self.heard += events
        return events


def survives_a_worker(url: str, folder: Path) -> None:
    """A sweep behind a URL loses a worker; its rows are those of one that did not."""
    design = design_of(
        write_corpus(folder / "corpus"),
        budgets=(8.6e8,),
        rule=Fixed(lr=5e-3, batch_tokens=32),
        training={"logging_steps": 5, "eval_steps": 40},
    )
    Sweep(design, folder / "undisturbed", LocalExecutor(workers=2, threads=1)).run()
    executor = Watched(SweepFolder(url))
    outcome = Sweep(design, url, executor, save_seconds=0).run()
    assert (outcome.done_now, outcome.failed) == (2, {})
    assert rows_of(url) == rows_of(str(folder / "undisturbed"))

    assert executor.killed is not None
    run_id, saved = executor.killed
    own = [event for event in executor.heard if event.run_id == run_id]
    lost = [event.kind for event in own].index("lost")
    assert own[lost + 1].step >= saved > 0
    left = executor.folder
    left.refresh()
    names = {name.removeprefix(f"{left.root}/") for name in left.fs.find(left.root)}
    assert {name.split("/")[0] for name in names} == LEFT


@pytest.mark.slow
def test_a_store_with_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as `sftp://`, which wants a folder before a file."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    survives_a_worker(f"dir:///sweep::file://{tmp_path}/store", tmp_path)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stand-in for S3 on this machine, with one bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("bucket")
    yield "s3://bucket/some/sweep"
    server.stop()


@pytest.mark.slow
def test_s3(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    survives_a_worker(s3, tmp_path)
    with SweepFolder(s3).hold(), pytest.raises(SweepLockedError), SweepFolder(s3).hold():
        pass
    with pytest.raises(FileNotFoundError), SweepFolder("s3://misspelt/sweep").hold():
        pass
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    assert fs.ls("") == ["bucket"]
