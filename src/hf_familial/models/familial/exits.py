"""What stands between a tap and the logits: private layers, norm, head, logit operations."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .contract import Contract, refusal


class Exit(nn.Module):
    """The modules of one early exit.

    Args:
        norm (`nn.Module`, *optional*): Its own norm; `None` when the backbone's final norm is
            shared.
        layers (`list[nn.Module]`): Its private decoder layers, of the host's own class.
    """

    def __init__(self, norm: nn.Module | None, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


def build_exits(config: Any, backbone: nn.Module, contract: Contract, keep: bool) -> nn.ModuleList:
    """Make the modules of every early exit from copies of the backbone's.

    Args:
        config ([`FamilialConfig`]): Says how many, where, and of what.
        backbone (`PreTrainedModel`): The host's decoder.
        contract ([`Contract`]): Where it keeps its layers and norm.
        keep (`bool`): Whether the copies keep the backbone's values; otherwise the host's own
            initialisation draws new ones.

    Returns:
        `nn.ModuleList`: One [`Exit`] for each exit but the deepest.
    """
    layers, norm = contract.parts(backbone)
    return nn.ModuleList(
        Exit(
            norm=copy_module(norm, keep) if config.exit_norm == "own" else None,
            layers=[_private_layer(layers, depth + j, keep) for j in range(config.num_exit_layers)],
        )
        for depth in config.exits[:-1]
    )


def build_head(text_config: Any) -> nn.Module:
    """Make the output head of the host's causal LM, as the host shapes it.

    Args:
        text_config (`PreTrainedConfig`): Config of the backbone.

    Returns:
        `nn.Linear`: `hidden_size` to `vocab_size`, with a bias if the host has one.

    Raises:
        ValueError: If the host has no causal LM, or its head is not one linear map.
    """
    # a host on the meta device costs no memory, and knows its head better than any table
    with torch.device("meta"):
        try:
            host = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise refusal(text_config.model_type, "it has no causal language model") from None
    head = host.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise refusal(
            text_config.model_type, f"its output head is {type(head).__name__}, not a Linear"
        )
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def copy_module(module: nn.Module, keep: bool) -> nn.Module:
    """A deep copy of a host's module, with its values or to be initialised anew."""
    # the config stays shared: what is set on the model must reach the copies too
    configs = [part.config for part in module.modules() if hasattr(part, "config")]
    copied = copy.deepcopy(module, {id(config): config for config in configs})
    if not keep:
        for part in copied.modules():
            part.__dict__.pop("_is_hf_initialized", None)
    return copied


def _private_layer(layers: nn.ModuleList, index: int, keep: bool) -> nn.Module:
    """A decoder layer like the one at `index`; beyond the last, like the last."""
    source = min(index, len(layers) - 1)
    layer: Any = copy_module(layers[source], keep)
    for part in layer.modules():
        if getattr(part, "layer_idx", None) == source:
            part.layer_idx = index
    return layer


def read_out(
    hidden_states: torch.Tensor, head: nn.Module, ops: tuple[tuple[str, float], ...]
) -> torch.Tensor:
    """Map normed hidden states to the logits the host's causal LM would return.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., hidden)`): After the exit's norm.
        head (`nn.Module`): Output head.
        ops (`tuple[tuple[str, float], ...]`): What the host does around its head, see `logit_ops`.

    Returns:
        `torch.Tensor` of shape `(..., vocab)`, dtype of the head.
    """
    for kind, number in ops:
        if kind == "scale_hidden":
            hidden_states = hidden_states / number
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        # some hosts keep the residual in float32 and narrow it here
        hidden_states = hidden_states.to(weight.dtype)
    logits = head(hidden_states)
    for kind, number in ops:
        if kind == "multiply":
            logits = logits * number
        elif kind == "divide":
            logits = logits / number
        elif kind.startswith("softcap"):
            # in half precision, tanh is coarse near saturation: some hosts leave it for that
            logits = logits.float() if kind == "softcap_float" else logits
            logits = torch.tanh(logits / number) * number
        elif kind == "keep":
            logits = logits[..., : int(number)]
    return logits
