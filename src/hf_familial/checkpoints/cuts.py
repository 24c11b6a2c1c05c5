"""Cuts of a family at an exit: the config, the tensor names, and the cases that are not possible.

The exit at the cut becomes the deepest exit. Its norm becomes the backbone's final norm, its head
becomes `lm_head`, and its private layers become the last layers of the backbone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..errors import CutError
from ..models.backbone_verification import VERIFIED, decoder_of
from ..models.familial import FamilialConfig
from ..models.familial.backbones import can_tie, find_backbone_spec
from ..models.familial.segments import per_layer_lists, slice_config


BACKBONE, HEAD = "model.backbone.", "lm_head."

# model_type -> the reason why its first layers compute other results in a shallower model
DEPTH_MATTERS: Mapping[str, str] = {
    "gpt_neox_japanese": "only the last layer of the backbone has a bias after attention",
    "minicpm3": "the scale of every residual branch depends on the number of layers",
}

# model_type -> the property that depends on the index of a layer. A private layer is a copy of the
# last layer, so at an index beyond the backbone's depth it could get a wrong property.
INDEX_MATTERS: Mapping[str, str] = {
    "bamba": "which layers attend",
    "beam": "the window of a layer's attention",
    "diffllama": "the scale of a layer's differential attention",
    "ernie4_5_moe": "which layers have experts",
    "jamba": "which layers attend and which have experts",
    "llama4_text": "which layers have experts",
    "recurrent_gemma": "which layers attend",
}

# model_type -> other weights that `tie_word_embeddings` ties
TIED_TOO: Mapping[str, str] = {
    "zamba": "the attention blocks that its layers share",
    "zamba2": "the attention blocks that its layers share",
}

# model_type -> other config fields that contain the number of layers
DEPTH_FIELDS: Mapping[str, tuple[str, ...]] = {"xlstm": ("num_blocks",)}


@dataclass(frozen=True)
class Layout:
    """The dotted paths of the parts of a Transformers causal LM.

    Attributes:
        architecture (`str`): The class name of the causal LM.
        decoder (`str`): The path of the decoder in the causal LM.
        layers (`str`): The path of the layers in the decoder.
        norm (`str`): The path of the final norm in the decoder, or an empty string.
        head (`str`): The path of the output head in the causal LM.
        tensors (`frozenset[str]`): The names of all tensors in memory.
        routed (`bool`): Whether some layer routes tokens to experts.
    """

    architecture: str
    decoder: str
    layers: str
    norm: str
    head: str
    tensors: frozenset[str]
    routed: bool


def find_layout(text_config: Any) -> Layout:
    """Return the layout of a causal LM. It is built without weights on the meta device."""
    with torch.device("meta"):
        try:
            host: Any = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
        except ValueError as error:
            raise CutError(
                f"`{text_config.model_type}` with {text_config.num_hidden_layers} layers cannot be "
                f"built: {error}"
            ) from None
    decoder, head = decoder_of(host), host.get_output_embeddings()
    spec = find_backbone_spec(decoder)
    paths = {id(module): name for name, module in host.named_modules()}
    return Layout(
        architecture=type(host).__name__,
        decoder=paths[id(decoder)],
        layers=spec.path(spec.layers),
        norm=spec.path(spec.norm),
        head=paths[id(head)],
        tensors=frozenset(host.state_dict()),
        routed=_is_routed(decoder),
    )


def _is_routed(decoder: Any) -> bool:
    recorders = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", ())
    recorders = recorders if isinstance(recorders, (list, tuple)) else (recorders,)
    kinds: Any = tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)
    return any(isinstance(module, kinds) for module in decoder.modules())


def member_depth(config: FamilialConfig, exit_idx: int) -> int:
    """Return the number of layers of a member, private layers included."""
    exit_idx = config.resolve_exit(exit_idx)
    early = exit_idx < config.num_exits - 1
    return config.exits[exit_idx] + (config.num_exit_layers if early else 0)


def reads_embedding(config: FamilialConfig, exit_idx: int) -> bool:
    """Return whether the output head of an exit is the input embedding."""
    return _says_tied(config, exit_idx) and can_tie(config.text_config)


def _says_tied(config: FamilialConfig, exit_idx: int) -> bool:
    """Return whether the config of a member sets `tie_word_embeddings`.

    Some backbones ignore this field.
    """
    own = config.exit_head == "own" and config.resolve_exit(exit_idx) < config.num_exits - 1
    return bool(config.tie_word_embeddings) and not own


def check_cut(config: FamilialConfig, exit_idx: int, verified: bool = False) -> None:
    """Raise `CutError` if a cut would change the results of the exit.

    Set `verified=True` if the caller compares the logits afterwards. Then untested model types
    pass too.
    """
    exit_idx = config.resolve_exit(exit_idx)
    if exit_idx == config.num_exits - 1:
        return
    text_config = config.text_config
    model_type = text_config.model_type
    reason = DEPTH_MATTERS.get(model_type, "")
    if getattr(text_config, "hidden_size_per_layer_input", None):
        reason = "one table holds an embedding of the tokens for each layer"
    if getattr(text_config, "num_kv_shared_layers", None):
        reason = "its last layers, counted from the end, reuse keys and values"
    beyond = member_depth(config, exit_idx) > text_config.num_hidden_layers
    if beyond and model_type in INDEX_MATTERS:
        reason = (
            f"the index of a layer decides {INDEX_MATTERS[model_type]}, and the private layers of "
            "this exit would have indices beyond the backbone's depth"
        )
    untied = config.tie_word_embeddings and not _says_tied(config, exit_idx)
    if untied and model_type in TIED_TOO:
        reason = (
            "the exit's own head needs `tie_word_embeddings=False`, but this field also ties "
            f"{TIED_TOO[model_type]}"
        )
    if not verified and model_type not in VERIFIED:
        reason = (
            "this model type is not tested. Load the family and export the model in memory, where "
            "the logits are compared"
        )
    if reason:
        raise CutError(
            f"exit {exit_idx} (depth {config.exits[exit_idx]}) of a `{model_type}` family cannot "
            f"become a separate model: {reason}."
        )


def truncated_config(text_config: Any, depth: int) -> Any:
    """Return the config of a backbone with another number of layers.

    Layers beyond the original depth get the settings of the last layer.

    Raises:
        CutError: If the config class changes a list of per-layer settings.
    """
    last = text_config.num_hidden_layers - 1
    sliced = slice_config(text_config, 0, depth)
    fields = sliced.to_dict()
    overrides = fields.get("per_layer_config")
    if overrides is not None:
        by_layer = {int(i): values for i, values in overrides.items()}
        kept = {i: by_layer.get(min(i, last)) for i in range(depth)}
        fields["per_layer_config"] = {str(i): v for i, v in kept.items() if v is not None}
    for name in DEPTH_FIELDS.get(text_config.model_type, ()):
        fields[name] = depth
    truncated = type(text_config).from_dict(copy.deepcopy(fields))
    for name in per_layer_lists(sliced):
        if list(getattr(truncated, name)) != list(sliced.__dict__[name]):
            raise CutError(
                f"`{text_config.model_type}` with {depth} layers does not support `{name}` = "
                f"{sliced.__dict__[name]}. Its config changes it to {getattr(truncated, name)}."
            )
    return truncated


def cut_config(config: FamilialConfig, exit_idx: int) -> FamilialConfig:
    """Return the config of the family cut at an exit. This exit is the deepest one there."""
    exit_idx = config.resolve_exit(exit_idx)
    depth = member_depth(config, exit_idx)
    default = config.resolve_exit()
    text_config = truncated_config(config.text_config, depth)
    tied = _says_tied(config, exit_idx)
    text_config.tie_word_embeddings = tied
    fields = config.to_dict() | {
        "text_config": text_config.to_dict(),
        "exits": [*config.exits[:exit_idx], depth],
        "num_exit_layers": config.num_exit_layers if exit_idx else 0,
        "default_exit": default if default < exit_idx else -1,
        "tie_word_embeddings": tied,
    }
    return type(config).from_dict(copy.deepcopy(fields))


def cut_names(
    config: FamilialConfig, exit_idx: int, names: Iterable[str], layout: Layout
) -> dict[str, str]:
    """Return the tensors of the family cut at an exit, as a dict from old to new names.

    Raises:
        CutError: If a needed tensor is missing, or if a private layer would be at an index where
            the backbone has a layer with other tensors.
    """
    exit_idx = config.resolve_exit(exit_idx)
    early = exit_idx < config.num_exits - 1
    layers, norm = f"{BACKBONE}{layout.layers}.", f"{BACKBONE}{layout.norm}."
    moved: dict[str, str] = {}
    if early:
        own = f"model.exits.{exit_idx}."
        moved = {f"exit_heads.{exit_idx}.": HEAD, f"{own}norm.": norm}
        for j in range(config.num_exit_layers):
            moved[f"{own}layers.{j}."] = f"{layers}{config.exits[exit_idx] + j}."
    replaced = {norm} if early and config.exit_norm == "own" and layout.norm else set()
    if early and config.exit_head == "own":
        replaced.add(HEAD)
    bounds = {layers: config.exits[exit_idx], "model.exits.": exit_idx, "exit_heads.": exit_idx}
    result = {}
    for name in names:
        old = next((prefix for prefix in moved if name.startswith(prefix)), None)
        if old is not None:
            result[name] = moved[old] + name[len(old) :]
        elif not name.startswith(tuple(replaced)) and _within(name, bounds):
            result[name] = name
    _check_complete(config, exit_idx, set(result.values()), layers)
    for prefix in (target for target in moved.values() if target.startswith(layers)):
        there = {new[len(prefix) :] for new in result.values() if new.startswith(prefix)}
        host = prefix.replace(BACKBONE, f"{layout.decoder}.", 1)
        if there != {n[len(host) :] for n in layout.tensors if n.startswith(host)}:
            raise CutError(
                f"exit {exit_idx} (depth {config.exits[exit_idx]}) of a "
                f"`{config.text_config.model_type}` family cannot become a separate model: the "
                "backbone has layers of another kind at the indices of its private layers."
            )
    return result


def _within(name: str, bounds: Mapping[str, int]) -> bool:
    """Return whether a tensor belongs to the cut family, by the number of its layer or exit."""
    for prefix, count in bounds.items():
        if name.startswith(prefix):
            return int(name[len(prefix) :].split(".", 1)[0]) < count
    return name.startswith((BACKBONE, HEAD))


def _check_complete(config: FamilialConfig, exit_idx: int, found: set[str], layers: str) -> None:
    """Raise `CutError` unless all layers and the head of the exit have tensors."""
    numbered = re.compile(re.escape(layers) + r"(\d+)\.")
    present = {int(m.group(1)) for m in map(numbered.match, found) if m}
    missing = [f"layer {i}" for i in range(member_depth(config, exit_idx)) if i not in present]
    if not reads_embedding(config, exit_idx) and not any(n.startswith(HEAD) for n in found):
        missing.append("its output head")
    if missing:
        raise CutError(
            f"the checkpoint has no tensors of {', '.join(missing)}, which exit {exit_idx} needs. "
            "It must be a complete `FamilialForCausalLM`."
        )
