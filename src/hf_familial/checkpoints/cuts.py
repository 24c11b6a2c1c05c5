"""A family cut at one of its exits: the config, the names of its tensors, what cannot be cut.

The exit at which it is cut becomes the deepest one: its norm is the backbone's final norm, its head
is `lm_head`, its private layers are the backbone's last ones.
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

# model_type -> why its first layers alone are not what they are in the whole
DEPTH_MATTERS: Mapping[str, str] = {
    "gpt_neox_japanese": "only the last layer of all has a bias after attention",
    "minicpm3": "the scale of every residual branch depends on the number of layers",
}

# model_type -> what it decides by the index of a layer. A private layer that stands at an index the
# backbone does not have is a copy of the last layer, and would be taken for another.
INDEX_MATTERS: Mapping[str, str] = {
    "bamba": "which layers attend",
    "beam": "the window of a layer's attention",
    "diffllama": "the scale of a layer's differential attention",
    "ernie4_5_moe": "which layers have experts",
    "jamba": "which layers attend and which have experts",
    "llama4_text": "which layers have experts",
    "recurrent_gemma": "which layers attend",
}

# model_type -> what else the switch that ties the output head to the embedding ties together
TIED_TOO: Mapping[str, str] = {
    "zamba": "the attention blocks that its layers share",
    "zamba2": "the attention blocks that its layers share",
}

# model_type -> names under which it says its number of layers once more
DEPTH_FIELDS: Mapping[str, tuple[str, ...]] = {"xlstm": ("num_blocks",)}


@dataclass(frozen=True)
class Layout:
    """The dotted paths of the parts of a host's causal LM: the decoder in it, and in that the rest.

    `norm` is empty if there is none; `tensors` are names in memory; `routed` says that a layer
    chooses experts.
    """

    architecture: str
    decoder: str
    layers: str
    norm: str
    head: str
    tensors: frozenset[str]
    routed: bool


def find_layout(text_config: Any) -> Layout:
    """Return where a host keeps its parts, found in one without weights, on the meta device."""
    with torch.device("meta"):
        try:
            host: Any = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
        except ValueError as error:
            raise CutError(
                f"a `{text_config.model_type}` of {text_config.num_hidden_layers} layers cannot be "
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
    """Return whether a host's decoder records router logits."""
    recorders = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", ())
    recorders = recorders if isinstance(recorders, (list, tuple)) else (recorders,)
    kinds: Any = tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)
    return any(isinstance(module, kinds) for module in decoder.modules())


def member_depth(config: FamilialConfig, exit_idx: int) -> int:
    """Number of layers of a member, its private ones counted."""
    exit_idx = config.resolve_exit(exit_idx)
    early = exit_idx < config.num_exits - 1
    return config.exits[exit_idx] + (config.num_exit_layers if early else 0)


def reads_embedding(config: FamilialConfig, exit_idx: int) -> bool:
    """Return whether the output head of an exit is the input embedding."""
    return _says_tied(config, exit_idx) and can_tie(config.text_config)


def _says_tied(config: FamilialConfig, exit_idx: int) -> bool:
    """Return whether the config of a member says tied, also where its host never ties."""
    own = config.exit_head == "own" and config.resolve_exit(exit_idx) < config.num_exits - 1
    return bool(config.tie_word_embeddings) and not own


def check_cut(config: FamilialConfig, exit_idx: int, verified: bool = False) -> None:
    """Raise for a cut that would change what the exit computes.

    A type that was never tried passes if the result is `verified` numerically afterwards.
    """
    exit_idx = config.resolve_exit(exit_idx)
    if exit_idx == config.num_exits - 1:
        return
    text_config = config.text_config
    model_type = text_config.model_type
    reason = DEPTH_MATTERS.get(model_type, "")
    if getattr(text_config, "hidden_size_per_layer_input", None):
        reason = "one table holds an embedding of the token ids for every layer"
    if getattr(text_config, "num_kv_shared_layers", None):
        reason = "its last layers, counted from the end, reuse keys and values"
    beyond = member_depth(config, exit_idx) > text_config.num_hidden_layers
    if beyond and model_type in INDEX_MATTERS:
        reason = (
            f"it decides by a layer's index {INDEX_MATTERS[model_type]}, and the private layers of "
            "this exit stand beyond the backbone's depth"
        )
    untied = config.tie_word_embeddings and not _says_tied(config, exit_idx)
    if untied and model_type in TIED_TOO:
        reason = (
            f"the exit's own head would be untied, and the same switch ties {TIED_TOO[model_type]}"
        )
    if not verified and model_type not in VERIFIED:
        reason = (
            "this type was never tried; load the family and export the model in memory, which is "
            "checked numerically"
        )
    if reason:
        raise CutError(
            f"exit {exit_idx} (depth {config.exits[exit_idx]}) of a `{model_type}` family cannot "
            f"become a model of its own: {reason}."
        )


def truncated_config(text_config: Any, depth: int) -> Any:
    """Return the config of a host with another depth, as its own class reads and writes it.

    Beyond the backbone's depth, what holds for the last layer repeats.
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
                f"a `{text_config.model_type}` of {depth} layers cannot have `{name}` "
                f"{sliced.__dict__[name]}: its config makes {getattr(truncated, name)} of it."
            )
    return truncated


def cut_config(config: FamilialConfig, exit_idx: int) -> FamilialConfig:
    """Return the config of the family cut at an exit: that exit is the deepest, those above go."""
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
    """Return the tensors that the family cut at an exit has: old names to new ones, in order.

    Raises:
        CutError: If a tensor that is needed is missing, or a private layer would stand where the
            host has a layer of another kind.
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
                f"`{config.text_config.model_type}` family cannot become a model of its own: where "
                "its private layers would stand, the host has layers of another kind."
            )
    return result


def _within(name: str, bounds: Mapping[str, int]) -> bool:
    """Return whether a tensor of a numbered module has a number that is kept."""
    for prefix, count in bounds.items():
        if name.startswith(prefix):
            return int(name[len(prefix) :].split(".", 1)[0]) < count
    return name.startswith((BACKBONE, HEAD))


def _check_complete(config: FamilialConfig, exit_idx: int, found: set[str], layers: str) -> None:
    """Every layer and the head must be there: a checkpoint of a headless family has none."""
    numbered = re.compile(re.escape(layers) + r"(\d+)\.")
    present = {int(m.group(1)) for m in map(numbered.match, found) if m}
    missing = [f"layer {i}" for i in range(member_depth(config, exit_idx)) if i not in present]
    if not reads_embedding(config, exit_idx) and not any(n.startswith(HEAD) for n in found):
        missing.append("its output head")
    if missing:
        raise CutError(
            f"the checkpoint holds no tensors of {', '.join(missing)}, which exit {exit_idx} "
            "needs: it is not a whole `FamilialForCausalLM`."
        )
