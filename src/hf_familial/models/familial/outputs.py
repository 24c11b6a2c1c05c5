"""The outputs of the familial models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class FamilialModelOutput(ModelOutput):
    """Output of [`FamilialModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, seq, hidden)`): After the norm of
            the deepest exit that ran.
        past_key_values (`Cache`, *optional*): The family's cache.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        attentions (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        exit_hidden_states (`tuple[torch.FloatTensor]`, *optional*): With `output_exits=True`: G
            tensors of shape `(batch, seq, hidden)`, after each exit's norm, shallowest first.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    exit_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class FamilialCausalLMOutput(ModelOutput):
    """Output of [`FamilialForCausalLM`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Mean of `exit_losses`, in nats per
            token, plus the weighted `aux_loss` if there is one.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*): Load-balancing loss of a mixture
            of experts, when its router logits are asked for.
        logits (`torch.FloatTensor` of shape `(batch, seq, vocab)`): Of the exit asked for.
        past_key_values (`Cache`, *optional*): The family's cache.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        attentions (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        exit_losses (`torch.FloatTensor` of shape `(G,)`, *optional*): Loss of every exit in nats
            per token, detached from the graph; of shape `(1,)` when `exit_idx` chose one.
        exit_logits (`tuple[torch.FloatTensor]`, *optional*): With `output_exits=True`: G tensors of
            shape `(batch, seq, vocab)`, shallowest first.
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    exit_losses: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None
