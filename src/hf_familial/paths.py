"""Checks of paths from the user, before anything is read, trained or downloaded."""

from __future__ import annotations

import os
import tempfile
from difflib import get_close_matches
from pathlib import Path


# environment variable that makes a command show the traceback of its error
TRACEBACK = "HF_FAMILIAL_TRACEBACK"


def no_such_path(path: str | os.PathLike[str], kind: str = "file or folder") -> FileNotFoundError:
    """Return the error for a path that does not exist. It suggests a similar name."""
    near = near_path(path)
    hint = f"; did you mean `{near}`?" if near else "."
    return FileNotFoundError(f"there is no {kind} `{os.fspath(path)}`{hint}")


def near_path(path: str | os.PathLike[str], cutoff: float = 0.6) -> str | None:
    """Return an existing path in the same folder whose name is similar to a missing one."""
    try:
        typed = Path(path).expanduser()
        names = [entry.name for entry in os.scandir(typed.parent)]
    except (OSError, RuntimeError, ValueError):
        return None
    # a name with swapped letters is always similar enough
    swapped = [name for name in names if sorted(name) == sorted(typed.name)]
    close = swapped or get_close_matches(typed.name, names, 1, cutoff)
    return str(Path(path).parent / close[0]) if close else None


def is_local(name: str) -> bool:
    """Return whether a missing `name` must be a local path, because it cannot be a repository."""
    # `user/model` may be a repository, unless the folder `user` has a file with a similar name
    if name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name:
        return True
    return name.count("/") > 1 or ("/" in name and near_path(name, 0.75) is not None)


def check_model_place(option: str, name: str) -> None:
    """Check that `name` is an existing folder or can be the id of a Hub repository."""
    if Path(name).is_file():
        raise NotADirectoryError(f"`{option}` must be the folder of a checkpoint, got file {name}.")
    if not Path(name).is_dir() and is_local(name):
        raise FileNotFoundError(f"`{option}`: {no_such_path(name, 'folder')}")


def check_output_folder(option: str, folder: str | os.PathLike[str]) -> None:
    """Check that a folder can be created and written. This creates no files."""
    place = Path(folder).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"`{option}` must be a folder, but `{place}` is a file.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"`{option}` must be a writable folder, got `{folder}`: {reason}."
        ) from None


def words_of(error: BaseException) -> str:
    """Describe an error in one paragraph for a user who does not read code."""
    if isinstance(error, FileNotFoundError) and error.errno and error.filename:
        return str(no_such_path(error.filename))
    if isinstance(error, (ValueError, OSError, ImportError, IndexError)):
        return str(error)
    words = " ".join(str(error).split())[:500]
    if any(cls.__name__ == "StrictDataclassError" for cls in type(error).__mro__):
        return words  # a Transformers config rejected a value, and its text is clear
    return f"{type(error).__name__}: {words} ({TRACEBACK}=1 shows where)"


__all__ = [
    "check_model_place",
    "check_output_folder",
    "is_local",
    "near_path",
    "no_such_path",
    "words_of",
]
