"""What this package must know about a host's decoder to run part of it: a table of data.

One generic rule finds the layers, the final norm and what the forward does once before the first
layer. A family that differs has a row; one that cannot be cut at a depth has a reason instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


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

# What a forward does once, before the first layer, and a later segment must not do again.
IDENTITY, ZERO, ONE = "identity", "zero", "one"
ONCE: Mapping[str, str] = {
    "wpe": ZERO,
    "embed_positions": ZERO,
    "drop": IDENTITY,
    "emb_dropout": IDENTITY,
    "embed_dropout": IDENTITY,
    "embedding_dropout": IDENTITY,
    "word_embeddings_layernorm": IDENTITY,
    "embedding_multiplier": ONE,
}


@dataclass(frozen=True)
class LogitOp:
    """One operation between the normed hidden state and the logits a host returns.

    Attributes:
        kind (`str`): `"scale_hidden"` divides the hidden states before the head; `"multiply"` and
            `"divide"` scale the logits; `"softcap"` is `cap * tanh(logits / cap)`.
        name (`str`): Field of the backbone's config that holds the number. `None` there: no operation.
    """

    kind: str
    name: str


@dataclass(frozen=True)
class Row:
    """How one family differs from the generic rule.

    Attributes:
        owner (`str`): Dotted path, inside the backbone, of the module that owns the layers.
        norm (`str`): Name of the final norm, when the generic rule would find another module.
        once (`Mapping[str, str]`): Further modules or numbers that act once, before the first layer.
        logits (`tuple[LogitOp, ...]`): What the host's causal LM does around its head, in order.
    """

    owner: str = ""
    norm: str = ""
    once: Mapping[str, str] = field(default_factory=dict)
    logits: tuple[LogitOp, ...] = ()


_SOFTCAP = Row(logits=(LogitOp("softcap", "final_logit_softcapping"),))
_MULTIPLIED = Row(logits=(LogitOp("multiply", "logit_scale"),))
_DIVIDED = Row(logits=(LogitOp("divide", "logits_scaling"),))

ROWS: Mapping[str, Row] = {
    "cohere": _MULTIPLIED,
    "cohere2": _MULTIPLIED,
    "cohere2_moe": _MULTIPLIED,
    "cohere_compass": _MULTIPLIED,
    "falcon_h1": Row(logits=(LogitOp("multiply", "lm_head_multiplier"),)),
    "gemma2": _SOFTCAP,
    "gemma3_text": _SOFTCAP,
    "gemma3n_text": _SOFTCAP,
    "gemma4_text": _SOFTCAP,
    "gemma4_unified_text": _SOFTCAP,
    "granite": _DIVIDED,
    "granite_swa": _DIVIDED,
    "granitemoe": _DIVIDED,
    "granitemoe_swa": _DIVIDED,
    "granitemoehybrid": _DIVIDED,
    "granitemoeshared": _DIVIDED,
    "hyperclovax": Row(logits=(LogitOp("multiply", "logits_scaling"),)),
    "minicpm3": Row(logits=(LogitOp("scale_hidden", "logits_scaling"),)),
    "nanochat": _SOFTCAP,
    "opt": Row(owner="decoder"),
    "recurrent_gemma": Row(logits=(LogitOp("softcap", "logits_soft_cap"),)),
    "vaultgemma": _SOFTCAP,
}

REFUSED: Mapping[str, str] = {}


@dataclass(frozen=True)
class Contract:
    """Where a backbone keeps what a segment needs.

    Attributes:
        owner (`str`): Dotted path of the module that owns the layers; empty for the backbone itself.
        layers (`str`): Name of the list of decoder layers in the owner.
        norm (`str`): Name of the final norm in the owner.
        once (`Mapping[str, str]`): What acts once, before the first layer.
        cache (`str`): Name of the forward's argument that takes the cache.
        takes (`frozenset[str]`, *optional*): Names of all its arguments; `None` if it takes any.
    """

    owner: str
    layers: str
    norm: str
    once: Mapping[str, str]
    cache: str
    takes: frozenset[str] | None

    def accepted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that are given and that the host's forward takes; the cache always."""
        return {
            name: value
            for name, value in inputs.items()
            if value is not None
            and (self.takes is None or name in self.takes or name == "past_key_values")
        }


def find_contract(backbone: nn.Module) -> Contract:
    """Find the layers and the final norm of a host's decoder.

    Args:
        backbone (`PreTrainedModel`): What `AutoModel` builds from a decoder's config.

    Returns:
        [`Contract`]: The names, ready for `segments.py`.

    Raises:
        ValueError: If the backbone is known not to work or has no list of layers and final norm; the
            message names it, the reason, and what is supported.
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
    if norm is None:
        raise refusal(model_type, "it has no final norm for an exit to copy")
    parameters = inspect.signature(type(backbone).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return Contract(
        owner=row.owner,
        layers=layers,
        norm=norm,
        once={**ONCE, **row.once},
        cache="cache_params" if "cache_params" in parameters else "past_key_values",
        takes=None if takes_any else frozenset(parameters),
    )


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


def refusal(model_type: str, reason: str) -> ValueError:
    """The error for a backbone that cannot be right: its name, the reason, what is supported."""
    return ValueError(
        f"`{model_type}` cannot be the backbone of a family: {reason}. Supported are decoder-only "
        "language models with one list of layers and a final norm, such as llama, qwen3, gemma3_text, "
        "mixtral or gpt2; docs/backbones.md lists all that were tried."
    )


def _is_layer_list(owner: nn.Module, name: str, config: Any) -> bool:
    layers = getattr(owner, name, None)
    return isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers
