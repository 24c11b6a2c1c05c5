"""The folder of a sweep, on a disk or behind a URL: rows, checkpoints, failures, and its lock.

designs/<hash>.yaml every design that ran here, all its fields written out
data.json           facts of the data, so that a change is seen
runs.jsonl          one row for every run that ended
evaluations.jsonl   one row for every evaluation of these runs
state.json          the runs in progress
runs/<id>/          of a run that has not ended: checkpoints, its record, its failure
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from .._files import append_lines, write_whole
from ..errors import RunRecordError, SweepLockedError
from ..runs import RunRecord, append_run, read_runs


ROWS, POINTS = "runs.jsonl", "evaluations.jsonl"
DATA, STATE = "data.json", "state.json"
RECORD, RUN_POINTS, FAILURE = "record.jsonl", "points.jsonl", "failure.json"
DRAFT = "draft.jsonl"  # of the record
POINTER = "checkpoint.json"
ENDED = ("finished", "diverged")
PATIENCE = 60  # seconds that a worker waits for one that died, or that another machine still has

# a lock behind a URL
LOCK = "lock.json"
RENEWED, STALE = 30.0, 150.0  # seconds
SETTLED = 2.0  # seconds in which others that saw no lock either have written theirs


class SweepFolder:
    """The files of a sweep, each written whole or not at all.

    Args:
        url (`str` or `os.PathLike`): A path, or a URL that `fsspec` knows, such as `s3://...`.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.fs, self.root = fsspec.core.url_to_fs(self.url)
        self.local = isinstance(self.fs, LocalFileSystem)
        self._lease: _Lease | None = None

    def path(self, *names: str) -> str:
        """Return the path of a file of the sweep."""
        return "/".join((self.root, *names))

    def read(self, *names: str) -> str | None:
        """Return the text of a file; `None` if there is none."""
        try:
            return bytes(self.fs.cat_file(self.path(*names))).decode()
        except FileNotFoundError:
            return None

    def read_json(self, *names: str) -> dict[str, Any]:
        """Return the object in a file; empty if there is none, or it is no object."""
        try:
            found = json.loads(self.read(*names) or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, text: str, *names: str) -> None:
        """Replace a file as a whole; after an `OSError` it is as it was."""
        path = self.path(*names)
        if self.local:
            write_whole(path, text, parents=True)
        else:
            self._in_folders([path], lambda: self.fs.pipe_file(path, text.encode()))

    def send(self, paths: Sequence[Path], targets: Sequence[str]) -> None:
        """Copy files of this machine behind the URL, many at once where it can."""
        sources, targets = [str(path) for path in paths], list(targets)
        self._in_folders(targets, lambda: self.fs.put(sources, targets))

    def _in_folders(self, targets: Sequence[str], write: Callable[[], object]) -> None:
        """Write files; make their folders first where the store asks for them, as `sftp://`."""
        try:
            write()
        except FileNotFoundError:
            # a bucket that does not exist is not made
            if not self.fs.exists(self.root.rpartition("/")[0]):
                raise
            for parent in sorted({target.rpartition("/")[0] for target in targets}):
                self.fs.makedirs(parent, exist_ok=True)
            write()

    def remove(self, *names: str) -> None:
        """Remove a file or a folder, if it is there."""
        path = self.path(*names)
        self.refresh()
        # another machine may have removed it just now
        with suppress(FileNotFoundError):
            if self.fs.exists(path):
                self.fs.rm(path, recursive=True)

    def refresh(self) -> None:
        """Forget what was listed: other machines write here too."""
        self.fs.invalidate_cache()

    def still_held(self) -> None:
        """Raise a `SweepLockedError` if another sweep took the folder from the one that held it."""
        if self._lease is not None:
            self._lease.check()

    def keep(self, design: str) -> None:
        """Keep a design beside its rows, under a name of its own: a folder may serve several."""
        name = hashlib.sha256(design.encode()).hexdigest()[:8]
        self.write(design, "designs", f"{name}.yaml")

    def rows(self) -> dict[str, RunRecord]:
        """Return every run that ended, by its id; a `RunRecordError` names a wrong row."""
        if self.local:
            path = Path(self.path(ROWS))
            found = read_runs(path) if path.exists() else []
        else:
            found = list(self._remote_rows())
        return {record.run_id: record for record in found}

    def _remote_rows(self) -> Iterator[RunRecord]:
        for number, line in enumerate((self.read(ROWS) or "").splitlines(), start=1):
            try:
                if line.strip():
                    yield RunRecord.from_dict(json.loads(line))
            except ValueError as error:
                name = getattr(error, "field", "")
                raise RunRecordError(str(error), name, self.path(ROWS), number) from None

    def add(self, record: RunRecord) -> None:
        """Append a run that ended and its evaluations; after a break in between, do the rest."""
        self.still_held()
        points = (self.read("runs", record.run_id, RUN_POINTS) or "").splitlines()
        # a break may have left the first of them
        known = set((self.read(POINTS) or "").splitlines())
        self._append(POINTS, [line for line in points if line not in known])
        if self.local:
            append_run(self.path(ROWS), record)
        elif record.run_id not in self.rows():
            self._append(ROWS, [record.to_json()])

    def _append(self, name: str, lines: Sequence[str]) -> None:
        """Add lines to a file, in one write."""
        if self.local:
            append_lines(self.path(name), lines)
        elif lines:
            self.write((self.read(name) or "") + "".join(f"{line}\n" for line in lines), name)

    def repair(self) -> None:
        """Remove what a crash left half-written: files, and last lines, which runs have whole."""
        if not self.local:
            return
        for left in Path(self.root).glob(f".*.{'[0-9a-f]' * 32}"):
            left.unlink()
        for path in (Path(self.path(name)) for name in (ROWS, POINTS)):
            content = path.read_bytes() if path.exists() else b""
            last = content.rpartition(b"\n")[2]
            if _is_object(last):
                with path.open("ab") as file:
                    file.write(b"\n")
            elif last:
                with path.open("r+b") as file:
                    file.truncate(len(content) - len(last))

    def record(self, run_id: str) -> RunRecord | None:
        """Return what a worker wrote of a run that ended, if it did."""
        for line in reversed((self.read("runs", run_id, RECORD) or "").splitlines()):
            if _is_object(line.encode()):
                record = RunRecord.from_dict(json.loads(line))
                if record.status in ENDED:
                    return record
        return None

    def steps_saved(self, run_id: str) -> int:
        """Return the steps of a run's newest whole checkpoint; 0 if it has none."""
        return int(self.read_json("runs", run_id, POINTER).get("step", 0))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other sweeps off the folder; a `SweepLockedError` if one holds it."""
        if not self.local:
            self._lease = _Lease(self)
            with self._lease.hold():
                yield
            return
        Path(self.root).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            holder = self.read_json(STATE)
            by = f" (process {holder['pid']} on {holder['host']})" if "pid" in holder else ""
            raise SweepLockedError(
                f"another sweep{by} works on `{self.url}`; wait for it, or choose another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def hold_run(self, run_id: str) -> Iterator[None]:
        """Keep a worker that was given up, and may still live, out of a run's folder."""
        if not self.local:
            yield
            return
        folder = Path(self.path("runs", run_id))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(str(folder / ".lock"), timeout=PATIENCE):
                yield
        except Timeout:
            raise SweepLockedError(f"another worker has run {run_id}, and does not end.") from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class _Lease:
    """A lease on a folder of an object store: a small object, renewed while its holder lives.

    Object stores have no locks. Of sweeps that start at once, the one that wrote last has the
    lease: all look again after a while, and at every renewal, whether it is still theirs. Clocks of
    machines must agree to a minute.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self.folder, self.token = folder, uuid.uuid4().hex

    @contextmanager
    def hold(self) -> Iterator[None]:
        holder = self._holder()
        if time.time() - holder.get("time", 0) < STALE:
            raise SweepLockedError(
                f"another sweep (process {holder.get('pid')} on {holder.get('host')}) works on "
                f"`{self.folder.url}`; wait for it, or choose another folder. If it is gone, its "
                f"lock ends in {STALE:.0f} seconds."
            )
        self._write()
        time.sleep(SETTLED)
        self.check()
        done = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(done,), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()
            if self._is_ours():
                self.folder.remove(LOCK)

    def check(self) -> None:
        """Raise if another sweep took the lease, at the same moment or after a long silence."""
        if not self._is_ours():
            holder = self._holder()
            raise SweepLockedError(
                f"another sweep (process {holder.get('pid')} on {holder.get('host')}) took "
                f"`{self.folder.url}`. What is done stays done."
            )

    def _is_ours(self) -> bool:
        return self._holder().get("token") == self.token

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEWED):
            # a store that does not answer now may do so the next time, well before it is stale
            with suppress(Exception):
                if self._is_ours():
                    self._write()

    def _write(self) -> None:
        holder = {"token": self.token, "pid": os.getpid(), "host": platform.node()}
        self.folder.write(json.dumps(holder | {"time": time.time()}), LOCK)

    def _holder(self) -> dict[str, Any]:
        return self.folder.read_json(LOCK)
