"""Atomic writing of files and folders: a crash or an error never leaves half of one behind."""

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
except ImportError:  # Windows; there the user must delete the leftovers of a killed process
    fcntl = None  # type: ignore[assignment]

WRITING, REPLACED = "writing", "replaced"


def write_whole(path: str | os.PathLike[str], content: str | bytes, parents: bool = False) -> None:
    """Write a file atomically: write a temporary file next to it, then rename that file.

    If `parents` is true, missing parent folders are created.
    """
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
        named = type(error)(f"cannot write {path}: {error.strerror or error}.")
        named.errno = error.errno
        raise named from None
    finally:
        beside.unlink(missing_ok=True)


def check_file_place(path: str | os.PathLike[str]) -> None:
    """Raise `OSError` if no file can be written at `path`. Call this before long work."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is not a regular file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: its folder is read-only.")


def append_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Append lines to a file in a single write, without locks, and wait until they are on disk."""
    # On a local file system, lines that several processes append at the same time do not mix.
    # Network file systems do not guarantee this.
    data = "".join(f"{line}\n" for line in lines).encode()
    if not data:
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if _is_torn(file):  # end a line that a crash cut off, or the next line would continue it
            data = b"\n" + data
        written = os.write(file, data)
        if written != len(data):
            raise OSError(
                f"only {written} of {len(data)} bytes were written to {path}. Is the disk full?"
            )
        os.fsync(file)
    finally:
        os.close(file)


def _is_torn(file: int) -> bool:
    """Return whether the last line of a file has no line end."""
    size = os.fstat(file).st_size
    if not size:
        return False
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) != b"\n"


@contextmanager
def whole_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write the folder `out` atomically: yield a hidden folder, and rename it to `out` at the end.

    The hidden folder is next to `out`. Its files are on disk before the rename. If the `with` block
    raises, the hidden folder is deleted, and so are the parent folders that were created for it. If
    the process is killed, the next process that writes `out` deletes the hidden folder.

    Raises:
        FileExistsError: If `out` is a file, or is not empty while `overwrite` is false, or cannot
            be replaced, like the current folder.
    """
    out = out.resolve()
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _hidden_beside(out, overwrite) as hidden:
            yield hidden
    except BaseException:
        for parent in made:  # the innermost first
            with suppress(OSError):  # another process has written files there
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
            # another process may have written `out` in the meantime
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
        raise FileExistsError(f"`{out}` is a file. Pass the name of a folder.")
    if Path.cwd().is_relative_to(out) or os.path.ismount(out):
        raise FileExistsError(
            f"`{out}` cannot be replaced, because it is the current folder, a parent of it, or the "
            "root of a disk. Pass the name of a new folder inside it."
        )
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f"`{out}` is not empty. Pass `overwrite=True` (`--overwrite`) to replace it."
        )


def _rename(hidden: Path, out: Path) -> None:
    """Rename a finished folder to `out`, and delete the folder that it replaces."""
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
    """Delete the hidden folders of processes that were killed while they wrote `out`."""
    pattern = f".{glob.escape(out.name)}.{{}}-*"
    for old in out.parent.glob(pattern.format(REPLACED)):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            # The process was killed between the two renames. The old folder is still complete.
            os.rename(old, out)
    for left in out.parent.glob(pattern.format(WRITING)):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the process ends. Return `None` if another process has locked it."""
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
    """Lock a folder, so that only one process at a time creates or renames folders in it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Wait until the files of a folder and their names are on disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            _fsync(Path(root, name))
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder as a file
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(parts: Iterable[str | bytes]) -> str:
    """Return a hash of a list of strings, as 32 hexadecimal digits.

    `["ab", "c"]` and `["a", "bc"]` have different hashes.
    """
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()[:32]


def file_digest(path: Path, start: bytes = b"", algorithm: str = "sha256") -> str:
    """Return the hexadecimal hash of the bytes `start`, followed by the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, start)).hexdigest()
