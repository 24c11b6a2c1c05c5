"""Files and folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed process then stay until deleted by hand
    fcntl = None  # type: ignore[assignment]

WRITING, REPLACED = "writing", "replaced"


def write_whole(path: str | os.PathLike[str], content: str | bytes, parents: bool = False) -> None:
    """Write a file beside its place and move it there, so that nobody sees half of it."""
    path = Path(path)
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    check_file_place(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        told = type(error)(f"cannot write {path}: {error.strerror or error}.")
        told.errno = error.errno
        raise told from None
    finally:
        beside.unlink(missing_ok=True)


def check_file_place(path: str | os.PathLike[str]) -> None:
    """Raise `OSError` for a place where no file can be written, before the work that fills it."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is no ordinary file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: its folder is read-only.")


def append_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Add lines to a file in one write, without locks; they are on disk when this returns."""
    # a file opened for appending: lines of processes that write at once do not mix on a local file
    # system; network ones promise less
    data = "".join(f"{line}\n" for line in lines).encode()
    if not data:
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if _is_torn(file):  # end the line that a crash cut off, or these would be lost with it
            data = b"\n" + data
        written = os.write(file, data)
        if written != len(data):
            raise OSError(f"wrote {written} of {len(data)} bytes to {path}; is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def _is_torn(file: int) -> bool:
    """Return whether a file does not end at the end of a line."""
    size = os.fstat(file).st_size
    if not size:
        return False
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) != b"\n"


@contextmanager
def whole_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to write in, which becomes `out` if nothing is raised.

    It stands beside `out`, is on the disk before it is renamed, and is removed if anything is
    raised, like the parents that were made for it. What a killed process left is removed by the
    next that writes to the same place.

    Raises:
        FileExistsError: If `out` holds something and `overwrite` is false, is a file, or is a
            folder that nothing can replace, such as the current one.
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
        _clear_leftovers(out)
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
        fsync_tree(hidden)
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
    _fsync(out.parent)


def _clear_leftovers(out: Path) -> None:
    """Clear up after processes that were killed while they wrote to this place."""
    pattern = f".{glob.escape(out.name)}.{{}}-*"
    for old in out.parent.glob(pattern.format(REPLACED)):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            # killed between the two renames: the folder that was to be replaced is still whole
            os.rename(old, out)
    for left in out.parent.glob(pattern.format(WRITING)):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor whose lock ends with the process; `None` where another one holds it."""
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
    """Let one process at a time make, find and rename folders here."""
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


def fsync_tree(folder: Path) -> None:
    """Bring a folder's files to the disk, and their names."""
    for root, _, files in os.walk(folder):
        for name in files:
            _fsync(Path(root, name))
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    if os.name == "nt":  # folders have no descriptors there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(parts: Iterable[str | bytes]) -> str:
    """Return 32 hexadecimal digits of strings in order; the boundaries between them count."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()[:32]


def file_digest(path: Path, start: bytes = b"", algorithm: str = "sha256") -> str:
    """Return a hash of a file's bytes in hexadecimal, of `start` before them."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, start)).hexdigest()
