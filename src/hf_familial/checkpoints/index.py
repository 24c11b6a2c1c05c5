"""Which file of a checkpoint holds which tensors: the index of the shards, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import CheckpointError, PickleCheckpointError
from .partial_load import lies_in
from .safetensors_file import TensorCopy, read_header, write_file


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, which may not be there.

    Raises:
        CheckpointError: If the name or a link leads out of the folder.
    """
    path = folder / name
    if not lies_in(path, folder):
        raise CheckpointError(
            f"`{name}` of `{folder}` is outside of that folder, at `{path.resolve()}`: only files "
            "of the checkpoint itself are read. Copy the file into the folder."
        )
    return path


def read_index(name: str, folder: Path) -> dict[str, str]:
    """Return the file of every tensor as the index in a folder has it; empty without an index.

    Args:
        name (`str`): What messages call the checkpoint.
        folder (`Path`): Where the index is.

    Raises:
        CheckpointError: If the index is damaged, or names files elsewhere.
        PickleCheckpointError: If it names pickles.
    """
    path = own_file(folder, INDEX)
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        sound = all(isinstance(file, str) for file in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound or not files:
        raise CheckpointError(f"`{INDEX}` of `{name}` is damaged: it has no `weight_map` of names.")
    for file in set(files.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            kind = PickleCheckpointError if file.endswith((".bin", ".pt")) else CheckpointError
            raise kind(
                f"`{INDEX}` of `{name}` names `{file}`: only safetensors files beside it are read."
            )
    return files


def weight_files(name: str, folder: Path, fetch: Callable[[list[str]], Path]) -> dict[str, str]:
    """Return the file of every tensor, from the index or the only file of weights.

    Args:
        name (`str`): What messages call the checkpoint.
        folder (`Path`): Where the index is; without one the only file of weights is fetched.
        fetch (`Callable[[list[str]], Path]`): As in [`FamilyFiles`].

    Raises:
        CheckpointError: If the index or the header is damaged, or names files elsewhere.
        FileNotFoundError: If there are no weights.
        PickleCheckpointError: If there are only pickles.
    """
    if not (folder / INDEX).is_file():
        folder = fetch([SINGLE])
    if own_file(folder, SINGLE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    files = read_index(name, folder)
    if not files:
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise PickleCheckpointError(
                f"`{name}` holds pickles only ({pickles[0]}), which can run any code when they are "
                "read. Load it where you trust it and save it again, as safetensors."
            )
        raise FileNotFoundError(f"`{name}` holds neither `{SINGLE}` nor `{INDEX}`.")
    return files


def write_index(folder: Path, files: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """Write the index of a checkpoint in several files, by the name of every tensor."""
    index = {"metadata": dict(metadata), "weight_map": dict(files)}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def shard_name(number: int, count: int) -> str:
    """Return the name of one of several files of weights, the first being number 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def plan_shards(
    groups: Iterable[Sequence[TensorCopy]], max_shard_size: int | str
) -> dict[str, list[TensorCopy]]:
    """Return what each file of weights holds; none holds tensors of two groups.

    Args:
        groups (`Iterable[Sequence[TensorCopy]]`): Tensors that may stand together.
        max_shard_size (`int` or `str`): Size of a file, in bytes or as in `"5GB"`; a larger tensor
            has a file of its own.
    """
    shards: list[list[TensorCopy]] = []
    for group in groups:
        by_name = {copy.name: copy for copy in group}
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda copy: copy.nbytes,
            filename_pattern="{suffix}",
            max_shard_size=max_shard_size,
        )
        shards += [[by_name[n] for n in names] for names in split.filename_to_tensors.values()]
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {shard_name(i, len(shards)): shard for i, shard in enumerate(shards, start=1)}


def write_shards(folder: Path, shards: Mapping[str, Sequence[TensorCopy]]) -> None:
    """Write files of weights, and their index if they are several.

    Raises:
        CheckpointError: If a source is cut off, or a value does not fit its new dtype.
        OSError: If something cannot be written.
    """
    for file, shard in shards.items():
        write_file(folder / file, shard)
    if len(shards) > 1:
        total = sum(copy.nbytes for shard in shards.values() for copy in shard)
        files = {copy.name: file for file, shard in shards.items() for copy in shard}
        write_index(folder, files, {"total_size": total})
