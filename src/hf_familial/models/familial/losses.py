"""The multi-exit loss: one token-correct cross entropy per exit, their mean with equal weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def multi_exit_loss(
    exits: Sequence[int],
    logits_of: Callable[[int], torch.Tensor],
    loss_function: Callable[..., torch.Tensor],
    labels: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """Cross entropy of every exit, each over the same tokens and the same denominator.

    The training loss is their mean, weights 1/G (arXiv:2512.23407).

    Args:
        exits (`Sequence[int]`): Indices of the exits that have a loss, shallowest first.
        logits_of (`Callable`): Gives the logits of an exit, shape `(batch, seq, vocab)`.
        loss_function (`Callable`): The host's causal-LM loss.
        labels (`torch.Tensor` of shape `(batch, seq)`): Token ids, -100 where there is no target;
            shifted by the loss function unless `shift_labels` is among `kwargs`.
        **kwargs: For the loss function: `num_items_in_batch`, the number of targets over all
            accumulated batches, `shift_labels`, `ignore_index`.

    Returns:
        `torch.Tensor` of shape `(len(exits),)`: Loss of every exit, in nats per token.
    """
    losses = []
    for exit_idx in exits:
        logits = logits_of(exit_idx)
        losses.append(
            loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        )
    return torch.stack(losses)


def balance_loss(
    config: Any, router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """Load-balancing loss of a mixture of experts, as the hosts compute it, and its weight.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.
        router_logits (`Sequence[torch.Tensor]`, each of shape `(batch * seq, experts)`): Per layer.
        attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 0 for padding.

    Returns:
        `tuple[torch.Tensor, float]`: The loss, of shape `()`, and the coefficient it enters with.

    Reference: Switch Transformers, arXiv:2101.03961, equations 4 to 6.
    """
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    num_experts = next(getattr(config, name) for name in names if hasattr(config, name))
    loss = load_balancing_loss_func(
        tuple(router_logits), num_experts, config.num_experts_per_tok, attention_mask
    )
    return loss, getattr(config, "router_aux_loss_coef", 0.0)
