"""Cached folders, which one process builds while all other processes wait."""

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

# environment variables that the launchers (torchrun, accelerate, mpirun) set in each process
WORLD_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Return the cache folder. The default is `$HF_HOME/hf_familial`."""
    return Path(cache_dir or Path(constants.HF_HOME) / "hf_familial").expanduser()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the `with` block in the first process of each machine, then in the other processes.

    Every process must enter the block. If the first process raises, the others continue, so a bad
    argument raises in each process. With accelerate's `local_main_process_first` the others would
    wait for ever.
    """
    # A single process needs no `PartialState`. It would choose the device before the user does.
    if get_int_from_env(WORLD_SIZE_VARIABLES, 1) == 1:
        yield
        return
    # TrainingArguments may have created this state already. Otherwise use the launcher's choice.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder unless it already exists undamaged, and return it.

    Call this in every process of a launch. The first process builds the folder, and the others find
    it. `build` writes the files into a temporary folder, which then gets its final name in one
    atomic step. That name must identify the content, for example by a hash of the inputs.
    """
    with first_process_first():
        if _is_whole(folder):
            return folder
        if folder.exists():
            logger.warning("The cache folder `%s` is damaged and will be rebuilt.", folder)
        with suppress(_BuiltElsewhere), whole_folder(folder, overwrite=True) as temporary:
            build(temporary)
            sums = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
            (temporary / MANIFEST).write_text(json.dumps(sums, indent=1))
            if _is_whole(folder):
                raise _BuiltElsewhere
    return folder


class _BuiltElsewhere(Exception):
    """Raised when another launch has built the same folder in the meantime."""


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        return all(file_digest(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False
