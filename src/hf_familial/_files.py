"""A folder that appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed process then stay until deleted by hand
    fcntl = None  # type: ignore[assignment]

WRITING, REPLACED = "writing", "replaced"


@contextmanager
def whole_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder to write in, which becomes `out` if all goes well.

    It stands beside `out`, is on the disk before it is renamed, and is removed if anything is
    raised, like the parents that were made for it. What a killed process left there is removed by
    the next that writes to the same place.

    Args:
        out (`Path`): Where the folder is to be; its parents are made.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an `out` that holds something
            may be replaced.

    Yields:
        `Path`: The hidden folder.

    Raises:
        FileExistsError: If `out` holds something, is a file, or is a folder that nothing can
            replace, such as the current one.
        OSError: If it cannot be written.
    """
    out = out.resolve()
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _hidden_beside(out, overwrite) as hidden:
            yield hidden
    except BaseException:
        for parent in made:  # the innermost first
            with suppress(OSError):  # somebody else put something there
                parent.rmdir()
        raise


@contextmanager
def _hidden_beside(out: Path, overwrite: bool) -> Iterator[Path]:
    with _locked(out.parent):
        _mend(out)
        _check_free(out, overwrite)
        hidden = _beside(out, WRITING)
        hidden.mkdir()
        try:
            lock = _lock(hidden)
        except OSError:
            hidden.rmdir()
            raise
    try:
        yield hidden
        _to_disk(hidden)
        with _locked(out.parent):
            # somebody else may have been there meanwhile
            _check_free(out, overwrite)
            _rename(hidden, out)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}-{secrets.token_hex(4)}"


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise FileExistsError(f"`{out}` is a file; give the name of a folder.")
    if Path.cwd().is_relative_to(out) or os.path.ismount(out):
        raise FileExistsError(
            f"`{out}` is the current folder, holds it, or is where a disk is mounted: it cannot be "
            "put in place whole. Give the name of a new folder in it."
        )
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f"`{out}` holds something already; pass `overwrite=True` (`--overwrite`) to replace it."
        )


def _rename(hidden: Path, out: Path) -> None:
    """Put a finished folder in its place, and remove what it replaces."""
    if not out.exists():
        os.rename(hidden, out)
    else:
        old = _beside(out, REPLACED)
        os.rename(out, old)
        try:
            os.rename(hidden, out)
        except OSError:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent)


def _left(out: Path, kind: str) -> list[Path]:
    """Folders that `_beside` named."""
    return list(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"))


def _mend(out: Path) -> None:
    """Clear up after processes that were killed while they wrote to this place."""
    for old in _left(out, REPLACED):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            # killed between the two renames: the folder that was to be replaced is still whole
            os.rename(old, out)
    for left in _left(out, WRITING):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor whose lock ends with the process; `None` where another process holds it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time makes, finds and renames folders here."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _to_disk(folder: Path) -> None:
    """Bring a folder's files to the disk; those written piece by piece are there already."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders have no descriptors there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["whole_folder"]
