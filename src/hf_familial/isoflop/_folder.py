"""The folder of a sweep, on a local disk or behind a URL.

| file | content |
|---|---|
| designs/<hash>.yaml | a design that ran here, with all its fields |
| data.json | name, size and fingerprint of the data, to detect changes |
| runs.jsonl | one row for each run that has ended |
| evaluations.jsonl | one row for each evaluation of these runs |
| state.json | the runs in progress |
| runs/<id>/ | checkpoints, record and failure of a run that has not ended |
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
DRAFT = "draft.jsonl"  # the record before it is complete
POINTER = "checkpoint.json"
ENDED = ("finished", "diverged")
PATIENCE = 60  # seconds that a worker waits for the lock of another worker on the same run

# lock of a folder behind a URL
LOCK = "lock.json"
RENEWED, STALE = 30.0, 150.0  # seconds until it is renewed, and until it counts as abandoned
SETTLED = 2.0  # seconds in which sweeps that start at the same time have written their locks


class SweepFolder:
    """The files of a sweep. Each file is written atomically.

    Args:
        url (`str` or `os.PathLike`): Path, or `fsspec` URL such as `s3://bucket/sweep`.
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
        """Return the text of a file, or `None` if the file does not exist."""
        try:
            return bytes(self.fs.cat_file(self.path(*names))).decode()
        except FileNotFoundError:
            return None

    def read_json(self, *names: str) -> dict[str, Any]:
        """Return the JSON object in a file. It is empty if there is no file or no object."""
        try:
            found = json.loads(self.read(*names) or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, text: str, *names: str) -> None:
        """Replace a file atomically. After an `OSError`, the old file is unchanged."""
        path = self.path(*names)
        if self.local:
            write_whole(path, text, parents=True)
        else:
            self._in_folders([path], lambda: self.fs.pipe_file(path, text.encode()))

    def send(self, paths: Sequence[Path], targets: Sequence[str]) -> None:
        """Copy local files to the URL, in parallel if the file system supports it."""
        sources, targets = [str(path) for path in paths], list(targets)
        self._in_folders(targets, lambda: self.fs.put(sources, targets))

    def _in_folders(self, targets: Sequence[str], write: Callable[[], object]) -> None:
        """Write files, and create their folders first if the store needs folders (`sftp://`)."""
        try:
            write()
        except FileNotFoundError:
            # do not create a missing bucket
            if not self.fs.exists(self.root.rpartition("/")[0]):
                raise
            for parent in sorted({target.rpartition("/")[0] for target in targets}):
                self.fs.makedirs(parent, exist_ok=True)
            write()

    def remove(self, *names: str) -> None:
        """Delete a file or a folder, if it exists."""
        path = self.path(*names)
        self.refresh()
        # another machine may have deleted it in the meantime
        with suppress(FileNotFoundError):
            if self.fs.exists(path):
                self.fs.rm(path, recursive=True)

    def refresh(self) -> None:
        """Clear the cached file lists, because other machines write to the folder too."""
        self.fs.invalidate_cache()

    def still_held(self) -> None:
        """Raise `SweepLockedError` if another sweep has taken over the folder."""
        if self._lease is not None:
            self._lease.check()

    def keep(self, design: str) -> None:
        """Save a design under a name from its hash, because a folder may have several designs."""
        name = hashlib.sha256(design.encode()).hexdigest()[:8]
        self.write(design, "designs", f"{name}.yaml")

    def rows(self) -> dict[str, RunRecord]:
        """Return the rows of all runs that have ended, with their ids as keys.

        Raise `RunRecordError` if a row is wrong.
        """
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
        """Append the row of a run that ended, and its evaluations.

        If an earlier call was interrupted, append only the missing rows.
        """
        self.still_held()
        points = (self.read("runs", record.run_id, RUN_POINTS) or "").splitlines()
        # an interrupted call may have written some of the evaluations
        known = set((self.read(POINTS) or "").splitlines())
        self._append(POINTS, [line for line in points if line not in known])
        if self.local:
            append_run(self.path(ROWS), record)
        elif record.run_id not in self.rows():
            self._append(ROWS, [record.to_json()])

    def _append(self, name: str, lines: Sequence[str]) -> None:
        """Append lines to a file in a single write."""
        if self.local:
            append_lines(self.path(name), lines)
        elif lines:
            self.write((self.read(name) or "") + "".join(f"{line}\n" for line in lines), name)

    def repair(self) -> None:
        """Delete half-written files and last lines. The folders of the runs still have the data."""
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
        """Return the record that a worker wrote for a run that ended, or `None`."""
        for line in reversed((self.read("runs", run_id, RECORD) or "").splitlines()):
            if _is_object(line.encode()):
                record = RunRecord.from_dict(json.loads(line))
                if record.status in ENDED:
                    return record
        return None

    def steps_saved(self, run_id: str) -> int:
        """Return the step of a run's newest complete checkpoint, or 0."""
        return int(self.read_json("runs", run_id, POINTER).get("step", 0))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder for this sweep. Raise `SweepLockedError` if another sweep uses it."""
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
                f"another sweep{by} uses `{self.url}`. Wait until it ends, or use another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def hold_run(self, run_id: str) -> Iterator[None]:
        """Lock the folder of a run, because an older worker of the run may still be alive."""
        if not self.local:
            yield
            return
        folder = Path(self.path("runs", run_id))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(str(folder / ".lock"), timeout=PATIENCE):
                yield
        except Timeout:
            raise SweepLockedError(
                f"another worker still uses the folder of run {run_id} after {PATIENCE} seconds."
            ) from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class _Lease:
    """A lock on a folder of an object store: a small file that the sweep renews regularly.

    Object stores have no locks of their own. If several sweeps start at the same time, the one that
    wrote the file last has the lock. All of them check the file after a short wait and at every
    renewal. The clocks of the machines may differ by at most a minute.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self.folder, self.token = folder, uuid.uuid4().hex

    @contextmanager
    def hold(self) -> Iterator[None]:
        holder = self._holder()
        if time.time() - holder.get("time", 0) < STALE:
            raise SweepLockedError(
                f"another sweep (process {holder.get('pid')} on {holder.get('host')}) uses "
                f"`{self.folder.url}`. Wait until it ends, or use another folder. If it was "
                f"killed, its lock ends within {STALE:.0f} seconds."
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
        """Raise `SweepLockedError` if another sweep has taken the lock."""
        if not self._is_ours():
            holder = self._holder()
            raise SweepLockedError(
                f"another sweep (process {holder.get('pid')} on {holder.get('host')}) took over "
                f"`{self.folder.url}`. Finished work is kept."
            )

    def _is_ours(self) -> bool:
        return self._holder().get("token") == self.token

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEWED):
            # if the store does not answer now, the next renewal is still early enough
            with suppress(Exception):
                if self._is_ours():
                    self._write()

    def _write(self) -> None:
        holder = {"token": self.token, "pid": os.getpid(), "host": platform.node()}
        self.folder.write(json.dumps(holder | {"time": time.time()}), LOCK)

    def _holder(self) -> dict[str, Any]:
        return self.folder.read_json(LOCK)
