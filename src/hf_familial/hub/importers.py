"""Importers of checkpoints from other projects with early exits.

In a Ruyi checkpoint, each early exit has its own decoder layer and norm, and usually its own head.
This matches a family with `num_exit_layers=1`, so the import only renames tensors. A LayerSkip
checkpoint is an ordinary Llama whose final norm and head can read the output of any layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..checkpoints.family_files import FamilyFiles
from ..checkpoints.index import weight_files
from ..errors import CheckpointError
from ..models.familial import FamilialConfig, FamilialForCausalLM
from ._source import Source, find_source
from .export import ExportReport, export_exit


# `model_type` of a Ruyi checkpoint and of its backbone; `ee_qwen3` is from a page about Ruyi2
RUYI_BACKBONES: Mapping[str, str] = {
    "ruyi_qwen2": "qwen2",
    "ruyi_qwen3": "qwen3",
    "ee_qwen3": "qwen3",
}
RUYI_FIELDS = ("early_exit_points", "shared_heads", "default_early_exit_point")
# config fields about the code that wrote a checkpoint, not about the model
NOT_OURS = ("auto_map", "architectures", "transformers_version", "model_type", "_name_or_path")


def import_ruyi(
    path_or_repo: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ExportReport:
    """Convert a checkpoint of AI-Flow-Ruyi or Ruyi2 to a family with the same logits at each exit.

    The function copies the bytes of all tensors under new names. It builds no model and runs no
    remote code. To write one member directly, call `export_exit(open_ruyi(path_or_repo), k, out)`.

    Args:
        path_or_repo (`str` or `os.PathLike`): Folder, or repository on the Hub.
        out (`str` or `os.PathLike`): Folder to write. It must be empty or missing.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Maximum size of a file of
            weights.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing `out`.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*): Token for the Hub.

    Returns:
        [`ExportReport`]

    Raises:
        CheckpointError: If the weights are damaged, are pickle files, or have other tensors.
        OSError: If the checkpoint does not exist, or if `out` cannot be written.
        ValueError: If it is not a Ruyi checkpoint, or if it cannot be converted to a family.

    Example:
        >>> import_ruyi("TeleAI-AI-Flow/AI-Flow-Ruyi2", "ruyi2")
        >>> family = FamilialForCausalLM.from_pretrained("ruyi2")  # exits [2, 21, 40]

    Reference: https://github.com/TeleAI-AI-Flow/AI-Flow-Ruyi and Ruyi2, arXiv:2602.22543,
    section 3.
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
    """Open a Ruyi checkpoint as a family for `export_exit`, without reading its weights.

    Arguments and errors are those of [`import_ruyi`].

    Example:
        >>> export_exit(open_ruyi("TeleAI-AI-Flow/AI-Flow-Ruyi2"), 0, "small")
    """
    source = find_source(path_or_repo, revision=revision, token=token)
    config = ruyi_config(_fields_of(source), source.name)
    folder = source.small_files()
    files = weight_files(source.name, folder, source.fetch)
    in_files = _ruyi_names(config, files)
    ours = {name: files[theirs] for name, theirs in in_files.items()}
    return FamilyFiles(source.name, folder, source.fetch, config, ours, in_files)


def _fields_of(source: Source) -> Mapping[str, Any]:
    """Return the fields of `config.json`."""
    fields = source.read_json("config.json")
    if fields is None:
        raise FileNotFoundError(f"`{source.name}` has no `config.json`, so it is not a checkpoint.")
    return fields if isinstance(fields, dict) else {}


def ruyi_config(fields: Mapping[str, Any], name: str = "it") -> FamilialConfig:
    """Convert the config of a Ruyi checkpoint to the config of a family."""
    backbone = RUYI_BACKBONES.get(str(fields.get("model_type")))
    if backbone is None:
        raise ValueError(
            f"`{name}` is a `{fields.get('model_type')}`, not a Ruyi checkpoint. The types of Ruyi "
            f"checkpoints are {', '.join(RUYI_BACKBONES)}."
        )
    if fields.get("use_sliding_window"):
        # Ruyi's code applies the window in all layers, but the config names only some layers
        raise ValueError(f"`{name}` uses sliding windows. Only full attention can be imported.")
    taken = (*NOT_OURS, *RUYI_FIELDS)
    ours = {key: value for key, value in fields.items() if key not in taken}
    shared = bool(fields.get("shared_heads", False))
    tied = bool(fields.get("tie_word_embeddings", False)) and shared
    text_config = CONFIG_MAPPING[backbone].from_dict(ours | {"tie_word_embeddings": tied})
    points: Any = fields.get("early_exit_points")
    depth = text_config.num_hidden_layers
    if not _are_points(points, depth):
        raise ValueError(
            f"`early_exit_points` of `{name}` must be increasing layer indices of 1 or more, and "
            f"the last one must be {depth - 1} for {depth} layers, got {points!r}."
        )
    default = fields.get("default_early_exit_point", -1)
    return FamilialConfig(
        text_config=text_config,
        exits=[*points[:-1], depth],
        num_exit_layers=1 if len(points) > 1 else 0,
        exit_norm="own",
        exit_head="shared" if shared else "own",
        default_exit=points.index(default) if default in points else -1,
        tie_word_embeddings=tied,
        dtype=text_config.dtype,
    )


def _are_points(points: Any, depth: int) -> bool:
    if not isinstance(points, list) or not points or not all(type(p) is int for p in points):
        return False
    # point 0 would be an exit without backbone layers, which a family cannot have
    return points == sorted(set(points)) and points[0] >= 1 and points[-1] == depth - 1


def _ruyi_names(config: FamilialConfig, names: Iterable[str]) -> dict[str, str]:
    """Return the tensor names of a Ruyi checkpoint, with the names in the family as keys."""
    starts = _starts(config)
    found = {}
    for name in names:
        if name.endswith(".inv_freq"):
            continue  # old versions of Transformers saved this, new ones compute it
        start = next((start for start in starts if name.startswith(start)), None)
        if start is None:
            heads = "one head each" if config.exit_head == "own" else "one shared head"
            raise CheckpointError(
                f"The tensor `{name}` does not belong to a Ruyi checkpoint with {config.num_exits} "
                f"exits and {heads}."
            )
        found[starts[start] + name.removeprefix(start)] = name
    with torch.device("meta"):
        family = FamilialForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    lacking = sorted(family.state_dict().keys() - found.keys() - tied)
    if lacking:
        raise CheckpointError(
            f"The Ruyi checkpoint lacks {len(lacking)} tensors. In the family, the first one is "
            f"called `{lacking[0]}`."
        )
    return found


def _starts(config: FamilialConfig) -> dict[str, str]:
    """Return the name prefixes of the family, with those of the Ruyi checkpoint as keys."""
    last = config.num_exits - 1
    starts = {
        "model.embed_tokens.": "model.backbone.embed_tokens.",
        "model.layers.": "model.backbone.layers.",
        f"model.norms.{last}.": "model.backbone.norm.",
    }
    for k in range(last):
        starts[f"model.eelayers.{k}."] = f"model.exits.{k}.layers.0."
        starts[f"model.norms.{k}."] = f"model.exits.{k}.norm."
    if config.exit_head == "shared":
        return starts | {"lm_head.weight": "lm_head.weight"}
    early = {f"lm_head.{k}.": f"exit_heads.{k}." for k in range(last)}
    return starts | early | {f"lm_head.{last}.": "lm_head."}


def from_layerskip(
    backbone: str | os.PathLike[str] | PreTrainedModel,
    exits: list[int] | None = None,
    **kwargs: Any,
) -> FamilialForCausalLM:
    """Build a family from a LayerSkip checkpoint, with one norm and one head for all exits.

    LayerSkip trains an ordinary Llama so that its final norm and head work after every layer. The
    family therefore has no new parameters, and exits can be at any depth. This function calls
    `from_backbone` with `exit_norm="shared"` and `exit_head="shared"`.

    Args:
        backbone (`str`, `os.PathLike` or `PreTrainedModel`): Folder, repository on the Hub, or
            model in memory.
        exits (`list[int]`, *optional*): Depth of each exit. Defaults to 4 evenly spaced exits.
        **kwargs: `num_exits`, `default_exit`, and arguments of `from_pretrained`.

    Returns:
        [`FamilialForCausalLM`]

    Raises:
        OSError: If the checkpoint does not exist.
        ValueError: If the exits are wrong, or if `exit_norm` or `exit_head` is not `"shared"`.

    Example:
        >>> family = from_layerskip("facebook/layerskip-llama3.2-1B", exits=[4, 8, 16])

    Reference: LayerSkip, arXiv:2404.16710.
    """
    for name in ("exit_norm", "exit_head"):
        if kwargs.pop(name, "shared") != "shared":
            raise ValueError(
                f"`{name}` must be 'shared' for a LayerSkip family. For another value, use "
                "`FamilialForCausalLM.from_backbone`."
            )
    return FamilialForCausalLM.from_backbone(
        backbone, exits=exits, exit_norm="shared", exit_head="shared", **kwargs
    )
