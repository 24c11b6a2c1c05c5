"""Folders that are whole or absent, and one process that builds them while the others wait."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env
from huggingface_hub import constants

from ..._files import file_digest, whole_folder


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

# what the launchers (torchrun, accelerate, mpirun) tell each process
WORLD_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Return the cache folder: the user's, else `hf_familial` under `$HF_HOME`."""
    return Path(cache_dir or Path(constants.HF_HOME) / "hf_familial").expanduser()


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
        if _is_whole(folder):
            return folder
        if folder.exists():
            logger.warning("The cache `%s` is damaged; it is built again.", folder)
        with suppress(_BuiltElsewhere), whole_folder(folder, overwrite=True) as temporary:
            build(temporary)
            sums = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
            (temporary / MANIFEST).write_text(json.dumps(sums, indent=1))
            if _is_whole(folder):
                raise _BuiltElsewhere
    return folder


class _BuiltElsewhere(Exception):
    """Another launch was sooner with the same result."""


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        return all(file_digest(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False
