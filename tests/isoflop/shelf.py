"""A store of objects in memory that forgets nothing and dies on demand, for tests of sweeps."""

import json
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem
from sweep_harness import CLOCKS, Killed

from hf_familial.isoflop import SweepFolder, _folder
from hf_familial.isoflop._folder import ROWS


URL = "shelf://sweep"


class Shelf(MemoryFileSystem):
    """An object store: what was listed is remembered until it is told to forget, and it can die.

    From the write with number `dies_at` on, from 1, nothing is done any more: neither the write nor
    what a living process would clear away.
    """

    protocol = "shelf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    writes: ClassVar[list[str]] = []
    dies_at: ClassVar[int | None] = None
    listed: ClassVar[dict[tuple[str, ...], Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).replace("shelf://", "memory://"))

    @classmethod
    def clear(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.revive()

    @classmethod
    def revive(cls, dies_at: int | None = None) -> None:
        cls.writes.clear()
        cls.listed.clear()
        cls.dies_at = dies_at

    def _write(self, what: str) -> None:
        self.writes.append(what)
        if self.dies_at is not None and len(self.writes) >= self.dies_at:
            raise Killed

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._write(f"put {path}")
        super().pipe_file(path, value, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._write(f"put {rpath}")
        super().put_file(lpath, rpath, **options)

    def rm_file(self, path: str) -> None:
        self._write(f"rm {path}")
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        assert recursive
        assert maxdepth is None
        for name in self.find(path):
            self.rm_file(name)
        # stores have no folders
        top = self._strip_protocol(path)
        gone = [name for name in self.pseudo_dirs if f"{name}/".startswith(f"{top}/")]
        self.pseudo_dirs[:] = [name for name in self.pseudo_dirs if name not in gone]

    def _remembered(self, name: str, path: str, *options: Any, **more: Any) -> Any:
        key = (name, str(path), repr(options), repr(more))
        if key not in self.listed:
            self.listed[key] = getattr(super(), name)(path, *options, **more)
        return self.listed[key]

    def find(self, path: str, *options: Any, **more: Any) -> Any:
        return self._remembered("find", path, *options, **more)

    def exists(self, path: str, **more: Any) -> Any:
        return self._remembered("exists", path, **more)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listed.clear()


def files() -> list[str]:
    return sorted(Shelf.store)


def age(url: str = URL) -> None:
    """Let the lock of a dead sweep become stale."""
    folder = SweepFolder(url)
    holder = folder.read_json(_folder.LOCK)
    if holder:
        folder.write(json.dumps(holder | {"time": holder["time"] - _folder.STALE}), _folder.LOCK)


def rows_of(url: str) -> dict[str, Any]:
    """Runs and evaluations without clocks; fails if one stands there twice."""
    found = {}
    for name in (ROWS, "evaluations.jsonl"):
        rows = [json.loads(line) for line in (SweepFolder(url).read(name) or "").splitlines()]
        keyed = {(row["run_id"], row.get("step", 0)): row for row in rows}
        assert len(keyed) == len(rows)
        found[name] = {
            key: {field: value for field, value in row.items() if field not in CLOCKS}
            for key, row in keyed.items()
        }
    assert found[ROWS]
    return found
