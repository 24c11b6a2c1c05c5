"""Folders that are whole or absent, and one process that builds them while the others wait."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env
from huggingface_hub import constants


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

# what the launchers (torchrun, accelerate, mpirun) tell each process
WORLD_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Return the cache folder: the user's, else `hf_familial` under `$HF_HOME`."""
    return Path(cache_dir or Path(constants.HF_HOME) / "hf_familial").expanduser()


def digest(parts: Iterable[str | bytes]) -> str:
    """Hash strings in order, their boundaries too; return 32 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()[:32]


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process of each machine through the block before the others.

    Every process must enter. Unlike accelerate's own, it lets the others go when the first one
    fails, so a bad argument is an error in each process and not a deadlock.
    """
    # a lone process needs no state; making one here would settle the device before the user does
    if get_int_from_env(WORLD_SIZE_VARIABLES, 1) == 1:
        yield
        return
    # already there when TrainingArguments were made; else as `accelerate launch` was told
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder once, whole or not at all, and rebuild it when it is damaged.

    Call it in every process of a launch: the first builds, the others find the result. The folder's
    name must say what it is made from; `build` writes the files into a temporary one.
    """
    with first_process_first():
        if not _is_whole(folder):
            _build_atomically(folder, build)
    return folder


def _build_atomically(folder: Path, build: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        build(temporary)
        sums = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(sums, indent=1))
        if folder.exists() and not _is_whole(folder):
            logger.warning("The cache `%s` is damaged; it is built again.", folder)
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            # another launch may have put the same result there first
            if not _is_whole(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        return all(_checksum(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
