"""The index of a checkpoint, which lists the file of each tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import CheckpointError, PickleCheckpointError
from .safetensors_file import TensorCopy, read_header, write_file


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
ADAPTED = (
    "`{}` contains an adapter, which would be ignored. Move `adapter_config.json` and its weights "
    "to another folder, load it with `PeftModel.from_pretrained(family, folder)`, and merge it."
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path is inside a folder after links are resolved."""
    # files in a snapshot of the Hub cache are links to the blobs of the same repository
    home = folder.resolve()
    snapshots = [home.parent for home in (home, *home.parents) if home.parent.name == "snapshots"]
    roots = [home, *(found.parent / "blobs" for found in snapshots)]
    return any(path.resolve().is_relative_to(root) for root in roots)


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder. Raise if it is a link out of the folder.

    The file need not exist.
    """
    path = folder / name
    if not lies_in(path, folder):
        raise CheckpointError(
            f"`{name}` of `{folder}` is outside of that folder, at `{path.resolve()}`. Only files "
            "of the checkpoint itself are read. Copy the file into the folder."
        )
    return path


def read_index(name: str, folder: Path) -> dict[str, str]:
    """Return the file of each tensor from the index in a folder. It is empty without an index."""
    path = own_file(folder, INDEX)
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        sound = all(isinstance(file, str) for file in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound or not files:
        raise CheckpointError(
            f"`{INDEX}` of `{name}` is damaged. Its `weight_map` must map tensor names to files."
        )
    for file in set(files.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            kind = PickleCheckpointError if file.endswith((".bin", ".pt")) else CheckpointError
            raise kind(
                f"`{INDEX}` of `{name}` lists `{file}`. Only safetensors files in the same folder "
                "are read."
            )
    return files


def weight_files(name: str, folder: Path, fetch: Callable[[list[str]], Path]) -> dict[str, str]:
    """Return the file of each tensor, from the index or from the single weight file."""
    if not (folder / INDEX).is_file():
        folder = fetch([SINGLE])
    if own_file(folder, SINGLE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    files = read_index(name, folder)
    if not files:
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise PickleCheckpointError(
                f"`{name}` contains only pickle files ({pickles[0]}), which can run any code when "
                "they are loaded. If you trust them, load the model and save it as safetensors."
            )
        raise FileNotFoundError(f"`{name}` contains neither `{SINGLE}` nor `{INDEX}`.")
    return files


def write_index(folder: Path, files: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """Write the index of a sharded checkpoint. `files` maps tensor names to file names."""
    index = {"metadata": dict(metadata), "weight_map": dict(files)}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def shard_name(number: int, count: int) -> str:
    """Return the file name of a shard. The first shard has number 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def plan_shards(
    groups: Iterable[Sequence[TensorCopy]], max_shard_size: int | str
) -> dict[str, list[TensorCopy]]:
    """Split groups of tensors into weight files. Each file has tensors of one group only."""
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
    """Write weight files, and an index if there are several."""
    for file, shard in shards.items():
        write_file(folder / file, shard)
    if len(shards) > 1:
        total = sum(copy.nbytes for shard in shards.values() for copy in shard)
        files = {copy.name: file for file, shard in shards.items() for copy in shard}
        write_index(folder, files, {"total_size": total})
