"""A lock where there are no locks: a small object, renewed while its holder lives."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


RENEWED, STALE = 30.0, 150.0  # seconds


class RemoteLease:
    """A lease on a folder of an object store.

    Object stores have no locks; two sweeps that start in the same second could both pass. The
    object is read again after it was written, which makes that window small.

    Args:
        fs (`fsspec.AbstractFileSystem`): The store.
        path (`str`): Of the object.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self.fs, self.path, self.token = fs, path, uuid.uuid4().hex

    @contextmanager
    def hold(self, refusal: type[Exception]) -> Iterator[None]:
        """Hold the lease inside the block.

        Raises:
            refusal: If another one holds it.
        """
        holder = self._holder()
        if holder and time.time() - holder.get("time", 0) < STALE:
            raise refusal(
                f"another sweep (process {holder.get('pid')} on {holder.get('host')}) works on "
                f"`{self.path}`; wait for it, or choose another folder. If it is gone, its lock "
                f"ends in {STALE:.0f} seconds."
            )
        self._write()
        if self._holder().get("token") != self.token:
            raise refusal(f"another sweep took `{self.path}` at the same moment.")
        done = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(done,), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()
            self.fs.rm_file(self.path)

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEWED):
            self._write()

    def _write(self) -> None:
        holder = {"token": self.token, "pid": os.getpid(), "host": platform.node()}
        self.fs.pipe_file(self.path, json.dumps(holder | {"time": time.time()}).encode())

    def _holder(self) -> dict[str, Any]:
        try:
            self.fs.invalidate_cache()
            return dict(json.loads(self.fs.cat_file(self.path)))
        except (FileNotFoundError, ValueError):
            return {}
