"""Which file of a checkpoint holds which tensors, and the index that says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from ..checkpoints.by_segment import segment_of
from ..checkpoints.cuts import Layout
from ..models.familial import FamilialConfig
from .safetensors_io import Piece, write_file
from .source import INDEX, SINGLE


def by_segment(config: FamilialConfig, names: Mapping[str, str], layout: Layout) -> list[list[str]]:
    """The tensors of a family in groups, by the exit that first needs them.

    Args:
        config ([`FamilialConfig`]): Of the family that is written.
        names (`Mapping[str, str]`): Any key for a tensor, to its name in that family.
        layout ([`Layout`]): Of the host.

    Returns:
        `list[list[str]]`: Keys, one list per exit.
    """
    groups: list[list[str]] = [[] for _ in config.exits]
    for key, name in names.items():
        groups[segment_of(name, config, layout.layers, layout.norm)].append(key)
    return groups


def plan_shards(
    groups: Iterable[Sequence[Piece]], max_shard_size: int | str
) -> dict[str, list[Piece]]:
    """What each file of weights holds: none holds tensors of two groups.

    Args:
        groups (`Iterable[Sequence[Piece]]`): Tensors that may stand together.
        max_shard_size (`int` or `str`): Size of a file, in bytes or as in `"5GB"`; a larger tensor
            has a file of its own.

    Returns:
        `dict[str, list[Piece]]`: By name of file.
    """
    shards: list[list[Piece]] = []
    for group in groups:
        by_name = {piece.name: piece for piece in group}
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda piece: piece.nbytes,
            filename_pattern="{suffix}",
            max_shard_size=max_shard_size,
        )
        shards += [[by_name[n] for n in names] for names in split.filename_to_tensors.values()]
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards)
    }


def write_shards(folder: Path, shards: Mapping[str, Sequence[Piece]]) -> None:
    """Write files of weights, and their index if they are several.

    Args:
        folder (`Path`): Where to.
        shards (`Mapping[str, Sequence[Piece]]`): What each file holds.

    Raises:
        CheckpointError: If a source is cut off, or a value does not fit its new dtype.
        OSError: If something cannot be written.
    """
    for file, shard in shards.items():
        write_file(folder / file, shard)
    if len(shards) > 1:
        total = sum(piece.nbytes for shard in shards.values() for piece in shard)
        weight_map = {piece.name: file for file, shard in shards.items() for piece in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


__all__ = ["by_segment", "plan_shards", "write_shards"]
