"""Where one run trains: checkpoints near the worker, and whole ones in the sweep's folder."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .folder import POINTER, RECORD, RUN_POINTS, SweepFolder


MODEL = "model"


class Workspace:
    """A folder on this machine's disk that a run trains in.

    In a sweep on a disk it is the run's own folder there. Behind a URL it is a temporary one, and
    what matters goes to the URL. A checkpoint counts once the pointer beside it names it: a break
    while one is written, or sent, leaves the one before.

    Args:
        folder ([`SweepFolder`]): Of the sweep.
        run_id (`str`): The run.
    """

    def __init__(self, folder: SweepFolder, run_id: str) -> None:
        self.folder, self.run_id = folder, run_id
        self.path = Path(folder.path("runs", run_id)) if folder.local else Path()

    @contextmanager
    def open(self) -> Iterator[Path | None]:
        """Make the folder ready; gives the checkpoint to go on from, if there is one."""
        if self.folder.local:
            self.path.mkdir(parents=True, exist_ok=True)
            yield self._restored()
            return
        with tempfile.TemporaryDirectory(prefix=f"{self.run_id}-") as path:
            self.path = Path(path)
            yield self._restored()

    def _restored(self) -> Path | None:
        step = self.folder.steps_saved(self.run_id)
        if not self.folder.local and step:
            name = _name(step)
            self.folder.fs.get(self._remote(name), str(self.path / name), recursive=True)
        for path in self.path.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path.name != _name(step):
                shutil.rmtree(path)
        found = self.path / _name(step)
        return found if step and found.is_dir() else None

    def commit(self, step: int) -> None:
        """Make the checkpoint of a step, whole on this disk, the one to go on from."""
        if not self.folder.local:
            self._send(_name(step))
        before = self.folder.steps_saved(self.run_id)
        self.folder.write(json.dumps({"step": step}), "runs", self.run_id, POINTER)
        if before and before != step:
            self.folder.remove("runs", self.run_id, _name(before))

    def finish(self, keep_model: bool) -> None:
        """Bring the run's last words to the sweep's folder; its record last of all."""
        if self.folder.local:
            return
        if keep_model:
            self._send(MODEL)
        for name in (RUN_POINTS, RECORD):
            if (self.path / name).exists():
                text = (self.path / name).read_text(encoding="utf-8")
                self.folder.write(text, "runs", self.run_id, name)

    def _send(self, name: str) -> None:
        self.folder.remove("runs", self.run_id, name)
        fs = self.folder.fs
        for path in sorted((self.path / name).rglob("*")):
            if path.is_file():
                fs.put_file(str(path), self._remote(path.relative_to(self.path).as_posix()))

    def _remote(self, name: str) -> str:
        return self.folder.path("runs", self.run_id, name)


def clear_run(folder: SweepFolder, run_id: str) -> None:
    """Remove what a run needs no more once its row is written; a kept model stays."""
    top = folder.path("runs", run_id)
    if not folder.fs.exists(top):
        return
    kept = False
    for path in folder.fs.ls(top, detail=False):
        name = re.split(r"[\\/]", str(path).rstrip("/"))[-1]
        if name == MODEL:
            kept = True
        else:
            folder.remove("runs", run_id, name)
    if not kept:
        folder.remove("runs", run_id)


def _name(step: int) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"
