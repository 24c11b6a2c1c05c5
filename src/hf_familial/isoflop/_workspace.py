"""The local folder that a run trains in, and the transfer of checkpoints to the sweep's folder."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .._files import fsync_tree
from ._folder import POINTER, RECORD, RUN_POINTS, SweepFolder


MODEL = "model"


class Workspace:
    """The folder on this machine's disk that a run trains in.

    If the sweep is on a local disk, this is `runs/<id>` in the sweep's folder. If the sweep is
    behind a URL, this is a temporary folder, and checkpoints and results are copied to the URL.

    A checkpoint becomes valid when the file checkpoint.json names it. An interruption during a save
    or a copy therefore leaves the previous checkpoint valid. Each copy has a unique name, so an old
    worker that is still alive cannot overwrite files that another worker reads.
    """

    def __init__(self, folder: SweepFolder, run_id: str) -> None:
        self.folder, self.run_id = folder, run_id
        self.path = Path(folder.path("runs", run_id)) if folder.local else Path()

    @contextmanager
    def open(self) -> Iterator[Path | None]:
        """Create the folder, and yield the checkpoint to resume from or `None`."""
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
            step = self._fetched()
        for path in self.path.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path.name != _name(step):
                shutil.rmtree(path)
        found = self.path / _name(step)
        return found if step and found.is_dir() else None

    def commit(self, step: int) -> None:
        """Make the complete checkpoint of `step` the one to resume from."""
        pointer: dict[str, Any] = {"step": step, "name": _name(step)}
        if self.folder.local:
            fsync_tree(self.path / _name(step))
        else:
            pointer["name"] = f"{_name(step)}-{uuid.uuid4().hex[:8]}"
            self._send(_name(step), pointer["name"])
        before = self._pointed()
        self.folder.write(json.dumps(pointer), "runs", self.run_id, POINTER)
        if before["step"] and before["name"] != pointer["name"]:
            self.folder.remove("runs", self.run_id, before["name"])

    def _pointed(self) -> dict[str, Any]:
        pointer = self.folder.read_json("runs", self.run_id, POINTER)
        step = pointer.get("step", 0)
        return {"step": step, "name": _name(step)} | pointer

    def _fetched(self) -> int:
        """Download the newest checkpoint. Return its step, or 0 if it is missing."""
        while True:
            pointer = self._pointed()
            here = self.path / _name(pointer["step"])
            self.folder.refresh()
            try:
                self.folder.fs.get(self._remote(pointer["name"]), str(here), recursive=True)
                return int(pointer["step"])
            except FileNotFoundError:
                shutil.rmtree(here, ignore_errors=True)
                # another worker may have replaced it by a newer one in the meantime
                if self._pointed() == pointer:
                    return 0

    def finish(self, keep_model: bool) -> None:
        """Copy the results of the run to the sweep's folder if it is not local, the record last."""
        if self.folder.local:
            return
        if keep_model:
            self._send(MODEL, MODEL)
        for name in (RUN_POINTS, RECORD):
            if (self.path / name).exists():
                text = (self.path / name).read_text(encoding="utf-8")
                self.folder.write(text, "runs", self.run_id, name)

    def _send(self, name: str, to: str) -> None:
        self.folder.remove("runs", self.run_id, to)
        top = self.path / name
        paths = sorted(path for path in top.rglob("*") if path.is_file())
        targets = [f"{self._remote(to)}/{path.relative_to(top).as_posix()}" for path in paths]
        self.folder.send(paths, targets)

    def _remote(self, name: str) -> str:
        return self.folder.path("runs", self.run_id, name)


def clear_run(folder: SweepFolder, run_id: str) -> None:
    """Delete the files of a run whose row is written, except a kept model."""
    top = folder.path("runs", run_id)
    folder.refresh()
    if not folder.fs.exists(top):
        return
    paths = folder.fs.ls(top, detail=False)
    names = [re.split(r"[\\/]", str(path).rstrip("/"))[-1] for path in paths]
    if MODEL not in names:
        names.append("")  # the folder itself
    for name in names:
        if name != MODEL:
            folder.remove("runs", run_id, *filter(None, [name]))


def _name(step: int) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"
