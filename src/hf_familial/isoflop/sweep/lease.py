"""A lock where there are no locks: a small object, renewed while its holder lives."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .folder import SweepFolder


LOCK = "lock.json"
RENEWED, STALE = 30.0, 150.0  # seconds
SETTLED = 2.0  # seconds in which others that saw no lock either have written theirs


class RemoteLease:
    """A lease on a folder of an object store.

    Object stores have no locks. Of sweeps that start at once, the one that wrote last has the
    lease: all look again after a while, and at every renewal, whether it is still theirs. Clocks of
    machines must agree to a minute.

    Args:
        folder ([`SweepFolder`]): What is held.
        refusal (`type[Exception]`): What is raised if another one holds it.
    """

    def __init__(self, folder: SweepFolder, refusal: type[Exception]) -> None:
        self.folder, self.refusal, self.token = folder, refusal, uuid.uuid4().hex

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lease inside the block.

        Raises:
            refusal: If another one holds it.
            OSError: If the folder cannot be written to.
        """
        holder = self._holder()
        if time.time() - holder.get("time", 0) < STALE:
            raise self.refusal(
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
        """See that the lease is still held; asked before what only its holder may do.

        Raises:
            refusal: If another one took it: it started at the same moment, or this one could not
                renew it for too long.
        """
        if not self._is_ours():
            raise self.refusal(
                f"another sweep (process {self._holder().get('pid')} on "
                f"{self._holder().get('host')}) took `{self.folder.url}`. What is done stays done."
            )

    def _is_ours(self) -> bool:
        return self._holder().get("token") == self.token

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEWED):
            # a store that does not answer now may do so the next time, well before it is stale
            with contextlib.suppress(Exception):
                if self._is_ours():
                    self._write()

    def _write(self) -> None:
        holder = {"token": self.token, "pid": os.getpid(), "host": platform.node()}
        self.folder.write(json.dumps(holder | {"time": time.time()}), LOCK)

    def _holder(self) -> dict[str, Any]:
        return self.folder.read_json(LOCK)
