"""The layout of Ruyi checkpoints in the words of a family: its config and the names of its tensors.

Of https://github.com/TeleAI-AI-Flow/AI-Flow-Ruyi and its successor Ruyi2, arXiv:2602.22543.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ..errors import CheckpointError
from ..models.familial import FamilialConfig, FamilialForCausalLM


# model_type of a Ruyi checkpoint -> that of its backbone; `ee_qwen3` is what a page of Ruyi2 says
RUYI_BACKBONES: Mapping[str, str] = {
    "ruyi_qwen2": "qwen2",
    "ruyi_qwen3": "qwen3",
    "ee_qwen3": "qwen3",
}
RUYI_FIELDS = ("early_exit_points", "shared_heads", "default_early_exit_point")
# about the code that wrote a checkpoint, not about the model
NOT_OURS = ("auto_map", "architectures", "transformers_version", "model_type", "_name_or_path")


def ruyi_config(fields: Mapping[str, Any], name: str = "it") -> FamilialConfig:
    """The config of the family that a Ruyi checkpoint is.

    Its exit at layer `e` (from 0) runs the layers before `e`, then a layer of its own in the place
    of layer `e`: a depth of `e` and one private layer. The last exit is the whole backbone.

    Args:
        fields (`Mapping[str, Any]`): Its `config.json`.
        name (`str`, *optional*): What to call it in messages.

    Returns:
        [`FamilialConfig`]

    Raises:
        ValueError: If it is no Ruyi config, or one that a family cannot express.
    """
    backbone = RUYI_BACKBONES.get(str(fields.get("model_type")))
    if backbone is None:
        raise ValueError(
            f"`{name}` is a `{fields.get('model_type')}`, not a Ruyi checkpoint: those are "
            f"{', '.join(RUYI_BACKBONES)}."
        )
    if fields.get("use_sliding_window"):
        # its masks have a window in every layer, its config in some
        raise ValueError(f"`{name}` uses sliding windows; only full attention is imported.")
    taken = (*NOT_OURS, *RUYI_FIELDS)
    ours = {key: value for key, value in fields.items() if key not in taken}
    shared = bool(fields.get("shared_heads", False))
    tied = bool(fields.get("tie_word_embeddings", False)) and shared
    text_config = CONFIG_MAPPING[backbone].from_dict(ours | {"tie_word_embeddings": tied})
    points: Any = fields.get("early_exit_points")
    depth = text_config.num_hidden_layers
    if not _are_points(points, depth):
        raise ValueError(
            f"`early_exit_points` of `{name}` must be increasing indices of layers from 1 up, the "
            f"last one {depth - 1} for {depth} layers, got {points!r}."
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
    # exit 0 would run nothing before its own layer: no depth of a family
    return points == sorted(set(points)) and points[0] >= 1 and points[-1] == depth - 1


def ruyi_names(config: FamilialConfig, names: Iterable[str]) -> dict[str, str]:
    """What a family calls the tensors of a Ruyi checkpoint.

    Args:
        config ([`FamilialConfig`]): The family, see [`ruyi_config`].
        names (`Iterable[str]`): Names in the checkpoint's files.

    Returns:
        `dict[str, str]`: Name in the family to name in the files.

    Raises:
        CheckpointError: If the layout has no tensor of such a name, or more than are there.
    """
    starts = _starts(config)
    found = {}
    for name in names:
        if name.endswith(".inv_freq"):
            continue  # written by old versions of transformers, computed by new ones
        start = next((start for start in starts if name.startswith(start)), None)
        if start is None:
            heads = "one head each" if config.exit_head == "own" else "one shared head"
            raise CheckpointError(
                f"`{name}` is no tensor of a Ruyi checkpoint with {config.num_exits} exits and "
                f"{heads}."
            )
        found[starts[start] + name.removeprefix(start)] = name
    with torch.device("meta"):
        family = FamilialForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    lacking = sorted(family.state_dict().keys() - found.keys() - tied)
    if lacking:
        raise CheckpointError(
            f"the Ruyi checkpoint lacks {len(lacking)} tensors, the first of which would be "
            f"`{lacking[0]}` in the family."
        )
    return found


def _starts(config: FamilialConfig) -> dict[str, str]:
    """How names begin in the checkpoint, and in the family."""
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


__all__ = ["ruyi_config", "ruyi_names"]
