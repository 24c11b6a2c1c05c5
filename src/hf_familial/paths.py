"""Checks of paths that a user typed, made before anything is read, trained or downloaded."""

from __future__ import annotations

import os
import tempfile
from difflib import get_close_matches
from pathlib import Path


# a variable of the environment: with it, errors of a command end in a traceback
TRACEBACK = "HF_FAMILIAL_TRACEBACK"


def no_such_path(path: str | os.PathLike[str], kind: str = "file or folder") -> FileNotFoundError:
    """Build the error for a path that leads nowhere, with the nearest name that exists."""
    near = near_path(path)
    hint = f"; did you mean `{near}`?" if near else "."
    return FileNotFoundError(f"there is no {kind} `{os.fspath(path)}`{hint}")


def near_path(path: str | os.PathLike[str], cutoff: float = 0.6) -> str | None:
    """Return the path in the same folder whose name is nearest to one that does not exist."""
    try:
        typed = Path(path).expanduser()
        names = [entry.name for entry in os.scandir(typed.parent)]
    except (OSError, RuntimeError, ValueError):
        return None
    # letters that changed places are always near
    swapped = [name for name in names if sorted(name) == sorted(typed.name)]
    close = swapped or get_close_matches(typed.name, names, 1, cutoff)
    return str(Path(path).parent / close[0]) if close else None


def is_local(name: str) -> bool:
    """Return whether a name that does not exist here can only have meant a path of this machine."""
    # `user/model` may be a repository, unless it stands in a folder that has a very similar name
    if name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name:
        return True
    return name.count("/") > 1 or ("/" in name and near_path(name, 0.75) is not None)


def check_model_place(option: str, name: str) -> None:
    """Check the name of a model or tokenizer: a folder that exists, or a repository's name."""
    if Path(name).is_file():
        raise NotADirectoryError(f"`{option}` must be the folder of a checkpoint, got file {name}.")
    if not Path(name).is_dir() and is_local(name):
        raise FileNotFoundError(f"`{option}`: {no_such_path(name, 'folder')}")


def check_output_folder(option: str, folder: str | os.PathLike[str]) -> None:
    """Check that a folder can be made and written to; nothing is left behind."""
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
            f"`{option}` must be a folder that can be written, got `{folder}`: {reason}."
        ) from None


def words_of(error: BaseException) -> str:
    """Say what went wrong in one paragraph, for somebody who reads no code."""
    if isinstance(error, FileNotFoundError) and error.errno and error.filename:
        return str(no_such_path(error.filename))
    if isinstance(error, (ValueError, OSError, ImportError, IndexError)):
        return str(error)
    words = " ".join(str(error).split())[:500]
    if any(cls.__name__ == "StrictDataclassError" for cls in type(error).__mro__):
        return words  # what a host's config refuses
    return f"{type(error).__name__}: {words} ({TRACEBACK}=1 shows where)"


__all__ = [
    "check_model_place",
    "check_output_folder",
    "is_local",
    "near_path",
    "no_such_path",
    "words_of",
]
