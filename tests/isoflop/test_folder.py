"""The folder of a sweep under stress: full disks, files that a crash left half-written."""

import errno
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_harness import Here, assert_same_sweep

from hf_familial.errors import StoppedSweepError
from hf_familial.isoflop import (
    IsoFlopDesign,
    RunTask,
    Sweep,
    SweepFolder,
    WorkerEvent,
)
from hf_familial.isoflop._worker import _is_full


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
        with pytest.raises(StoppedSweepError, match="All other runs would fail"):
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
