"""Checkpoints of other projects, read as families: renamed, not rebuilt.

Ruyi: every early exit has one decoder layer, one norm and mostly one head of its own, which is what
`num_exit_layers=1` says. LayerSkip: an ordinary Llama whose final norm and head read any layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.family_files import FamilyFiles
from ..checkpoints.index import weight_files
from ..models.familial import FamilialForCausalLM
from ._source import Source, find_source
from .export import ExportReport, export_exit
from .ruyi import ruyi_config, ruyi_names


def import_ruyi(
    path_or_repo: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ExportReport:
    """Turn a checkpoint of AI-Flow-Ruyi or Ruyi2 into a family, with equal logits at every exit.

    Tensors are copied byte for byte under other names; no model is built and no remote code runs.
    `export_exit(open_ruyi(path_or_repo), k, out)` writes one member of it directly.

    Args:
        path_or_repo (`str` or `os.PathLike`): Folder, or repository on the Hub.
        out (`str` or `os.PathLike`): Folder to write; it must not hold anything.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of each file of weights.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an `out` that holds something.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*): For the Hub.

    Returns:
        [`ExportReport`]

    Raises:
        CheckpointError: If the weights are damaged, pickles, or not in this layout.
        OSError: If there is no such checkpoint, or `out` cannot be written.
        ValueError: If it is not a Ruyi checkpoint, or one that cannot be a family.

    Example:
        >>> import_ruyi("TeleAI-AI-Flow/AI-Flow-Ruyi2", "ruyi2")
        >>> family = FamilialForCausalLM.from_pretrained("ruyi2")  # exits [2, 21, 40]

    Reference: layout of https://github.com/TeleAI-AI-Flow/AI-Flow-Ruyi and of Ruyi2,
    arXiv:2602.22543, section 3.
    """
    family = open_ruyi(path_or_repo, revision=revision, token=token)
    return export_exit(
        family, -1, out, format="familial", max_shard_size=max_shard_size, overwrite=overwrite
    )


def open_ruyi(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> FamilyFiles:
    """Open a Ruyi checkpoint as a family; its weights are not read.

    Args:
        path_or_repo (`str` or `os.PathLike`): Folder, or repository on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*): For the Hub.

    Returns:
        [`FamilyFiles`]

    Raises:
        CheckpointError: If the weights are damaged, pickles, or not in this layout.
        OSError: If there is no such checkpoint.
        ValueError: If it is not a Ruyi checkpoint, or one that cannot be a family.
    """
    source = find_source(path_or_repo, revision=revision, token=token)
    config = ruyi_config(_fields_of(source), source.name)
    folder = source.small_files()
    files = weight_files(source.name, folder, source.fetch)
    in_files = ruyi_names(config, files)
    ours = {name: files[theirs] for name, theirs in in_files.items()}
    return FamilyFiles(source.name, folder, source.fetch, config, ours, in_files)


def _fields_of(source: Source) -> Mapping[str, Any]:
    """The config as its file has it."""
    fields = source.read_json("config.json")
    if fields is None:
        raise FileNotFoundError(f"`{source.name}` holds no `config.json`: it is no checkpoint.")
    return fields if isinstance(fields, dict) else {}


def from_layerskip(
    backbone: str | os.PathLike[str] | PreTrainedModel,
    exits: list[int] | None = None,
    **kwargs: Any,
) -> FamilialForCausalLM:
    """A family from a LayerSkip checkpoint: the final norm and head read every exit.

    LayerSkip trains an ordinary Llama so that one norm and one head serve all its layers: nothing
    is added, and exits can be anywhere. This is `from_backbone` with `exit_norm="shared"` and
    `exit_head="shared"`.

    Args:
        backbone (`str`, `os.PathLike` or `PreTrainedModel`): As in
            [`FamilialForCausalLM.from_backbone`].
        exits (`list[int]`, *optional*): Depth of every exit; 4 evenly spaced ones by default.
        **kwargs: `num_exits` and `default_exit`, and what `from_pretrained` takes.

    Returns:
        [`FamilialForCausalLM`]

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If the exits are wrong, or norm and head are asked not to be shared.

    Example:
        >>> family = from_layerskip("facebook/layerskip-llama3.2-1B", exits=[4, 8, 16])

    Reference: LayerSkip, arXiv:2404.16710.
    """
    for name in ("exit_norm", "exit_head"):
        if kwargs.pop(name, "shared") != "shared":
            raise ValueError(f"`{name}` of a LayerSkip family is 'shared'; use `from_backbone`.")
    return FamilialForCausalLM.from_backbone(
        backbone, exits=exits, exit_norm="shared", exit_head="shared", **kwargs
    )


__all__ = ["from_layerskip", "import_ruyi", "open_ruyi"]
