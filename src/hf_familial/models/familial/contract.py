"""What this package must know of a host's decoder to run part of it, found by one generic rule.

A family that differs has a row in `families.py`; one that cannot be cut at a depth has a reason
there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel

from .families import ONCE, REFUSED, ROWS, Row, refusal


# Names that hosts give to the list of layers and to the final norm, most common first.
LAYERS = ("layers", "h", "blocks", "block")
NORMS = (
    "norm",
    "final_layernorm",
    "final_layer_norm",
    "ln_f",
    "embedding_norm",
    "norm_f",
    "final_norm",
    "layer_norm",
    "ln_out",
)

# What the host's class says of itself and transformers asks of the family. The rest comes from the
# backbone, which is a module of the family (`post_init`), or is the family's own.
TRAITS = (
    "_is_stateful",
    "_supported_generation_modes",
    "_can_compile_fullgraph",
    "_compatible_flash_implementations",
    "_supports_attention_backend",
    "_supports_context_parallel",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "supports_gradient_checkpointing",
    "is_backend_compatible",
    "_can_set_attn_implementation",
    "_can_set_experts_implementation",
)


@dataclass(frozen=True)
class Contract:
    """Where a backbone keeps what a segment needs.

    Attributes:
        owner (`str`): Dotted path of the module that owns the layers; empty for the backbone
            itself.
        layers (`str`): Name of the list of decoder layers in the owner.
        norm (`str`, *optional*): Name of the final norm in the owner; `None` if the host has none.
        entry_norm (`bool`): Whether that norm is also applied to the embedding.
        once (`Mapping[str, str]`): What acts once, before the first layer.
        tap_shift (`int`): Index of a tap in `hidden_states`, minus its depth.
        keep_depth (`bool`): Whether views keep the config's full depth.
        whole (`str`): Why no segment can go on from a tap alone; empty if one can.
        cache (`str`, *optional*): Name of the forward's argument that takes the cache; `None` if
            the host has no cache of transformers' kinds.
        takes (`frozenset[str]`, *optional*): Names of all its arguments; `None` if it takes any.
    """

    owner: str
    layers: str
    norm: str | None
    entry_norm: bool
    once: Mapping[str, str]
    tap_shift: int
    keep_depth: bool
    whole: str
    cache: str
    takes: frozenset[str] | None

    def parts(self, backbone: Any) -> tuple[nn.ModuleList, nn.Module]:
        """The backbone's layers and its final norm, an identity if the host has none."""
        owner = backbone.get_submodule(self.owner)
        norm = nn.Identity() if self.norm is None else getattr(owner, self.norm)
        return getattr(owner, self.layers), norm

    def accepted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that are given and that the host's forward takes."""
        return {
            name: value
            for name, value in inputs.items()
            if value is not None and (self.takes is None or name in self.takes)
        }


def find_contract(backbone: Any) -> Contract:
    """Find the layers and the final norm of a host's decoder.

    Args:
        backbone (`PreTrainedModel`): What `AutoModel` builds from a decoder's config.

    Returns:
        [`Contract`]: The names, ready for `segments.py`.

    Raises:
        ValueError: If the backbone is known not to work or has no list of layers and final norm;
            the message names it, the reason, and what is supported.
    """
    config = backbone.config
    model_type = config.model_type
    if model_type in REFUSED:
        raise refusal(model_type, REFUSED[model_type])
    row = ROWS.get(model_type, Row())
    try:
        owner = backbone.get_submodule(row.owner)
    except AttributeError:
        raise refusal(model_type, f"it has no `{row.owner}`") from None
    layers = next((name for name in LAYERS if _is_layer_list(owner, name, config)), None)
    if layers is None:
        raise refusal(model_type, f"it has no list of {config.num_hidden_layers} decoder layers")
    names = (row.norm,) if row.norm else NORMS
    norm = next((name for name in names if isinstance(getattr(owner, name, None), nn.Module)), None)
    if norm is None and row.normed:
        raise refusal(model_type, "it has no final norm for an exit to copy")
    parameters = inspect.signature(type(backbone).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    cache = next((name for name in ("past_key_values", "cache_params") if name in parameters), "")
    return Contract(
        owner=row.owner,
        layers=layers,
        norm=norm if row.normed else None,
        entry_norm=row.entry_norm,
        once={**ONCE, **row.once},
        tap_shift=row.tap_shift,
        keep_depth=row.keep_depth,
        whole=row.whole,
        cache=cache if row.cached else "",
        takes=None if takes_any else frozenset(parameters),
    )


def decoder_of(host: Any) -> Any:
    """The decoder inside a causal LM: the part that `AutoModel` would build.

    Args:
        host (`PreTrainedModel`): A causal LM, or a composite that has one inside.

    Returns:
        `PreTrainedModel`: A module of it.

    Raises:
        ValueError: If there is none.
    """
    config = host.config.get_text_config(decoder=True)
    if config.model_type in REFUSED:
        raise refusal(config.model_type, REFUSED[config.model_type])
    wanted = MODEL_MAPPING.get(type(config), None)
    for module in host.modules():
        if type(module) is wanted:
            return module
    name = wanted.__name__ if isinstance(wanted, type) else wanted
    raise refusal(config.model_type, f"its base model {name} is no part of {type(host).__name__}")


def host_class(config: Any) -> Any:
    """Return the class that transformers builds for a decoder's config.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.

    Returns:
        `type[PreTrainedModel]`: The causal LM, or the decoder where there is no causal LM.
    """
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        found = mapping.get(type(config), None)
        if isinstance(found, type):
            return found
    return PreTrainedModel


def host_traits(config: Any) -> dict[str, Any]:
    """Return the attributes of the host's class that a family takes over.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.

    Returns:
        `dict[str, Any]`: Name to value, see `TRAITS`.
    """
    host = host_class(config)
    return {name: getattr(host, name) for name in TRAITS if hasattr(host, name)}


def logit_ops(config: Any) -> tuple[tuple[str, float], ...]:
    """What the host's causal LM does around its head.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.

    Returns:
        `tuple[tuple[str, float], ...]`: Kind (see [`LogitOp`]) and number, in order of application.
    """
    row = ROWS.get(config.model_type, Row())
    found = [(op.kind, getattr(config, op.name, None)) for op in row.logits]
    return tuple((kind, number) for kind, number in found if number is not None)


def can_tie(text_config: Any) -> bool:
    """Return whether the host can tie its head: in some hosts the config's switch does nothing.

    Args:
        text_config (`PreTrainedConfig`): Config of the backbone.

    Returns:
        `bool`: `True` for a class that transformers does not know.
    """
    host = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    return bool(getattr(host, "_tied_weights_keys", True))


def _is_layer_list(owner: nn.Module, name: str, config: Any) -> bool:
    layers = getattr(owner, name, None)
    return isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers
