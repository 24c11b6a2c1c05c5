"""The multi-exit loss: one token-correct cross entropy per exit, and their weighted mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .compiled_loss import compiled_cross_entropy
from .linear_loss import Distillation, linear_cross_entropy


IGNORE_INDEX = -100


@dataclass(frozen=True)
class Reading:
    """What an exit predicts from: logits that exist already, or what it takes to make them.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`): After the exit's norm.
        head (`nn.Module`): Its output head.
        make_logits (`Callable`): Gives its logits, shape `(batch, seq, vocab)`.
        wanted (`bool`): Whether the caller wants the logits as well, so that they exist anyway.
    """

    hidden_states: torch.Tensor
    head: nn.Module
    make_logits: Callable[[], torch.Tensor]
    wanted: bool

    @property
    def linear(self) -> bool:
        """`bool`: Whether the head is a plain linear map that nothing but FSDP2 takes part in."""
        # FSDP2 puts one hook of each kind on what it shards
        own = 1 if sharded_linear(self.head) else 0
        hooks = max(len(self.head._forward_hooks), len(self.head._forward_pre_hooks))
        # tensor parallelism leaves a process a part of the weight: only its call gives all logits
        plain = own or (type(self.head) is nn.Linear and not is_sharded(self.head.weight))
        return bool(plain) and hooks <= own and not hasattr(self.head, "_hf_hook")


def is_sharded(weight: torch.Tensor) -> bool:
    """Return whether several processes hold a weight together, as a DTensor."""
    return hasattr(weight, "full_tensor")


def sharded_linear(head: nn.Module) -> bool:
    """Whether `head` is a linear map that FSDP2 shards as a unit, alone or with other modules."""
    if type(head) is nn.Linear or not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    # of a class that `fully_shard` makes on the fly
    return isinstance(head, FSDPModule) and nn.Linear in type(head).__bases__


def multi_exit_loss(
    readings: Mapping[int, Reading],
    ops: tuple[tuple[str, float], ...],
    loss_function: Callable[..., torch.Tensor],
    labels: torch.Tensor,
    exit_weights: Sequence[float] | None = None,
    distillation: Distillation | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every exit, each over the same tokens and the same denominator.

    Without `exit_weights` the loss is their mean, weights 1/G (arXiv:2512.23407). Exits whose
    logits nobody wants are read in chunks (`linear_loss.py`), the others by the host's loss.

    Args:
        readings (`Mapping[int, Reading]`): By index of the exit, shallowest first.
        ops (`tuple[tuple[str, float], ...]`): What the host does around its head, see `logit_ops`.
        loss_function (`Callable`): The host's causal-LM loss.
        labels (`torch.Tensor` of shape `(batch, seq)`): Token ids, -100 where there is no target;
            shifted here unless `shift_labels` is among `kwargs`.
        exit_weights (`Sequence[float]`, *optional*): Weight of each exit's loss in the sum.
        distillation ([`Distillation`], *optional*): What the deepest exit teaches the others.
        **kwargs: For the loss function: `num_items_in_batch`, the number of targets over all
            accumulated batches, `shift_labels`, `ignore_index`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss, of shape `()`, and the loss of every exit, of
        shape `(len(readings),)` and without a graph; both in nats per token.

    Raises:
        ValueError: If there is not one weight per exit, or distillation is asked for with heads
            that cannot be read in chunks.
    """
    if exit_weights is None:
        exit_weights = [1 / len(readings)] * len(readings)
    if len(exit_weights) != len(readings):
        raise ValueError(
            f"`exit_weights` must hold one weight for each of {len(readings)} exits, got "
            f"{list(exit_weights)}."
        )
    weights = dict(zip(readings, exit_weights, strict=True))
    plain = loss_function is ForCausalLMLoss
    # a teacher and its students are read together, whoever wants their logits as well
    whole = distillation is not None and len(readings) > 1
    fused = [
        k
        for k, reading in readings.items()
        if plain and reading.linear and (whole or not reading.wanted)
    ]
    if whole and len(fused) < len(readings):
        raise ValueError(
            "distillation needs plain linear heads, whole in each process, and the host's own loss "
            "function."
        )
    losses: dict[int, torch.Tensor] = {}
    total: Any = 0.0
    for k, reading in readings.items():
        if k not in fused:
            logits = reading.make_logits()
            loss = loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
            total, losses[k] = total + weights[k] * loss, loss.detach()
    if fused:
        targets, denominator, ignore_index = _targets(labels, **kwargs)
        heads: list[Any] = [readings[k].head for k in fused]

        def read(*hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            traced = torch.compiler.is_compiling()
            cross_entropy = compiled_cross_entropy if traced else linear_cross_entropy
            return cross_entropy(
                hidden_states,
                heads,
                targets,
                denominator,
                [weights[k] for k in fused],
                ops,
                ignore_index,
                distillation=distillation if whole else None,
            )

        hidden_states = [readings[k].hidden_states.flatten(0, -2) for k in fused]
        loss, exit_losses = with_whole_heads(heads, read)(*hidden_states)
        total = total + loss
        losses |= dict(zip(fused, exit_losses, strict=True))
    return total, torch.stack([losses[k].float() for k in readings])


def with_whole_heads(heads: Sequence[nn.Module], read: Callable[..., Any]) -> Callable[..., Any]:
    """Make `read` a forward pass of every head that FSDP2 shards, which gathers its weight.

    Args:
        heads (`Sequence[nn.Module]`): The same object where it is shared.
        read (`Callable`): Takes the hidden states, by position.

    Returns:
        `Callable`: Called as `read` is; all heads are whole inside, and left as they were.
    """
    for head in dict.fromkeys(heads):
        if sharded_linear(head):
            read = _as_forward_of(head, read)
    return read


def _as_forward_of(head: nn.Module, read: Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.fsdp import register_fsdp_forward_method

    @torch.compiler.disable
    def gathered(*hidden_states: torch.Tensor) -> Any:
        # a method for the time of this call
        vars(head)["_read"] = read
        register_fsdp_forward_method(head, "_read")
        try:
            return vars(head)["_read"](*hidden_states)
        finally:
            del vars(head)["_read"]

    return gathered


def _targets(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Flat targets and what their summed losses are divided by, as the host's loss has them."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    denominator = torch.as_tensor(num_items_in_batch, device=labels.device, dtype=torch.float32)
    return targets, denominator, ignore_index


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
    num_experts = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    if num_experts is None:
        raise ValueError(
            f"`{config.model_type}` has router logits but none of {names} in its config: train it "
            "with `output_router_logits=False`."
        )
    loss = load_balancing_loss_func(
        tuple(router_logits), num_experts, config.num_experts_per_tok, attention_mask
    )
    return loss, getattr(config, "router_aux_loss_coef", 0.0)
